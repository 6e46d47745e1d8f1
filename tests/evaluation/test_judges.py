"""The judges and what stands beside them, against definitions written out."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter

import numpy as np
import pytest

from dlm_scale.errors import UsageError
from dlm_scale.evaluation.judges import Judge, Sample, causal_judge, judged, ngram_judge, rows_for_judge
from dlm_scale.evaluation.ngram import NgramJudge
from dlm_scale.evaluation.text_statistics import distinct_n, repetition, unigram_entropy, variety

VOCAB = 5
ROWS = [np.random.default_rng(size).choice(4, size, p=[0.5, 0.3, 0.15, 0.05]) for size in (40, 3, 1, 25, 0)]


def by_definition(rows, order):
    """p(w | history) by the recursion, from counts of tuples."""
    grams = Counter(tuple(row[i : i + n]) for row in rows for n in range(1, order + 1) for i in range(len(row) - n + 1))

    def p(history, w):
        below = p(history[1:], w) if history else 1 / VOCAB
        followers = {gram[-1]: count for gram, count in grams.items()
                     if len(gram) == len(history) + 1 and gram[:-1] == history}
        total, kinds = sum(followers.values()), len(followers)
        return (followers.get(w, 0) + kinds * below) / (total + kinds) if total else below

    return p


@pytest.mark.parametrize("order", [1, 3, 5])
def test_the_ngram_is_witten_bell_by_its_recursion(order):
    judge, p = NgramJudge(ROWS, VOCAB, order), by_definition([tuple(row.tolist()) for row in ROWS], order)
    text = [0, 1, 0, 0, 2, 4, 4, 0, 1, 0, 3, 0, 0]
    expected = [-math.log(p(tuple(text[max(0, i - order + 1) : i]), w)) for i, w in enumerate(text)]
    assert judge.nll(text) == pytest.approx(expected, abs=1e-12)
    assert judge.nll([]).size == 0 and judge.nll(text[:2]) == pytest.approx(expected[:2])


def test_every_history_has_a_whole_law():
    judge = NgramJudge(ROWS, VOCAB, 4)
    for history in ([], [0], [0, 1, 0], [4, 4, 4], [3, 2, 1, 0, 0, 1]):
        total = sum(math.exp(-judge.nll([*history, w])[-1]) for w in range(VOCAB))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_counts_do_not_cross_rows():
    joined, apart = (NgramJudge(rows, 3, 2) for rows in ([[0, 1, 2, 0]], [[0, 1], [2, 0]]))
    assert joined.nll([1, 2])[1] < apart.nll([1, 2])[1]


@pytest.mark.parametrize("rows, words", [([], "at least one"), ([[]], "at least one"), ([[0, 7]], "outside")])
def test_an_ngram_of_nothing_is_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        NgramJudge(rows, VOCAB)


def test_variety_by_hand():
    rows = [[1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]]
    assert unigram_entropy(rows) == pytest.approx(math.log(6) / 2)
    assert (distinct_n(rows, 1), distinct_n(rows, 2)) == (6 / 12, 6 / 10)
    assert repetition(rows, 4) == pytest.approx((2 / 3 + 0) / 2)
    assert variety([[1]]) == {"unigram_entropy": 0.0, "distinct_1": 1.0, "distinct_2": None, "distinct_4": None,
                              "repetition_4": None}


def test_a_judges_figures_and_their_standard_error():
    pairs = [(10.0, 5), (30.0, 10), (6.0, 3)]
    found = judged(Judge("j", lambda samples: pairs), [Sample("", [])] * 3)
    mean = 46 / 18
    leave_out = np.array([(46 - n) / (18 - t) for n, t in pairs])
    jackknife = math.sqrt(2 / 3 * ((leave_out - leave_out.mean()) ** 2).sum())
    assert found["judge_nll"] == pytest.approx(mean) and found["gen_ppl"] == pytest.approx(math.exp(mean))
    assert found["judge_nll_se"] == pytest.approx(jackknife, rel=0.4) and found["judge_tokens"] == 18
    with pytest.raises(UsageError, match="no token"):
        judged(Judge("j", lambda samples: [(0.0, 0)]), [Sample("", [])])


def test_the_ngram_judge_reads_tokens(masked, tmp_path):
    (tmp_path / "text.txt").write_text("abcabcabc abc")
    judge = ngram_judge(rows_for_judge(str(tmp_path / "text.txt"), masked), masked.vocabulary.size)
    likely, unlikely = judge.score([Sample("", masked.tokenizer.encode("abcabc").tolist()), Sample("", [0, 0, 0])])
    assert likely[1] == 6 and unlikely[1] == 3 and likely[0] / 6 < unlikely[0] / 3


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        causal_judge(str(tmp_path / "nothing"))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is here")
def test_without_transformers_the_message_says_what_to_install(tmp_path):
    with pytest.raises(UsageError, match="pip install transformers"):
        causal_judge(str(tmp_path))


def test_a_hugging_face_model_scores_texts(tmp_path):
    """A random GPT-2 made here: batches, padding and windows give what one text at a time gives."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch
    import tokenizers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=260, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    alphabet = {chr(i + 33): i for i in range(90)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({**alphabet, "?": 90}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    judge = causal_judge(str(tmp_path), batch_size=3)
    texts = ["hello", "a", "", "abcdefghijklmnopqrstuvwxyz", "zz"]
    found = judge.score([Sample(text, []) for text in texts])
    for text, (nats, tokens) in zip(texts, found):
        ids, expected, count = [alphabet[c] for c in text], 0.0, 0
        for start in range(0, len(ids), 16):
            part = torch.tensor([ids[start : start + 16]])
            if part.shape[1] > 1:
                log_probs = model(part).logits.log_softmax(-1)[0]
                expected -= sum(log_probs[i, part[0, i + 1]].item() for i in range(part.shape[1] - 1))
                count += part.shape[1] - 1
        assert tokens == count and nats == pytest.approx(expected, rel=1e-4, abs=1e-6)

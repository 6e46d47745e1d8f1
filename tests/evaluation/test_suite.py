"""The zero-shot suite: detokenizers by examples, windows by hand, and the whole path on small local files."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from dlm_scale.data.tokenizer import make_tokenizer
from dlm_scale.errors import UsageError
from dlm_scale.evaluation import detokenizers
from dlm_scale.evaluation.likelihoods import LikelihoodOptions
from dlm_scale.evaluation.suite import SETS, TextWindows, chosen_sets, evaluate_sets, source_of, texts_of
from tests.evaluation.conftest import tiny

CASES = [
    (detokenizers.WIKITEXT, " = Robert Boulter = \n", "= Robert Boulter ="),
    (detokenizers.WIKITEXT, "the 1 @,@ 000 @-@ year @.@ 5 ( or so ) , it 's \" fine \" .", None),
    (detokenizers.WIKITEXT, "a [ b ] { c } ; d : e ! f ? g", "a [b] {c}; d: e! f? g"),
    (detokenizers.WIKITEXT, "= = History = = \n in N years at 3 ° C", None),
    (detokenizers.PTB, "the company 's N N shares do n't cost $ N or # N with <unk> and\\/or", None),
    (detokenizers.PTB, "workers ' pay", "workers' pay"),
    (detokenizers.LM1B, "\" Yes , \" he said ; it 's ( truly ) $ 5 , or £ 6 ? Go !", None),
    (detokenizers.LM1B, "See http : / / example.org / a . It ends here .", None),
    (detokenizers.LM1B, "A list : a , b ; [ c d ] and ' e f ' / g .", None),
    (detokenizers.LAMBADA, " “Hello” she said  \n", '\n"Hello" she said'),
]
EXPECTED = {
    1: 'the 1,000-year.5 (or so), it\'s "fine" .',
    3: "== History ==\nin 1 years at 3°C",
    4: "the company's 1 1 shares don't cost $1 or #1 with ? and/or",
    6: '"Yes," he said; it\'s (truly) $5, or £6? Go!',
    7: "See http://example.org/a. It ends here.",
    8: "A list: a, b; [c d] and 'e f'/g.",
}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_detokenizers_undo_the_tokenization(number):
    rules, text, expected = CASES[number]
    found = detokenizers.detokenizer(rules)(text)
    assert (found.strip() if number == 0 else found) == (expected or EXPECTED[number])


def test_the_protocol_wraps_documents_with_separators():
    tokenizer = make_tokenizer("byte")
    data = TextWindows(["ab", "cdé"], tokenizer, 3)
    stream = [97, 98, 0, 99, 100, 195, 169, 0]
    assert data.rows(np.arange(data.num_rows)).ravel().tolist() == stream[:6] and data.num_rows == 2
    assert data.bytes_per_token == 6 / 8
    assert TextWindows(["abcdefgh" * 10], tokenizer, 3, max_rows=5).rows(np.arange(5))[:, 0].size == 5
    with pytest.raises(UsageError, match="fewer than one window"):
        TextWindows(["a"], tokenizer, 3)


@pytest.fixture
def folder(tmp_path):
    """A stand-in of every set with its own column, the last two as parquet."""
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    for name, found in SETS.items():
        rows = [{found.column: text, "other": 1} for text in (f"{name} abc , cab .", "", "abc cba " * 5)]
        if name in ("arxiv", "pubmed"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        else:
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path)


def test_every_set_is_read_from_its_column_and_detokenized(folder):
    for name in SETS:
        texts = list(texts_of(name, folder))
        glued = name not in ("ptb", "ag_news", "lambada")
        assert len(texts) == 2 and f"{name} abc" in texts[0] and (" ," in texts[0]) != glued


def test_the_suite_reports_every_set_in_the_usual_keys(folder):
    letters = "".join(sorted(set("".join(f"{name} abc , cab .\n" for name in SETS))))
    inference = tiny(letters=letters)
    runtime = SimpleNamespace(mesh=SimpleNamespace(data_size=1, data_rank=0), is_first=True)
    found = evaluate_sets(inference, None, folder, 4, LikelihoodOptions(num_draws=4), runtime)
    assert list(found["sets"]) == list(SETS) and found["protocol"] == "wrap"
    for report in found["sets"].values():
        assert report["rows"] == 4 and report["tokens"] == 24 and math.isfinite(report["bits_per_byte"])
    one = evaluate_sets(inference, "ptb", folder, 4, LikelihoodOptions(num_draws=4), runtime)
    assert one["sets"]["ptb"] == found["sets"]["ptb"]


def test_what_is_not_there_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="it has: ptb"):
        chosen_sets("ptb,wikipedia")
    with pytest.raises(UsageError, match="no lambada.jsonl"):
        source_of("lambada", str(tmp_path / "elsewhere"))
    assert source_of("lambada", None).startswith("hf:")

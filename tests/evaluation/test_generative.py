"""Samples of both kinds of checkpoint, and the files they are read from."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from dlm_scale.errors import UsageError
from dlm_scale.evaluation import generative
from dlm_scale.evaluation.generative import (
    LEFT_TO_RIGHT,
    SamplingOptions,
    make_samples,
    read_samples,
    sweep,
    text_report,
    write_sweep,
)
from dlm_scale.evaluation.judges import ngram_judge
from dlm_scale.evaluation.likelihoods import LikelihoodOptions, sums_of_batch
from dlm_scale.parallel.mesh import Mesh

OPTIONS = SamplingOptions("ancestral", 4, 5, 6, seed=1, batch_size=2)


def test_samples_do_not_depend_on_the_batch(masked, autoregressive):
    for inference, options in ((masked, OPTIONS), (autoregressive, replace(OPTIONS, sampler=LEFT_TO_RIGHT))):
        one, other = (make_samples(inference, replace(options, batch_size=size)) for size in (1, 5))
        assert one == other and len({sample.text for sample in one}) > 1
        assert all(len(sample.tokens) == 6 == len(sample.text) for sample in one)


def test_data_parallel_ranks_share_the_samples(masked, monkeypatch):
    monkeypatch.setattr(generative, "gather_parts", lambda parts, mesh: parts)
    whole = make_samples(masked, OPTIONS)
    shares = [make_samples(masked, OPTIONS, Mesh(data_size=2, data_rank=rank)) for rank in range(2)]
    assert shares == [whole[:2] + whole[4:], whole[2:4]]


def test_left_to_right_draws_the_law_of_the_twin(autoregressive):
    """4096 rows of 3 tokens against the exact likelihood of each of the 64 rows."""
    options = SamplingOptions(LEFT_TO_RIGHT, 0, 4096, 3, seed=2, batch_size=4096)
    seen = Counter(tuple(sample.tokens) for sample in make_samples(autoregressive, options))
    x_XL = np.array(list(product(range(4), repeat=3)))
    sums = sums_of_batch(autoregressive, LikelihoodOptions())(x_XL, np.arange(64))
    expected = 4096 * np.exp(-sums.weighted_ce_RK[:, 0])
    observed, usual = np.array([seen[tuple(x)] for x in x_XL.tolist()]), expected > 5
    assert expected.sum() == pytest.approx(4096, rel=1e-5)
    observed, expected = (np.append(c[usual], c[~usual].sum() + 1e-9) for c in (observed, expected))
    chi_square, freedom = ((observed - expected) ** 2 / expected).sum(), observed.size - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_each_kind_has_its_own_samplers(masked, autoregressive):
    for inference, name in ((masked, LEFT_TO_RIGHT), (autoregressive, "ancestral")):
        with pytest.raises(UsageError, match="autoregressive"):
            make_samples(inference, replace(OPTIONS, sampler=name))


def judge_of(inference):
    return ngram_judge([inference.tokenizer.encode("abc abc cab")], inference.vocabulary.size)


def test_a_samples_file_gives_the_report_of_the_samples(masked, tmp_path):
    samples = make_samples(masked, OPTIONS)
    path = tmp_path / "samples.jsonl"
    lines = [{"id": i, "sample": 0, "text": s.text, "tokens": s.tokens, "nfe": s.nfe} for i, s in enumerate(samples)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    read = read_samples(str(path), masked.tokenizer)
    assert read == samples
    report = text_report(read, judge_of(masked))
    assert {"gen_ppl", "unigram_entropy", "distinct_1", "distinct_2", "distinct_4", "repetition_4"} <= report.keys()
    assert report["samples"] == 5 and report["nfe"] == sum(s.nfe for s in samples) / 5
    path.write_text(json.dumps({"text": "abc"}))
    assert read_samples(str(path), masked.tokenizer)[0].tokens == masked.tokenizer.encode("abc").tolist()


@pytest.mark.parametrize("content, words", [
    ("", "no sample"), ("{}", ":1: expected"), ('{"text": "a"}\nnonsense', ":2:"), ('{"text": 3}', ":1: expected"),
    ('{"text": "a", "tokens": [99]}', "ids below 5"), ('{"text": "a", "tokens": "b"}', "ids below 5"),
])  # fmt: skip
def test_a_bad_line_is_named(content, words, masked, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=words):
        read_samples(str(path), masked.tokenizer)


def test_a_sweep_is_one_picture_and_one_document(masked, tmp_path):
    said = []
    points = list(sweep(masked, judge_of(masked), ["ancestral", "entropy"], [1, 3], OPTIONS, said.append))
    assert [(p["sampler"], p["steps"]) for p in points] == [(s, n) for s in ("ancestral", "entropy") for n in (1, 3)]
    assert all(p["nfe"] <= p["steps"] and math.isfinite(p["gen_ppl"]) for p in points) and len(said) == 4
    write_sweep(tmp_path / "quality", {"points": points, "reference": None})
    assert json.loads((tmp_path / "quality.json").read_text())["points"] == points
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")

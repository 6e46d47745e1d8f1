"""The built-in corpora: the grammar's stated entropy against enumeration, the standard library's files."""

import ast
import gzip
import itertools
import math

import numpy as np
import pytest

from dlm_scale.data import corpora
from dlm_scale.data.compressed_baselines import baselines
from dlm_scale.data.corpora import grammar_source, grammar_text, stdlib_source
from dlm_scale.errors import UsageError

S = len(corpora.GRAMMAR_SYMBOLS)


def transition():
    matrix = np.zeros((S, S))
    for step, p in zip(corpora.GRAMMAR_STEPS, corpora.GRAMMAR_STEP_PROBABILITY, strict=True):
        matrix[np.arange(S), (np.arange(S) + step) % S] += p
    return matrix


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_block_entropy_against_enumeration(length):
    matrix, entropy = transition(), 0.0
    for word in itertools.product(range(S), repeat=length):
        p = 1 / S * math.prod(matrix[a, b] for a, b in itertools.pairwise(word))
        entropy -= p * math.log(p) if p else 0.0
    assert grammar_source().floor.per_token(length) == pytest.approx(entropy / length, rel=1e-12)


def test_the_text_follows_the_law_that_is_stated():
    n = 200_000
    states = np.array([corpora.GRAMMAR_SYMBOLS.index(c) for c in grammar_text(n, 1, 0)])
    log_p = np.log(transition()[states[:-1], states[1:]])
    assert np.isfinite(log_p).all()
    rate = grammar_source().floor.rate
    assert abs(-log_p.mean() - rate) < 4 * log_p.std() / math.sqrt(n)
    assert np.abs(np.bincount(states, minlength=S) / n - 1 / S).max() < 0.01


def test_the_first_letter_is_uniform_and_streams_differ():
    first = [grammar_text(1, seed, 0) for seed in range(60 * S)]
    counts = np.array([first.count(c) for c in corpora.GRAMMAR_SYMBOLS])
    assert ((counts - 60) ** 2 / 60).sum() < S - 1 + 4 * math.sqrt(2 * (S - 1))
    texts = {grammar_text(50, seed, number) for seed in (1, 2) for number in (0, 1)}
    assert len(texts) == 4
    assert grammar_text(50, 1, 0) == grammar_text(80, 1, 0)[:50]


def test_stdlib_takes_files_that_parse(tmp_path):
    for i in range(120):
        (tmp_path / f"m{i:03}.py").write_text(f"x = {i}\n")
    (tmp_path / "m000.py").write_text("x = = 1\n")
    (tmp_path / "m001.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "m002.py").write_bytes(b"x = 1\0\n")
    for folder in ("test", "pkg/tests", "site-packages"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "t.py").write_text("x = 1\n")
    source = stdlib_source(tmp_path)
    documents = list(source.documents())
    assert [d.key for d in documents] == [f"m{i:03}.py" for i in range(3, 120)]
    assert documents[0].text == "x = 3\n"
    assert source.description["files"] == 120


def test_stdlib_of_this_interpreter():
    documents = list(itertools.islice(stdlib_source().documents(), 20))
    assert len(documents) == 20 and all(ast.parse(d.text) for d in documents)


def test_stdlib_without_sources_says_so(tmp_path):
    with pytest.raises(UsageError, match="only 0 .py files"):
        stdlib_source(tmp_path)


def test_baselines():
    assert baselines(bytes(range(256)) * 4)["unigram_bits_per_byte"] == pytest.approx(8)
    assert baselines(b"ab" * 500)["unigram_bits_per_byte"] == pytest.approx(1)
    constant = baselines(b"a" * 10_000)
    assert constant["unigram_bits_per_byte"] == 0 and 0 < constant["gzip9_bits_per_byte"] < 0.1
    text = grammar_text(20_000, 1, 0).encode()
    found = baselines(text)
    assert found["gzip9_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert grammar_source().floor.rate / math.log(2) < found["xz_bits_per_byte"] < found["unigram_bits_per_byte"]
    with pytest.raises(UsageError, match="empty"):
        baselines(b"")

"""The shipped configs have the sizes that they are named after, and build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlm_scale.config import load_config
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.model.parameters import count_parameters, flops_per_token, parameter_table
from dlm_scale.model.transformer import Transformer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def vocabulary_of(config) -> Vocabulary:
    size = config.data.synthetic_vocab_size
    return Vocabulary(size, size - 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_on_the_meta_device(path):
    config = load_config(path)
    with torch.device("meta"):
        model = Transformer(config.model, vocabulary_of(config))
    table = parameter_table(config.model, vocabulary_of(config))
    for name, parameter in model.named_parameters():
        assert parameter.shape[1:] == table[name].shape[1:] and parameter.shape[0] >= table[name].shape[0]
    assert [n for n, _ in model.named_parameters()] == list(table)


# name, parameters as printed, training GFLOP a token as printed (docs/maths.md has the formula)
@pytest.mark.parametrize("stem, parameters, places, gflops", [
    ("owt_124m", 123.6e6, 0.06e6, 0.739), ("owt_350m", 360e6, 0.6e6, 2.306), ("llada_1b", 1439e6, 1e6, 8.92),
    ("llada_8b", 8015e6, 1e6, 49.9), ("dlm_70b", 70.6e9, 0.06e9, 478), ("modernbert_149m", 149.6e6, 0.06e6, None),
])
def test_sizes_are_the_published_ones(stem, parameters, places, gflops):
    config = load_config(next(p for p in CONFIGS if p.stem == stem))
    vocabulary = vocabulary_of(config)
    assert abs(count_parameters(config.model, vocabulary) - parameters) <= places
    if gflops is None:  # attention of many lengths
        return
    found = flops_per_token(config.model, vocabulary, attended_length=config.model.seq_len) / 1e9
    assert found == pytest.approx(gflops, rel=2e-3)


def test_the_tiny_reference_has_870144_parameters():
    config = load_config(next(p for p in CONFIGS if p.stem == "shakespeare_char_tiny"))
    assert count_parameters(config.model, Vocabulary(66, 65)) == 870_144

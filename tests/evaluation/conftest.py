"""Checkpoints in memory: a transformer of a few thousand weights over the characters `abc `, with nothing on disk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dlm_scale.config import config_from_dict
from dlm_scale.data.tokenizer import make_tokenizer
from dlm_scale.inference import Inference
from tests.model.test_model import made, randomised

LENGTH = 6


def tiny(kind: str = "masked", letters: str = "abc ", seed: int = 3) -> Inference:
    tokenizer = make_tokenizer("char", [letters])
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_len": LENGTH}
    config = config_from_dict({
        "model": shape, "objective": {"kind": kind}, "data": {"train": "none"},
        "train": {"global_batch_size": 1, "micro_batch_size": 1, "num_steps": 1, "out": "none"},
        "optimizer": {"learning_rate": 1e-3},
    })  # fmt: skip
    model = randomised(made(tokenizer.vocabulary, seed, **shape)).eval()
    with torch.no_grad():
        model.head.weight *= 4.0  # far from uniform
    checkpoint = SimpleNamespace(path=f"tiny-{kind}", state={"step": 7})
    return Inference(model, config, tokenizer.meta, tokenizer, torch.device("cpu"), checkpoint, "param")


@pytest.fixture(scope="session")
def masked() -> Inference:
    return tiny()


@pytest.fixture(scope="session")
def autoregressive() -> Inference:
    return tiny("autoregressive")

"""A small run with its dataset, as `dlm train` leaves it, and what makes checkpoints of other shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.writer import write_checkpoint
from dlm_scale.config import Config, dump_config
from dlm_scale.convert.source import plain_config
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.data.tokenizer import Tokenizer, make_tokenizer
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box
from tests.faults.specimen import Specimen, make_specimen

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "seq_len": 24}


@pytest.fixture(scope="session")
def specimen(tmp_path_factory) -> Specimen:
    torch.set_num_threads(1)
    return make_specimen(tmp_path_factory.mktemp("specimen"))


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(**changes of the shape): a folder with random weights, EMA and one optimizer slot."""

    def make(tokenizer: Tokenizer | None = None, name: str = "run", **changes) -> Path:
        tokenizer = tokenizer or make_tokenizer("byte")
        config = plain_config({**SHAPE, **changes}, "a test")
        return write_random(tmp_path / name, config, tokenizer)

    return make


def write_random(run: Path, config: Config, tokenizer: Tokenizer) -> Path:
    generator, pieces = torch.Generator().manual_seed(7), []
    for spec in parameter_table(config.model, tokenizer.vocabulary).values():
        for slot in ("param", "ema", "exp_avg"):
            values = 0.3 * torch.randn(spec.numel, generator=generator) + (spec.name.endswith("gain"))
            pieces.append(Piece(spec.name, slot, spec.shape, spec.view, full_box(spec.view), 0, values))
    state = {"step": 3, "samples": 12, "tokens": 99, "data_fingerprint": "0" * 32}
    documents = {
        "config.yaml": dump_config(config).encode(),
        "state.json": json.dumps(state).encode(),
        TOKENIZER_DOCUMENT: json.dumps(tokenizer.meta.tokenizer_dict()).encode(),
        "provenance.json": b"{}",
        **tokenizer.files,
    }
    run.mkdir()
    return write_checkpoint(
        run, 3, pieces, rank=0, world_size=1, gather=lambda value: [value], documents=documents, keep_last=1
    )

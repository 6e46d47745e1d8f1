"""A small run as `dlm train` leaves it, made without an engine: a dataset, a config, and two checkpoints of two ranks."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.writer import write_checkpoint
from dlm_scale.config import dump_config, load_config
from dlm_scale.data.loader import open_data
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.data.prepare import prepare
from dlm_scale.model.initialise import initial_values
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box

STEPS, RANKS = (1, 2), 2
TEXT = "the quick brown fox jumps over the lazy dog; \n" * 200
CONFIG = """
model: {{num_layers: 2, hidden_size: 32, num_heads: 4, seq_len: 16}}
data: {{train: {folder}/data/train, validation: {folder}/data/val}}
train: {{global_batch_size: 8, micro_batch_size: 4, num_steps: 12, precision: fp32, out: {folder}/run}}
optimizer: {{learning_rate: 1e-2}}
"""


@dataclass(frozen=True)
class Specimen:
    """`config` is its YAML file, `run` the run folder, `prefix` the training split."""

    config: Path
    run: Path
    prefix: Path

    def checkpoint(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step_{step:08d}"


def make_specimen(folder: Path, more: str = "", noise: float = 0.0) -> Specimen:
    """All of it below `folder`. `more`: further YAML of the config; `noise`: standard deviation of what is added to the
    initial weights, whose output table is zero."""
    (folder / "text.txt").write_text(TEXT)
    prepare([str(folder / "text.txt")], "char", folder / "data")
    made = Specimen(folder / "config.yaml", folder / "run", folder / "data" / "train")
    made.config.write_text(CONFIG.format(folder=folder) + more)
    config = load_config(made.config)
    data = open_data(str(made.prefix), config.model.seq_len, config.train.seed)
    for step in STEPS:
        documents = {
            "config.yaml": dump_config(config).encode(),
            TOKENIZER_DOCUMENT: json.dumps(data.tokenizer_meta.tokenizer_dict()).encode(),
            "characters.json": (folder / "data" / "characters.json").read_bytes(),
            "provenance.json": b'{"dlm_scale": "0"}\n',
            "state.json": json.dumps({"step": step, "samples": 8 * step, "tokens": 128 * step,
                                      "data_fingerprint": data.fingerprint}).encode(),
        }
        _save(made.run, step, parameter_table(config.model, data.vocabulary), documents, noise)
    return made


def _save(run: Path, step: int, table: dict, documents: dict[str, bytes], noise: float) -> None:
    barrier, everyone, failures = threading.Barrier(RANKS, timeout=60), [None] * RANKS, []

    def work(rank: int) -> None:
        def gather(value):
            everyone[rank] = value
            barrier.wait()
            values = list(everyone)
            barrier.wait()
            return values

        try:
            write_checkpoint(run, step, _halves(table, step, rank, noise), rank=rank, world_size=RANKS, gather=gather,
                             documents=documents, keep_last=len(STEPS))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _halves(table: dict, step: int, rank: int, noise: float) -> list[Piece]:
    """The half of every parameter, and of its moment, that this rank owns."""
    made = []
    for name, spec in table.items():
        bounds = [0, spec.numel // 2, spec.numel]
        start, numel = bounds[rank], bounds[rank + 1] - bounds[rank]
        where = step, full_box(spec.view), start, numel
        values = torch.from_numpy(initial_values(spec, *where).astype(np.float32))
        if noise:
            values += torch.from_numpy(initial_values(replace(spec, init_std=noise), *where))
        for slot, tensor in (("param", values), ("exp_avg", values + step)):
            made.append(Piece(name, slot, spec.shape, spec.view, full_box(spec.view), start, tensor))
    return made

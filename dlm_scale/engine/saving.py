"""Checkpoints of a running engine: what goes in, and how training goes on from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dlm_scale.checkpoint.writer import write_checkpoint
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.state_access import zero_slot_source
from dlm_scale.model.initialise import initial_values


def all_gather_object(value: Any) -> list[Any]:
    """`value` of every rank of the world, in rank order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def save(trainer: Trainer, state: TrainState, run: Path, documents: dict[str, bytes], fingerprint: str) -> Path:
    """Write the whole training state as RUN/checkpoints/step_N; returns that folder. Collective.

    `documents` are small files that make the checkpoint self-contained (config, dataset meta, tokenizer).
    """
    train, env = trainer.config.train, trainer.runtime.env
    return write_checkpoint(
        run,
        state.step,
        trainer.state_access.pieces(),
        rank=env.rank,
        world_size=env.world_size,
        gather=all_gather_object,
        documents=documents | {"state.json": state_document(trainer, state, fingerprint)},
        keep_last=train.keep_last,
        keep_every=train.keep_every,
    )


def state_document(trainer: Trainer, state: TrainState, fingerprint: str) -> bytes:
    """state.json: where the run stands, and which tokens it reads."""
    tokens = state.samples * trainer.config.model.seq_len
    return (json.dumps(state.as_dict() | {"tokens": tokens, "data_fingerprint": fingerprint}, indent=1) + "\n").encode()


def tokenizer_documents(data: Any) -> dict[str, bytes]:
    """The vocabulary and the tokenizer's files: with them a checkpoint needs neither dataset nor network."""
    meta = data.tokenizer_meta
    files = {name: (data.folder / name).read_bytes() for name in meta.tokenizer.files}
    return {TOKENIZER_DOCUMENT: (json.dumps(meta.tokenizer_dict(), indent=1) + "\n").encode(), **files}


def start_fresh(trainer: Trainer) -> TrainState:
    """Weights from the seed, empty optimizer."""
    seed = trainer.config.train.seed

    def initial(spec, box, start, numel):
        return torch.from_numpy(initial_values(spec, seed, box, start, numel))

    trainer.state_access.fill(zero_slot_source(initial), step=0)
    return TrainState()


def restore(trainer: Trainer, checkpoint: Any) -> TrainState:
    """Weights, optimizer and average from an opened checkpoint of any layout, one tensor at a time."""
    state = TrainState(checkpoint.state["step"], checkpoint.state["samples"])

    def source(spec, slot, box, start, numel):
        return checkpoint.read_flat(spec.name, slot, box, start, numel)

    trainer.state_access.fill(source, state.step)
    return state

"""Checkpoints of a running engine: what goes in, and how training goes on from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dlm_scale.checkpoint.writer import Save, plan_save, stage, write_staged
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.state_access import zero_slot_source
from dlm_scale.model.initialise import initial_values


def all_gather_object(value: Any, group: Any = None) -> list[Any]:
    """`value` of every rank of the world, in rank order. `group` has all ranks; default: the world's own."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def describe_save(trainer: Trainer, state: TrainState, run: Path, documents: dict[str, bytes], fingerprint: str,
                  gather: Callable[[Any], list] = all_gather_object) -> Save:
    """The save of the whole training state as RUN/checkpoints/step_N.

    `documents` are small files that make the checkpoint self-contained (config, dataset meta, tokenizer).
    """
    train, env = trainer.config.train, trainer.runtime.env
    documents = documents | {"state.json": state_document(trainer, state, fingerprint)}
    return Save(run, state.step, env.rank, env.world_size, gather, documents, train.keep_last, train.keep_every)


def save(trainer: Trainer, state: TrainState, run: Path, documents: dict[str, bytes], fingerprint: str) -> Path:
    """Write the whole training state before anything else; returns its folder. Collective. Raises CheckpointError."""
    described = describe_save(trainer, state, run, documents, fingerprint)
    plan = plan_save(described, trainer.state_access.pieces())
    return write_staged(described, plan, stage(plan))


def state_document(trainer: Trainer, state: TrainState, fingerprint: str) -> bytes:
    """state.json: where the run stands, and which tokens it reads."""
    tokens = state.samples * trainer.config.model.seq_len
    return (json.dumps(state.as_dict() | {"tokens": tokens, "data_fingerprint": fingerprint}, indent=1) + "\n").encode()


def tokenizer_documents(data: Any) -> dict[str, bytes]:
    """The vocabulary and the tokenizer's files: with them a checkpoint needs neither dataset nor network."""
    meta = data.tokenizer_meta
    files = {name: (data.folder / name).read_bytes() for name in meta.tokenizer.files}
    return {TOKENIZER_DOCUMENT: (json.dumps(meta.tokenizer_dict(), indent=1) + "\n").encode(), **files}


def start_fresh(trainer: Trainer, origin: Callable | None = None) -> TrainState:
    """Weights from the seed, or from `origin(spec, box, start, numel)` (warm_start.py); empty optimizer."""
    seed = trainer.config.train.seed

    def initial(spec, box, start, numel):
        return torch.from_numpy(initial_values(spec, seed, box, start, numel))

    trainer.state_access.fill(zero_slot_source(origin or initial), step=0)
    return TrainState()


def restore(trainer: Trainer, checkpoint: Any) -> TrainState:
    """Weights, optimizer and average from an opened checkpoint of any layout, one tensor at a time."""
    state = TrainState(checkpoint.state["step"], checkpoint.state["samples"])

    def source(spec, slot, box, start, numel):
        if slot == "ema" and (spec.name, slot) not in checkpoint.tensors:  # a branch that starts to average
            slot = "param"
        return checkpoint.read_flat(spec.name, slot, box, start, numel)

    trainer.state_access.fill(source, state.step)
    return state

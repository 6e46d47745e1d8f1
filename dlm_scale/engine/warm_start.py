"""Starting from another model's weights: any checkpoint of the same shape, one of an autoregressive model too
(`tools/convert_checkpoint.py` makes it). Vocabulary tables may have other rows: new ones start as the mean of the
old. Heads beside the output table may be missing there: they start as in a new model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dlm_scale.checkpoint.reader import Checkpoint, open_checkpoint
from dlm_scale.config import config_from_text
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.errors import UsageError
from dlm_scale.model.initialise import initial_values
from dlm_scale.model.parameters import EXTRA_HEADS, ParameterSpec, parameter_table
from dlm_scale.model.sharding import Box

FREE = {"init_from", "init_std", "logit_shift", "seq_len", "logit_softcap", "rope_base", "window"}  # no tensor's shape
ADDED = {"critic", "sampler_head", "labels", "score"}  # heads that may be new
MEAN_ROWS = 4096  # of a table at a time


def open_origin(path: Path, config: Any, data: Any) -> Callable[[ParameterSpec, Box, int, int], torch.Tensor]:
    """initial(spec, box, start, numel): elements of a box of the weights (the average, if there is one) in `path`.

    Raises UsageError where they are of another shape or another tokenizer than this run's.
    """
    checkpoint = open_checkpoint(path, verify=False)  # inspected just now
    old = config_from_text(checkpoint.document("config.yaml").decode(), f"{path}/config.yaml")
    _check(checkpoint, old.model, config.model, data.tokenizer_meta)
    slot = "ema" if any(found == "ema" for _, found in checkpoint.tensors) else "param"
    mean = lru_cache(maxsize=None)(lambda name: mean_row(checkpoint, name, slot))

    def initial(spec: ParameterSpec, box: Box, start: int, numel: int) -> torch.Tensor:
        if (spec.name, slot) not in checkpoint.tensors:
            return torch.from_numpy(initial_values(spec, config.train.seed, box, start, numel))
        stored = tuple(checkpoint.tensors[spec.name, slot].shape)
        if stored == spec.shape:
            return checkpoint.read_flat(spec.name, slot, box, start, numel, view=spec.view)
        return _rows(checkpoint, spec, slot, box[0][0] * math.prod(spec.shape[1:]) + start, numel, mean)

    return initial


def _rows(
    checkpoint: Checkpoint, spec: ParameterSpec, slot: str, start: int, numel: int, mean: Callable
) -> torch.Tensor:
    """Elements [start, start + numel) of a table whose rows are other than those stored."""
    stored = checkpoint.tensors[spec.name, slot].shape
    known = max(0, min(numel, math.prod(stored) - start))
    whole = tuple((0, size) for size in stored)
    out = torch.empty(numel)
    if known:
        out[:known] = checkpoint.read_flat(spec.name, slot, whole, start, known, view=stored)
    if known < numel:
        row = mean(spec.name).reshape(-1)
        out[known:] = row[torch.arange(start + known, start + numel) % row.numel()]
    return out


def mean_row(checkpoint: Checkpoint, name: str, slot: str) -> torch.Tensor:
    """Mean over the first dimension of a stored tensor, some rows at a time."""
    shape, total = tuple(checkpoint.tensors[name, slot].shape), 0.0
    for low in range(0, shape[0], MEAN_ROWS):
        box = ((low, min(shape[0], low + MEAN_ROWS)), *((0, size) for size in shape[1:]))
        total = total + checkpoint.read(name, slot, box, view=shape).double().sum(0)
    return (total / shape[0]).float()


def _check(checkpoint: Checkpoint, old: Any, new: Any, meta: Any) -> None:
    where = f"model.init_from: {checkpoint.path}"
    before, after = old.model_dump(), new.model_dump()
    wrong = [f"model.{key}={value} is needed, not {after[key]}" for key, value in before.items()
             if key not in FREE | ADDED and after[key] != value]  # fmt: skip
    if new.position == "learned" and new.seq_len > old.seq_len:
        wrong.append(f"model.seq_len={old.seq_len} at most, for it has no more positions")
    if wrong:
        raise UsageError(f"{where} is of another shape: {'; '.join(wrong)}")
    theirs = json.loads(checkpoint.document(TOKENIZER_DOCUMENT))
    ours = json.loads(json.dumps(meta.tokenizer_dict()))
    if theirs["tokenizer"]["kind"] != "none" and theirs != ours:
        raise UsageError(f"{where} has another tokenizer than data.train: prepare the data with the files of that"
                         " checkpoint, or convert it with --mask_id if you know that the ids mean the same")  # fmt: skip
    for name, spec in parameter_table(new, meta.vocabulary).items():
        have = tuple(checkpoint.tensors[name, "param"].shape) if (name, "param") in checkpoint.tensors else None
        if have is None and name.startswith(EXTRA_HEADS):
            continue
        is_table = have is not None and (spec.is_table or name in ("head.bias", "positions.weight"))
        if have != spec.shape and not (is_table and have[1:] == spec.shape[1:]):
            raise UsageError(f"{where}: tensor {name} has shape {have}, not {spec.shape}")
        if have != spec.shape:
            change = (
                f"{spec.shape[0] - have[0]} new, the mean of the others"
                if spec.shape[0] > have[0]
                else "the first of them"
            )
            logging.getLogger(__name__).warning(
                "model.init_from: %s has %d rows there, %d here (%s)", name, have[0], spec.shape[0], change
            )

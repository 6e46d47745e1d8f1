"""DeepSpeed's own checkpoints, ZeRO 1 to 3, as tensors in files: the float32 master weights, put together from the
parts of all ranks without loading them.

    FOLDER/latest                                            names the tag
    FOLDER/TAG/*mp_rank_00_model_states.pt                   shapes and names; buffers; frozen parameters
    FOLDER/TAG/*zero_pp_rank_R_mp_rank_00_optim_states.pt    rank R's part of the master weights
"""

from __future__ import annotations

import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

from dlm_scale.checkpoint.files import read_file
from dlm_scale.checkpoint.layout import DTYPES
from dlm_scale.convert.stores import Store, Stored, cut_runs
from dlm_scale.convert.torch_files import read_torch_file
from dlm_scale.errors import UsageError

OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
F32_BYTES = 4


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is one of DeepSpeed's checkpoints, or holds some."""
    return path.is_dir() and ((path / "latest").is_file() or bool(_files(path, OPTIMIZER_FILE)))


def deepspeed_store(path: Path) -> Store:
    """The weights of a checkpoint. Raises UsageError, also where its tensors do not add up."""
    folder = _tag_folder(path)
    optimizer_files, model_files = _files(folder, OPTIMIZER_FILE), _files(folder, MODEL_FILE)
    if not optimizer_files or not model_files:
        raise UsageError(f"{folder} lacks {'optim' if not optimizer_files else 'model'}_states.pt files: no ZeRO"
                         " checkpoint, or not all of it")  # fmt: skip
    if {place[1] for place in (*optimizer_files, *model_files)} != {0}:
        raise UsageError(
            f"{folder} was written by a tensor-parallel run: how its matrices were cut is not in the file."
            " Gather them with the program that wrote it"
        )
    optimizers = [_section(file, "optimizer_state_dict") for _, file in sorted(optimizer_files.items())]
    stage, num_ranks = optimizers[0].get("zero_stage"), optimizers[0].get("partition_count")
    num_ranks = max(num_ranks) if isinstance(num_ranks, list) else num_ranks
    if num_ranks != len(optimizers):
        raise UsageError(
            f"{folder} holds the parts of {len(optimizers)} ranks, {num_ranks} wrote it: copy the others too"
        )
    models = [_section(file) for _, file in sorted(model_files.items())]
    try:
        return _store(folder, stage, optimizers, models)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UsageError(
            f"{folder}: a ZeRO checkpoint of a form that is not known ({type(error).__name__}: {error})"
        ) from None


def _store(folder: Path, stage: Any, optimizers: list[dict], models: list[dict]) -> Store:
    first = models[0]
    names = set(first["buffer_names"])
    tensors = {name: value for name, value in first["module"].items() if name in names}
    frozen = first.get("frozen_param_shapes") or {}
    for name, shape in frozen.items():
        parts = [model["frozen_param_fragments"][name] for model in (models if stage == 3 else models[:1])]
        tensors[name] = _joined(parts[0].dtype, shape, chain.from_iterable(part.runs for part in parts))
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = [[_float32(group) for group in optimizer[key]] for optimizer in optimizers]
    tensors |= (
        _sharded(first["param_shapes"], groups)
        if stage == 3
        else _partitioned(first["param_shapes"], groups, optimizers[0].get("param_alignment_paddings"))
    )
    shared = {alias: name for alias, name in first["shared_params"].items() if name in tensors and alias != name}
    for alias in shared.keys() & tensors.keys():
        del tensors[alias]
    return Store(folder, tensors, shared)


def _partitioned(shapes: list[dict], groups: list[list[Stored]], paddings: Any) -> dict[str, Stored]:
    """ZeRO 1 and 2: each parameter group is one flat vector, which the ranks share out."""
    tensors: dict[str, Stored] = {}
    for number, group_shapes in enumerate(shapes):
        runs, offset = [run for rank in groups for run in rank[number].runs], 0
        for place, (name, shape) in enumerate(group_shapes.items()):
            tensors[name] = _joined("float32", shape, cut_runs(runs, F32_BYTES, offset, math.prod(shape)))
            offset += math.prod(shape) + (paddings[number][place] if paddings else 0)
        _require_full(offset, sum(run.numel for run in runs), 2 * len(groups))
    return tensors


def _sharded(shapes: list[dict], groups: list[list[Stored]]) -> dict[str, Stored]:
    """ZeRO 3: each parameter is cut into equal parts, the last one padded; a rank's parts stand one after the other."""
    tensors: dict[str, Stored] = {}
    runs, offset = [[run for group in rank for run in group.runs] for rank in groups], 0
    for name, shape in chain.from_iterable(part.items() for part in shapes):
        share = -(-math.prod(shape) // len(groups))
        parts = list(chain.from_iterable(cut_runs(rank, F32_BYTES, offset, share) for rank in runs))
        tensors[name] = _joined("float32", shape, cut_runs(parts, F32_BYTES, 0, math.prod(shape)))
        offset += share
    _require_full(offset, sum(run.numel for run in runs[0]), 2)
    return tensors


def _require_full(used: int, available: int, unit: int) -> None:
    """Both agree but for padding to `unit`."""
    if -(-used // unit) != -(-available // unit):
        raise ValueError(f"its parameters have {used} elements, its parts {available}")


def _joined(dtype: str, shape: Any, runs: Any) -> Stored:
    runs, shape = tuple(runs), tuple(shape)
    cut = tuple(cut_runs(runs, DTYPES[dtype][1], 0, math.prod(shape)))
    if sum(run.numel for run in cut) != math.prod(shape):
        raise ValueError(f"a tensor of shape {shape} is not whole")
    return Stored(dtype, shape, cut)


def _float32(group: Stored) -> Stored:
    if group.dtype != "float32" or len(group.shape) != 1:
        raise ValueError("master weights that are not flat float32")
    return group


def _section(file: Path, key: str | None = None) -> dict[str, Any]:
    value = read_torch_file(file)
    value = value.get(key) if key and isinstance(value, dict) else value
    if not isinstance(value, dict):
        raise UsageError(f"{file}: holds no {key or 'model'} state of DeepSpeed")
    return value


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    """(data rank, model rank) -> file."""
    found = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {(int(match[1] or 0), int(match[2])): path for match, path in found if match}


def _tag_folder(path: Path) -> Path:
    if not (path / "latest").exists():
        return path
    tag = read_file(path / "latest", 4096).decode(errors="replace").strip()
    if not TAG.fullmatch(tag) or not (path / tag).is_dir():
        raise UsageError(
            f"{path}/latest names {tag[:80]!r}, which is no folder there: name the checkpoint's folder itself"
        )
    return path / tag

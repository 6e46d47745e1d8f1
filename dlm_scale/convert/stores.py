"""Tensors as they lie in files: where the bytes of each are, whatever the format, and how to read them in order."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from dlm_scale.checkpoint.files import CHUNK_BYTES, load_json, open_regular, read_at, read_file, read_into
from dlm_scale.checkpoint.layout import DTYPES
from dlm_scale.checkpoint.safetensors_format import read_header
from dlm_scale.errors import UsageError

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
MAX_JSON_BYTES = 64 << 20


class Run(NamedTuple):
    """`numel` elements that lie one behind the other from byte `offset` of a file."""

    path: Path
    offset: int
    numel: int


@dataclass(frozen=True)
class Stored:
    """A tensor: its runs, one after the other, are its elements in row-major order. `dtype` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Store:
    """All tensors of a model by name. `aliases`: further names of some of them (tied weights)."""

    path: Path
    tensors: dict[str, Stored]
    aliases: dict[str, str] = field(default_factory=dict)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole of a tensor, converted chunk by chunk. Raises UsageError where it is absent or a file too short."""
        stored = self.tensors.get(self.aliases.get(name, name))
        if stored is None:
            raise UsageError(f"{self.path} holds no tensor {name}")
        out = torch.empty(stored.numel, dtype=dtype or getattr(torch, stored.dtype))
        done = 0
        for run in stored.runs:
            _read_run(run, stored.dtype, out[done : done + run.numel])
            done += run.numel
        return out.view(stored.shape)


def _read_run(run: Run, dtype: str, target: torch.Tensor) -> None:
    item_size = DTYPES[dtype][1]
    with open_regular(run.path) as fd:
        if str(target.dtype) == f"torch.{dtype}" and run.numel:
            read_into(fd, run.offset, memoryview(target.view(torch.uint8).numpy()), run.path.name)
            return
        for start in range(0, run.numel, CHUNK_BYTES // item_size):
            part = target[start : start + CHUNK_BYTES // item_size]
            data = read_at(fd, run.offset + start * item_size, part.numel() * item_size, run.path.name)
            part.copy_(torch.frombuffer(data, dtype=getattr(torch, dtype)))


def cut_runs(runs: Iterable[Run], item_size: int, start: int, numel: int) -> list[Run]:
    """Elements [start, start + numel) of what `runs` hold one after the other, as runs."""
    found, offset = [], 0
    for run in runs:
        low, high = max(start, offset), min(start + numel, offset + run.numel)
        if low < high:
            found.append(Run(run.path, run.offset + (low - offset) * item_size, high - low))
        offset += run.numel
    return found


def read_json_file(path: Path) -> dict:
    """An object from a JSON file. Raises UsageError."""
    value = load_json(read_file(path, MAX_JSON_BYTES), str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a JSON object")
    return value


def safetensors_store(path: Path) -> Store:
    """A .safetensors file, or a folder with one or with several and their index. Raises UsageError."""
    files = [path] if path.is_file() else _listed(path)
    tensors: dict[str, Stored] = {}
    for file in files:
        with open_regular(file) as fd:
            for name, entry in read_header(fd, file.name, num_dims=None).items():
                if name in tensors:
                    raise UsageError(f"{path}: tensor {name} stands in two files")
                tensors[name] = Stored(entry.dtype, entry.shape, (Run(file, entry.offset, entry.numel),))
    return Store(path, tensors)


def _listed(folder: Path) -> list[Path]:
    """The files that a folder's index names, checked against what they hold."""
    if not (folder / INDEX_NAME).exists():
        return [folder / SINGLE_NAME]
    weight_map = read_json_file(folder / INDEX_NAME).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    if not all(isinstance(name, str) and os.path.basename(name) == name for name in names):
        raise UsageError(f"{folder / INDEX_NAME}: its weight_map does not name files of this folder")
    files = [folder / name for name in sorted(names)]
    found = {}
    for file in files:
        with open_regular(file) as fd:
            found |= dict.fromkeys(read_header(fd, file.name, num_dims=None), file.name)
    wrong = [name for name in {*weight_map, *found} if weight_map.get(name) != found.get(name)]
    if wrong:
        raise UsageError(
            f"{folder}: {INDEX_NAME} and the files disagree on {sorted(wrong)[:3]} ({len(wrong)} tensors): "
            "a file is missing or of another model; fetch the folder again"
        )
    return files

"""How the tensors of another program's model lie in ours: a table of rows, read in both directions.

A row is (our name, their names, how), `{}` standing for the number of a block in both. What is no parameter of the
model at hand (a bias, a head of its own) is passed over, so one table serves all variants of a family.

    same         one tensor of the same layout
    transposed   one matrix, stored [in, out]
    qkv          three tensors: queries, keys, values                        (ours: grouped by key/value head)
    fused        one tensor with queries, keys, values one below the other; fused_transposed: stored [in, out]
    gate_up      two tensors: gate, up                                       (ours: one below the other)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dlm_scale.checkpoint.layout import Box, extents, relative_slices, volume
from dlm_scale.convert.stores import Store
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import ParameterSpec
from dlm_scale.model.sharding import full_box

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Match:
    """Tensor `theirs`, of `shape` as stored, is the boxes of our tensor's view one below the other."""

    theirs: str
    ours: str
    boxes: tuple[Box, ...]
    shape: tuple[int, ...]
    is_transposed: bool = False


def match_tensors(rows: Iterable[Row], table: dict[str, ParameterSpec], num_layers: int) -> list[Match]:
    """Every tensor of theirs that the model needs, in the order of the table. Raises UsageError for a parameter of ours
    that no row names."""
    found: dict[str, list[Match]] = {}
    for ours, theirs, how in rows:
        for layer in range(num_layers) if "{}" in ours else (0,):
            name = ours.format(layer)
            if name in table:
                found[name] = _matches(table[name], theirs.format(layer, layer, layer).split(), how)
    missing = [name for name in table if name not in found]
    if missing:
        raise UsageError(
            f"this family has no place for {missing[0]} ({len(missing)} parameters of the model): a model of "
            "this shape cannot be converted to it"
        )
    return [match for name in table for match in found[name]]


def _matches(spec: ParameterSpec, theirs: list[str], how: str) -> list[Match]:
    parts = _parts(spec, how)
    if how.startswith("fused"):
        parts = [tuple(box for part in parts for box in part)]
    tail = spec.shape[1:]
    shapes = [(sum(map(volume, boxes)) // math.prod(tail), *tail) for boxes in parts]
    is_transposed = how.endswith("transposed") and len(spec.shape) == 2
    if is_transposed:
        shapes = [shape[::-1] for shape in shapes]
    pairs = zip(theirs, parts, shapes, strict=True)
    return [Match(name, spec.name, boxes, shape, is_transposed) for name, boxes, shape in pairs]


def _parts(spec: ParameterSpec, how: str) -> list[tuple[Box, ...]]:
    """The boxes of each of the tensors, or of each of the three parts of a fused one."""
    whole = full_box(spec.view)
    if how in ("same", "transposed"):
        return [(whole,)]
    dim, cuts = (1, (0, -2, -1, None)) if how in ("qkv", "fused", "fused_transposed") else (0, (0, 1, None))
    if how == "gate_up" and len(spec.view) == 1:  # a bias
        half = spec.view[0] // 2
        return [(((0, half),),), (((half, 2 * half),),)]
    size = spec.view[dim]
    bounds = [size if cut is None else cut % size if cut < 0 else cut for cut in cuts]
    return [((*whole[:dim], (low, high), *whole[dim + 1 :]),) for low, high in zip(bounds, bounds[1:])]


def read_ours(store: Store, matches: list[Match], spec: ParameterSpec, dtype: torch.dtype) -> torch.Tensor:
    """Our tensor, put together from theirs (`matches`: all that belong to it)."""
    if len(matches) == 1 and len(matches[0].boxes) == 1 and not matches[0].is_transposed:
        return store.read(matches[0].theirs, dtype).view(spec.shape)
    out = torch.empty(spec.view, dtype=dtype)
    for match in matches:
        values = store.read(match.theirs, dtype)
        values, done = (values.T.contiguous() if match.is_transposed else values).view(-1), 0
        for box in match.boxes:
            size = volume(box)
            out[relative_slices(box, full_box(spec.view))] = values[done : done + size].view(extents(box))
            done += size
    return out.view(spec.shape)


def check_store(store: Store, matches: list[Match], ignored: Iterable[str], where: str) -> None:
    """Raises UsageError, naming tensors, unless the store holds exactly what is matched, in its shapes, as floats."""
    wanted = {match.theirs: match.shape for match in matches}
    missing = [name for name in wanted if name not in store.tensors and name not in store.aliases]
    extra = [name for name in store.tensors if name not in wanted and name not in set(ignored)]
    if missing:
        raise UsageError(
            f"{where}: tensor {missing[0]} is missing ({len(missing)} are): the file is of another model than "
            "its config.json, or not all of it is here"
        )
    if extra:
        raise UsageError(
            f"{where}: there is no place for tensor {extra[0]} {list(store.tensors[extra[0]].shape)} "
            f"({len(extra)} in all): a part that our models do not have"
        )
    for name, shape in wanted.items():
        stored = store.tensors[store.aliases.get(name, name)]
        if stored.shape != shape:
            raise UsageError(
                f"{where}: tensor {name} has shape {list(stored.shape)}, its config.json makes it {list(shape)}"
            )
        if stored.dtype not in ("float32", "float64", "bfloat16", "float16"):
            raise UsageError(f"{where}: tensor {name} is {stored.dtype}: quantised weights are not converted")

"""Which part of each logical tensor a tensor-parallel rank holds: pure geometry, in the coordinates of its view."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from dlm_scale.model.parameters import ParameterSpec

Box = tuple[tuple[int, int], ...]


def full_box(view: tuple[int, ...]) -> Box:
    """The whole of a tensor as a box."""
    return tuple((0, size) for size in view)


def box_numel(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


@dataclass(frozen=True)
class LocalBox:
    """A box that a rank holds; exactly one of the ranks that hold it counts (and saves) it."""

    box: Box
    is_counted: bool

    @property
    def numel(self) -> int:
        return box_numel(self.box)


def local_boxes(spec: ParameterSpec, rank: int, size: int, local_rows: int) -> list[LocalBox]:
    """The boxes whose flattened concatenation is the local tensor of tensor-parallel rank `rank` of `size`.

    `local_rows`: rows of the local tensor, which tell the padding of vocabulary tables (padding lies at their end).
    """
    if spec.shard_dim is None:
        return [LocalBox(full_box(spec.view), rank == 0)]
    if spec.is_grouped and spec.view[0] < size:
        return _shared_group(spec.view, rank, size)
    whole = spec.view[spec.shard_dim]
    part = local_rows if spec.is_table else whole // size
    bounds = (min(whole, rank * part), min(whole, (rank + 1) * part))
    return [LocalBox(_narrowed(spec.view, {spec.shard_dim: bounds}), True)]


def _shared_group(view: tuple[int, ...], rank: int, size: int) -> list[LocalBox]:
    """Fewer key/value heads than ranks: a rank has a share of its group's queries, and the whole key and value."""
    ranks_per_group = size // view[0]
    group, place = divmod(rank, ranks_per_group)
    queries = view[1] - 2
    share = queries // ranks_per_group
    own_queries = {0: (group, group + 1), 1: (place * share, (place + 1) * share)}
    key_value = {0: (group, group + 1), 1: (queries, queries + 2)}
    return [LocalBox(_narrowed(view, own_queries), True), LocalBox(_narrowed(view, key_value), place == 0)]


def _narrowed(view: tuple[int, ...], bounds: dict[int, tuple[int, int]]) -> Box:
    return tuple(bounds.get(dim, (0, size)) for dim, size in enumerate(view))


def split_range(boxes: list[LocalBox], start: int, stop: int) -> Iterator[tuple[LocalBox, int, int]]:
    """(box, low, high) for each box that elements [start, stop) of the local tensor touch: its elements [low, high).

    What lies beyond the last box is padding, and left out.
    """
    offset = 0
    for item in boxes:
        low, high = max(start, offset), min(stop, offset + item.numel)
        if low < high:
            yield item, low - offset, high - offset
        offset += item.numel


def contiguous_runs(view: tuple[int, ...], box: Box) -> Iterator[tuple[int, int]]:
    """(logical flat start, length) of the contiguous pieces of a box, in the order of the flattened box."""
    inner = len(view)
    while inner > 1 and box[inner - 1] == (0, view[inner - 1]):
        inner -= 1
    stride = math.prod(view[inner:])
    start, stop = box[inner - 1]
    row = view[inner - 1] * stride
    for outer in itertools.product(*(range(*bounds) for bounds in box[: inner - 1])):
        index = 0
        for position, size in zip(outer, view[: inner - 1]):
            index = index * size + position
        yield index * row + start * stride, (stop - start) * stride

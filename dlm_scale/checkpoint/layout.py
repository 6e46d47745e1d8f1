"""Logical tensors, the pieces of them that ranks own, and the geometry of boxes. Needs no torch to import."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    import torch

Box = tuple[tuple[int, int], ...]

# torch's name of a dtype -> (safetensors' name, bytes an element)
DTYPES = {"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
          "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1),
          "uint8": ("U8", 1), "bool": ("BOOL", 1)}
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")
SLOT_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor as the model knows it: unsharded and unpadded. `slot` is `param`, `ema` or an optimizer slot."""

    name: str
    slot: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """What one rank owns of a logical tensor.

    `view` is the shape in which `box` is cut (its product is that of `shape`; it splits fused dimensions).
    `tensor` is 1-D: elements [flat_start, flat_start + numel) of the flattened box, on any device.
    """

    name: str
    slot: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    box: Box
    flat_start: int
    tensor: torch.Tensor


class PieceSpec(NamedTuple):
    """A piece without its values: hashable, sortable, cheap to send."""

    name: str
    slot: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    dtype: str
    box: Box
    flat_start: int
    numel: int

    @property
    def num_bytes(self) -> int:
        return self.numel * DTYPES[self.dtype][1]

    @property
    def key(self) -> str:
        return piece_key(self.name, self.slot, self.box, self.flat_start)


def piece_key(name: str, slot: str, box: Box, flat_start: int) -> str:
    """Name of a piece inside its safetensors file."""
    return f"{slot}/{name}/{','.join(f'{start}:{stop}' for start, stop in box)}/{flat_start}"


def piece_spec(piece: Piece) -> PieceSpec:
    """The spec of `piece`. Raises ValueError when its fields contradict one another."""
    dtype, tensor = str(piece.tensor.dtype).removeprefix("torch."), piece.tensor
    box = tuple((int(start), int(stop)) for start, stop in piece.box)
    shape, view = tuple(map(int, piece.shape)), tuple(map(int, piece.view))
    where = f"piece of {piece.slot}/{piece.name}"
    if not TENSOR_NAME.fullmatch(piece.name) or not SLOT_NAME.fullmatch(piece.slot):
        raise ValueError(f"{where}: name or slot has characters that cannot be stored")
    if dtype not in DTYPES:
        raise ValueError(f"{where}: dtype {dtype} cannot be stored")
    if math.prod(view) != math.prod(shape) or not inside(box, view):
        raise ValueError(f"{where}: box {box} does not fit view {view} of shape {shape}")
    if tensor.ndim != 1 or not 0 <= piece.flat_start <= volume(box) - tensor.numel():
        raise ValueError(f"{where}: {tuple(tensor.shape)} values from {piece.flat_start} do not fit box {box}")
    return PieceSpec(piece.name, piece.slot, shape, view, dtype, box, int(piece.flat_start), tensor.numel())


def assign_owners(offers: Sequence[Iterable[PieceSpec]]) -> dict[PieceSpec, int]:
    """Which rank writes each distinct piece: of the ranks that offer it, the one with the fewest bytes so far.

    `offers[rank]` are the specs of that rank. Sorted by name, slot, box and flat start; the same on every rank.
    """
    candidates: dict[PieceSpec, list[int]] = {}
    for rank, specs in enumerate(offers):
        for spec in specs:
            candidates.setdefault(spec, []).append(rank)
    owners, load = {}, [0] * len(offers)
    for spec in sorted(candidates):
        owners[spec] = min(candidates[spec], key=load.__getitem__)
        load[owners[spec]] += spec.num_bytes
    return owners


def full_box(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    return math.prod(extents(box))


def inside(box: Box, shape: Sequence[int]) -> bool:
    """Whether `box` is a box of a tensor of `shape`; an empty one is not."""
    return len(box) == len(shape) and all(0 <= start < stop <= size for (start, stop), size in zip(box, shape))


def intersect(a: Box, b: Box) -> Box | None:
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b))
    return common if all(start < stop for start, stop in common) else None


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1:]) for dim in range(len(shape)))


def flat_index(box: Box, point: Sequence[int]) -> int:
    """Index of `point` (in the coordinates of the view) in the flattened box."""
    return sum((p - start) * step for p, (start, _), step in zip(point, box, strides(extents(box))))


def relative_slices(box: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that cut `box` out of a tensor that holds `outer`."""
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(box, outer))


def rectangles(box: Box, start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of the flattened box as boxes, in order, each contiguous in that flattening.

    At most 2 * dims - 1 of them: a partial row at each end, recursively, and whole rows between.
    """
    if start >= stop:
        return
    if not box:
        yield ()
        return
    (low, _), rest = box[0], box[1:]
    row_size = volume(rest)
    row, column = divmod(start, row_size)
    whole_rows = stop // row_size
    if column or whole_rows <= row:
        end = min(stop, (row + 1) * row_size)
        for tail in rectangles(rest, column, end - row * row_size):
            yield ((low + row, low + row + 1), *tail)
    else:
        end = whole_rows * row_size
        yield ((low + row, low + whole_rows), *rest)
    yield from rectangles(box, end, stop)

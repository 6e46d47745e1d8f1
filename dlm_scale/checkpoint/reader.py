"""Reading checkpoints: any box of any logical tensor, one tensor at a time. Nothing is ever unpickled."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import torch
import xxhash

from dlm_scale.checkpoint import layout
from dlm_scale.checkpoint.files import CHUNK_BYTES, check_record, load_json, open_regular, read_at
from dlm_scale.checkpoint.folders import find_checkpoint, inspect_checkpoint, list_checkpoints
from dlm_scale.checkpoint.layout import Box, LogicalTensor
from dlm_scale.checkpoint.manifest import Manifest, StoredBox, StoredTensor, rank_file_name
from dlm_scale.checkpoint.safetensors_format import Entry, read_header
from dlm_scale.errors import UsageError

__all__ = ["Checkpoint", "find_checkpoint", "list_checkpoints", "open_checkpoint", "weights_hash"]


COUNTS = frozenset({"step", "samples", "tokens"})


class State(dict):
    """The keys of state.json; asking for one that is not there raises UsageError."""

    def __init__(self, values: dict[str, Any], where: str):
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise UsageError(f"{self.where}: {key} is missing: take another checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint folder. `tensors` maps (name, slot) to what is stored."""

    path: Path
    manifest: Manifest
    tensors: dict[tuple[str, str], LogicalTensor]
    _headers: dict[int, dict[str, Entry]] = field(default_factory=dict, repr=False)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> State:
        """The parsed state.json. Raises UsageError, also where a key that is asked for is not in it."""
        where = f"{self.path}/state.json"
        value = load_json(self.document("state.json"), where)
        if not isinstance(value, dict):
            raise UsageError(f"{where}: not a JSON object")
        for key in COUNTS & value.keys():
            if type(value[key]) is not int or not 0 <= value[key] < 1 << 63:
                raise UsageError(f"{where}: {key} is {str(value[key])[:60]!r}, not a count")
        if value.get("step", self.step) != self.step:
            raise UsageError(f"{where}: step {value['step']}, but the manifest is of step {self.step}")
        return State(value, where)

    def document(self, name: str) -> bytes:
        """A file that was saved beside the tensors; one named .json or .yaml is sound JSON, or UTF-8 text.

        Raises UsageError when it is absent, damaged or neither of these.
        """
        if name not in self.manifest.files:
            raise UsageError(f"checkpoint {self.path} holds no {name}, only {', '.join(sorted(self.manifest.files))}")
        with open_regular(self.path / name) as fd:
            check_record(fd, self.manifest.files[name], name, with_hash=True)
            data = bytes(read_at(fd, 0, self.manifest.files[name].size, name))
        if name.endswith(".json"):
            load_json(data, f"{self.path}/{name}")
        elif name.endswith(".yaml"):
            _check_utf8(data, f"{self.path}/{name}")
        return data

    def read(self, name: str, slot: str = "param", box: Box | None = None, *, dtype: torch.dtype | None = None,
             view: Sequence[int] | None = None) -> torch.Tensor:
        """`box` of a tensor, in `dtype` (default: as stored), in the shape of the box; without `box` the whole of it.

        `box` is in coordinates of `view` (default: the view it was saved with). Raises UsageError.
        """
        stored = self._stored(name, slot)
        if box is None:
            box, view, shape = layout.full_box(stored.view), None, stored.shape
        else:
            shape = layout.extents(box)
        return self.read_flat(name, slot, box, 0, layout.volume(box), dtype=dtype, view=view).view(shape)

    def read_flat(self, name: str, slot: str, view_box: Box, flat_start: int, numel: int, *,
                  dtype: torch.dtype | None = None, view: Sequence[int] | None = None) -> torch.Tensor:
        """Elements [flat_start, flat_start + numel) of the flattened box, 1-D. Raises UsageError.

        Reads just the bytes needed, in small chunks; only when `view` is not that of the file is the whole tensor read.
        """
        stored = self._stored(name, slot)
        view = tuple(view or stored.view)
        if not layout.inside(view_box, view) or not 0 <= flat_start <= flat_start + numel <= layout.volume(view_box):
            raise UsageError(f"elements {flat_start}+{numel} of box {view_box} are not in {slot}/{name} of view {view}")
        if view != stored.view:
            return self._read_other_view(stored, view, view_box, dtype)[flat_start:flat_start + numel].clone()
        out = torch.empty(numel, dtype=dtype or getattr(torch, stored.dtype))
        done = 0
        for wanted in layout.rectangles(view_box, flat_start, flat_start + numel):
            size = layout.volume(wanted)
            target = out[done:done + size].view(layout.extents(wanted))
            for stored_box in stored.boxes:
                self._fill(target, wanted, stored, stored_box)
            done += size
        return out

    def _read_other_view(self, stored: StoredTensor, view: tuple[int, ...], box: Box,
                         dtype: torch.dtype | None) -> torch.Tensor:
        whole = self.read(stored.name, stored.slot, dtype=dtype)
        if layout.volume(layout.full_box(view)) != whole.numel():
            raise UsageError(f"{stored.slot}/{stored.name} in {self.path} has shape {stored.shape}, not {view}")
        return whole.view(view)[layout.relative_slices(box, layout.full_box(view))].reshape(-1)

    def _fill(self, target: torch.Tensor, wanted: Box, stored: StoredTensor, stored_box: StoredBox) -> None:
        """Copy what `stored_box` holds of the box `wanted` into `target`, which has its shape."""
        common = layout.intersect(wanted, stored_box.box)
        if common is None:
            return
        first = layout.flat_index(stored_box.box, [start for start, _ in common])
        last = layout.flat_index(stored_box.box, [stop - 1 for _, stop in common])
        for start, numel, rank in stored_box.overlapping(first, last + 1):
            offset = self._entry(stored, stored_box.box, start, numel, rank).offset
            with open_regular(self.path / rank_file_name(rank)) as fd:
                for rectangle in layout.rectangles(stored_box.box, start, start + numel):
                    part = layout.intersect(rectangle, common)
                    if part is not None:
                        copy_box(fd, offset, rectangle, part, stored.dtype,
                                 target[layout.relative_slices(part, wanted)])
                    offset += layout.volume(rectangle) * layout.DTYPES[stored.dtype][1]

    def _stored(self, name: str, slot: str) -> StoredTensor:
        if (name, slot) in self.manifest.tensors:
            return self.manifest.tensors[name, slot]
        close = get_close_matches(f"{slot}/{name}", [f"{s}/{n}" for n, s in self.manifest.tensors], n=1)
        raise UsageError(f"checkpoint {self.path} has no tensor {slot}/{name}"
                         + (f"; did you mean {close[0]}?" if close else "; is it of another model?"))

    def _entry(self, stored: StoredTensor, box: Box, start: int, numel: int, rank: int) -> Entry:
        if rank not in self._headers:
            name = rank_file_name(rank)
            with open_regular(self.path / name) as fd:
                self._headers[rank] = read_header(fd, name)
        key = layout.piece_key(stored.name, stored.slot, box, start)
        entry = self._headers[rank].get(key)
        if entry is None or (entry.dtype, entry.numel) != (stored.dtype, numel):
            raise UsageError(f"{self.path / rank_file_name(rank)} does not hold {key} as the manifest says")
        return entry


def _check_utf8(data: bytes, where: str) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text (byte {error.start}): take another checkpoint") from None


def copy_box(fd: int, offset: int, outer: Box, box: Box, dtype: str, target: torch.Tensor) -> None:
    """Copy `box` of a contiguous tensor that fills `outer`, at byte `offset` of a file, into `target`, by chunks."""
    item_size, steps = layout.DTYPES[dtype][1], layout.strides(layout.extents(outer))
    span = 1 + sum((stop - start - 1) * step for (start, stop), step in zip(box, steps))
    if span * item_size > CHUNK_BYTES:
        dim = next(dim for dim, (start, stop) in enumerate(box) if stop - start > 1)
        half = (box[dim][1] - box[dim][0]) // 2
        middle = box[dim][0] + half
        for part, target_part in (((box[dim][0], middle), target.narrow(dim, 0, half)),
                                  ((middle, box[dim][1]), target.narrow(dim, half, box[dim][1] - middle))):
            copy_box(fd, offset, outer, (*box[:dim], part, *box[dim + 1:]), dtype, target_part)
        return
    first = offset + layout.flat_index(outer, [start for start, _ in box]) * item_size
    data = torch.frombuffer(read_at(fd, first, span * item_size, "tensor data"), dtype=getattr(torch, dtype))
    target.copy_(data.as_strided(layout.extents(box), steps))


def open_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open one checkpoint folder. Its manifest and the sizes of all files are always checked, with `verify` every hash.

    Raises UsageError naming every bad file.
    """
    path = Path(path)
    manifest, problems = inspect_checkpoint(path, with_tensors=verify)
    if manifest is None or problems:
        raise UsageError(f"checkpoint {path} is damaged: {'; '.join(problems)}. Restore the files from a copy, or use"
                         " another checkpoint (dlm checkpoint list RUN shows them)")
    tensors = {key: LogicalTensor(stored.name, stored.slot, stored.shape, getattr(torch, stored.dtype))
               for key, stored in manifest.tensors.items()}
    return Checkpoint(path, manifest, tensors)


def weights_hash(source: Checkpoint | Iterable[tuple[str, torch.Tensor]]) -> str:
    """xxh3_128 over the logical float32 `param` tensors in name order: name, shape and bytes of each.

    Streams, and does not depend on the layout. `source` gives (name, tensor) in ascending order of name.
    Raises ValueError for another order or dtype.
    """
    digest, previous = xxhash.xxh3_128(), ""
    for name, tensor in _parameters(source) if isinstance(source, Checkpoint) else source:
        if name <= previous or tensor.dtype != torch.float32:
            raise ValueError(f"weights_hash: {name} after {previous!r}, {tensor.dtype}: needs name order and float32")
        digest.update(json.dumps([name, list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy())
        previous = name
    return digest.hexdigest()


def _parameters(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(name for name, slot in checkpoint.tensors if slot == "param"):
        yield name, checkpoint.read(name)

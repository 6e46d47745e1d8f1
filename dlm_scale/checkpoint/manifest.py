"""manifest.json: what a checkpoint consists of, the hash of every file, and its own. Needs no torch to import.

    {"manifest_xxh3_128": hex,                      first; hash of the rest as canonical JSON (sorted keys, no spaces)
     "files": {file: {"size": bytes, "xxh3_128": hex}},
     "format": "dlm_scale.checkpoint", "step": 1000,
     "tensors": [{"name", "slot", "shape", "view", "dtype",
                  "boxes": [{"box": [[start, stop], ...], "pieces": [[flat_start, numel, rank], ...]}]}],
     "version": 1, "world_size": 2}

The boxes of a tensor tile its view and the pieces of a box tile the flattened box, both exactly and in order. A piece
of rank r lies in rank_0000r.safetensors under layout.piece_key.
"""
from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np
import xxhash

from dlm_scale.checkpoint import layout
from dlm_scale.checkpoint.files import FileRecord, check_record, dump_json, load_json, open_regular, read_file
from dlm_scale.checkpoint.layout import Box, PieceSpec
from dlm_scale.checkpoint.safetensors_format import read_header
from dlm_scale.errors import UsageError

MANIFEST_NAME = "manifest.json"
FORMAT, VERSION = "dlm_scale.checkpoint", 1
MAX_MANIFEST_BYTES = 512 << 20
MAX_DIMS, MAX_BOXES, MAX_NUMBER = 16, 1024, 1 << 48
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
HASH = re.compile(r"[0-9a-f]{32}")
HASH_PREFIX = b'{"manifest_xxh3_128":"'


@dataclass(frozen=True)
class StoredBox:
    """The pieces [flat_start, numel, rank] of one box, ascending and without gaps."""

    box: Box
    pieces: tuple[tuple[int, int, int], ...]

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The pieces that hold any element of [start, stop) of the flattened box."""
        first = bisect_right(self.pieces, start, key=lambda piece: piece[0]) - 1
        for index in range(first, len(self.pieces)):
            if self.pieces[index][0] >= stop:
                return
            yield self.pieces[index]


@dataclass(frozen=True)
class StoredTensor:
    name: str
    slot: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    dtype: str
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class Manifest:
    step: int
    world_size: int
    files: dict[str, FileRecord]
    tensors: dict[tuple[str, str], StoredTensor]

    @cached_property
    def keys_by_file(self) -> dict[str, dict[str, tuple[str, int]]]:
        """file -> key -> (dtype, numel) of every piece."""
        keys: dict[str, dict[str, tuple[str, int]]] = {}
        for tensor in self.tensors.values():
            for stored in tensor.boxes:
                for start, numel, rank in stored.pieces:
                    key = layout.piece_key(tensor.name, tensor.slot, stored.box, start)
                    keys.setdefault(rank_file_name(rank), {})[key] = (tensor.dtype, numel)
        return keys


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def describe_tensors(owners: Mapping[PieceSpec, int]) -> list[dict[str, Any]]:
    """The `tensors` section for sorted pieces and the rank that writes each."""
    tensors = []
    for head, members in groupby(owners.items(), key=lambda item: item[0][:5]):
        name, slot, shape, view, dtype = head
        boxes = [{"box": box, "pieces": [[spec.flat_start, spec.numel, rank] for spec, rank in pieces]}
                 for box, pieces in groupby(members, key=lambda item: item[0].box)]
        tensors.append({"name": name, "slot": slot, "shape": shape, "view": view, "dtype": dtype, "boxes": boxes})
    return tensors


def encode_manifest(step: int, world_size: int, files: Mapping[str, FileRecord], tensors: list[dict]) -> bytes:
    records = {name: record._asdict() for name, record in files.items()}
    body = dump_json({"format": FORMAT, "version": VERSION, "step": step, "world_size": world_size, "files": records,
                      "tensors": tensors})
    return HASH_PREFIX + xxhash.xxh3_128_hexdigest(body).encode() + b'",' + body[1:]


def decode_manifest(data: bytes) -> Manifest:
    """Parse and validate the bytes of a manifest. Raises UsageError naming the first thing that is wrong."""
    start = len(HASH_PREFIX) + 32
    body = b"{" + data[start + 2:]
    if data[:start + 2] != HASH_PREFIX + xxhash.xxh3_128_hexdigest(body).encode() + b'",':
        raise UsageError(f"{MANIFEST_NAME}: its own hash does not match: damaged or edited by hand")
    value = load_json(body, MANIFEST_NAME)
    written, readable = f"{value.get('format')} {value.get('version')!r}", f"{FORMAT} {VERSION!r}"
    _require(written == readable, f"is of format {written}, this program reads {readable}")
    _keys(value, {"format", "version", "step", "world_size", "files", "tensors"}, "manifest")
    world_size = _int(value["world_size"], 1, 1 << 24, "world_size")
    files = _decode_files(value["files"])
    tensors = decode_tensors(value["tensors"], world_size)
    ranks = {rank for tensor in tensors.values() for stored in tensor.boxes for _, _, rank in stored.pieces}
    missing = {rank_file_name(rank) for rank in ranks} - files.keys()
    _require(not missing, f"{sorted(missing)[:8]} hold tensors but are not among the files")
    return Manifest(_int(value["step"], 0, MAX_NUMBER, "step"), world_size, files, tensors)


def read_manifest(folder: Path) -> Manifest:
    """Raises UsageError when it is missing, damaged or invalid."""
    return decode_manifest(read_file(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES))


def check_file(folder: Path, manifest: Manifest, name: str, *, with_hash: bool = True) -> None:
    """Raise UsageError unless file `name` is what the manifest says, by size, and by hash and header if asked."""
    with open_regular(folder / name) as fd:
        check_record(fd, manifest.files[name], name, with_hash=with_hash)
        if with_hash and name in manifest.keys_by_file:
            found = {key: (entry.dtype, entry.numel) for key, entry in read_header(fd, name).items()}
            if found != manifest.keys_by_file[name]:
                raise UsageError(f"{name}: holds other tensors than the manifest says")


def decode_tensors(value: Any, world_size: int) -> dict[tuple[str, str], StoredTensor]:
    """Validate the `tensors` section: every logical tensor must be tiled exactly. Raises UsageError."""
    tensors: dict[tuple[str, str], StoredTensor] = {}
    for item in _list(value, "tensors"):
        tensor = _decode_tensor(item, world_size)
        _require((tensor.name, tensor.slot) not in tensors,
                 f"{tensor.slot}/{tensor.name} stands twice, or with two shapes, views or dtypes")
        tensors[tensor.name, tensor.slot] = tensor
    return tensors


def _decode_tensor(value: Any, world_size: int) -> StoredTensor:
    _keys(value, {"name", "slot", "shape", "view", "dtype", "boxes"}, "a tensor")
    name, slot, dtype = value["name"], value["slot"], value["dtype"]
    _require(isinstance(name, str) and layout.TENSOR_NAME.fullmatch(name) is not None, "a tensor's name is not valid")
    _require(isinstance(slot, str) and layout.SLOT_NAME.fullmatch(slot) is not None, f"slot of {name} is not valid")
    where = f"{slot}/{name}"
    _require(isinstance(dtype, str) and dtype in layout.DTYPES, f"{where}: dtype is not known")
    shape, view = _shape(value["shape"], where), _shape(value["view"], where)
    _require(math.prod(shape) == math.prod(view) < MAX_NUMBER, f"{where}: view does not fit the shape")
    boxes = tuple(_decode_box(item, view, world_size, where) for item in _list(value["boxes"], where, MAX_BOXES))
    _check_tiling([stored.box for stored in boxes], view, where)
    return StoredTensor(name, slot, shape, view, dtype, boxes)


def _decode_box(value: Any, view: tuple[int, ...], world_size: int, where: str) -> StoredBox:
    _keys(value, {"box", "pieces"}, f"a box of {where}")
    box = tuple(tuple(_int(end, 0, MAX_NUMBER, f"{where} box") for end in _list(pair, where, 2))
                for pair in _list(value["box"], where, MAX_DIMS))
    _require(all(len(pair) == 2 for pair in box) and layout.inside(box, view), f"{where}: box {box} is not in {view}")
    pieces = tuple(tuple(item) if isinstance(item, (list, tuple)) else () for item in _list(value["pieces"], where))
    _require(all(len(piece) == 3 and type(piece[0]) is type(piece[1]) is type(piece[2]) is int for piece in pieces),
             f"{where}: a piece is not [flat_start, numel, rank]")
    done = 0
    for start, numel, rank in pieces:
        if start != done or numel < 1 or not 0 <= rank < world_size:
            fault = "gap" if start > done else "overlap" if start < done or numel < 1 else f"rank {rank}"
            raise UsageError(f"{MANIFEST_NAME}: {where}: {fault} at element {done} of box {box}, world {world_size}")
        done += numel
    _require(done == layout.volume(box), f"{where}: {done} of {layout.volume(box)} elements of box {box}")
    return StoredBox(box, pieces)


def _check_tiling(boxes: list[Box], view: tuple[int, ...], where: str) -> None:
    """Boxes tile the view exactly when no two overlap and their volumes sum to its volume."""
    ends = np.array(boxes, dtype=np.int64).reshape(len(boxes), len(view), 2)
    overlaps = (ends[:, None, :, 0] < ends[None, :, :, 1]).all(-1)
    _require(int((overlaps & overlaps.T).sum()) == len(boxes), f"{where}: overlap of boxes")
    covered = sum(map(layout.volume, boxes))
    _require(covered == math.prod(view), f"{where}: gap, boxes hold {covered} of {math.prod(view)} elements")


def _decode_files(value: Any) -> dict[str, FileRecord]:
    _require(isinstance(value, dict), "files is not an object")
    files = {}
    for name, record in value.items():
        _require(FILE_NAME.fullmatch(name) is not None and name != MANIFEST_NAME, f"file name {name!r:.200} not valid")
        _keys(record, {"size", "xxh3_128"}, name)
        digest = record["xxh3_128"]
        _require(isinstance(digest, str) and HASH.fullmatch(digest) is not None, f"{name}: hash not valid")
        files[name] = FileRecord(_int(record["size"], 0, MAX_NUMBER, name), digest)
    return files


def _shape(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_int(size, 1, MAX_NUMBER, f"{where} shape") for size in _list(value, where, MAX_DIMS))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"{MANIFEST_NAME}: {message}")


def _keys(value: Any, keys: set[str], where: str) -> None:
    _require(isinstance(value, dict) and value.keys() == keys, f"{where} does not have exactly the keys {sorted(keys)}")


def _list(value: Any, where: str, max_length: int = 1 << 40) -> Any:
    _require(isinstance(value, (list, tuple)) and len(value) <= max_length, f"{where}: not a list, or too long a one")
    return value


def _int(value: Any, low: int, high: int, where: str) -> int:
    _require(type(value) is int and low <= value <= high, f"{where}: not an integer from {low} to {high}")
    return value

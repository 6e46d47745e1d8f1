"""The safetensors file format: 8 bytes of header length, a JSON header, raw data. Checkpoints hold 1-D tensors only.

Written here rather than through the library so that tensors stream through one at a time, and parsed here so that
every claim of a header is checked before anything is allocated for it.
"""
from __future__ import annotations

import json
import math
import os
import struct
from typing import Any, Iterable, NamedTuple, Sequence

from dlm_scale.checkpoint.files import load_json, read_at
from dlm_scale.checkpoint.layout import DTYPES
from dlm_scale.errors import UsageError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 16
TAGS = {tag: dtype for dtype, (tag, _) in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file: its dtype, number of elements, absolute byte offset, and shape."""

    dtype: str
    numel: int
    offset: int
    shape: tuple[int, ...]


def encode_header(entries: Iterable[tuple[str, str, int | Sequence[int]]], metadata: dict[str, str]) -> bytes:
    """The bytes before the data of (key, dtype, numel or shape) entries, in the order in which the data will follow."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for key, dtype, size in entries:
        tag, item_size = DTYPES[dtype]
        shape = [size] if isinstance(size, int) else list(size)
        end = begin + math.prod(shape) * item_size
        header[key] = {"dtype": tag, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(header)} pieces in one file need a header of {len(text)} bytes, the limit is"
                         f" {MAX_HEADER_BYTES}; use more ranks")
    return struct.pack("<Q", len(text)) + text


def read_header(fd: int, name: str, num_dims: int | None = 1) -> dict[str, Entry]:
    """The entries of an open file. Raises UsageError unless they tile its data exactly, and all have `num_dims`
    dimensions (None: any number)."""
    size = os.fstat(fd).st_size
    (length,) = struct.unpack("<Q", read_at(fd, 0, 8, name))
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise UsageError(f"{name}: header of {length} bytes in a file of {size}")
    header = load_json(bytes(read_at(fd, 8, length, name)), f"{name} header")
    if not isinstance(header, dict):
        raise UsageError(f"{name}: header is not a JSON object")
    header.pop("__metadata__", None)
    spans = sorted((*_checked_entry(value, f"{name}: {key[:200]}", num_dims), key) for key, value in header.items())
    if [begin for begin, *_ in spans] + [size - 8 - length] != [0] + [end for _, end, *_ in spans]:
        raise UsageError(f"{name}: tensors do not tile the data (a gap, an overlap, or an end past the file's)")
    return {key: Entry(dtype, math.prod(shape), 8 + length + begin, shape) for begin, _, dtype, shape, key in spans}


def _checked_entry(value: Any, where: str, num_dims: int | None) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of one header entry. Raises UsageError."""
    try:
        dtype, shape, (begin, end) = TAGS[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
        numbers_ok = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        numbers_ok &= len(shape) == num_dims if num_dims is not None else len(shape) <= MAX_DIMS
    except (KeyError, TypeError, ValueError):
        numbers_ok = False
    if not numbers_ok or len(value) != 3 or end - begin != math.prod(shape) * DTYPES[dtype][1]:
        kind = "one-dimensional tensor" if num_dims == 1 else "tensor of a known dtype"
        raise UsageError(f"{where}: not the entry of a {kind}")
    return begin, end, dtype, shape

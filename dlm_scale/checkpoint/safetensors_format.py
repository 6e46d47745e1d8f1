"""The safetensors file format: 8 bytes of header length, a JSON header, raw data. One-dimensional tensors only.

Written here rather than through the library so that tensors stream through one at a time, and parsed here so that
every claim of a header is checked before anything is allocated for it.
"""
from __future__ import annotations

import json
import os
import struct
from typing import Any, Iterable, NamedTuple

from dlm_scale.checkpoint.files import load_json, read_at
from dlm_scale.checkpoint.layout import DTYPES
from dlm_scale.errors import UsageError

MAX_HEADER_BYTES = 100_000_000
TAGS = {tag: dtype for dtype, (tag, _) in DTYPES.items()}


class Entry(NamedTuple):
    """A 1-D tensor in a file: its dtype, number of elements, and absolute byte offset."""

    dtype: str
    numel: int
    offset: int


def encode_header(entries: Iterable[tuple[str, str, int]], metadata: dict[str, str]) -> bytes:
    """The bytes before the data of (key, dtype, numel) entries, in the order in which the data will follow."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for key, dtype, numel in entries:
        tag, item_size = DTYPES[dtype]
        end = begin + numel * item_size
        header[key] = {"dtype": tag, "shape": [numel], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(header)} pieces in one file need a header of {len(text)} bytes, the limit is"
                         f" {MAX_HEADER_BYTES}; use more ranks")
    return struct.pack("<Q", len(text)) + text


def read_header(fd: int, name: str) -> dict[str, Entry]:
    """The entries of an open file. Raises UsageError unless they tile its data exactly."""
    size = os.fstat(fd).st_size
    (length,) = struct.unpack("<Q", read_at(fd, 0, 8, name))
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise UsageError(f"{name}: header of {length} bytes in a file of {size}")
    header = load_json(bytes(read_at(fd, 8, length, name)), f"{name} header")
    if not isinstance(header, dict):
        raise UsageError(f"{name}: header is not a JSON object")
    header.pop("__metadata__", None)
    spans = sorted((*_checked_entry(value, f"{name}: {key[:200]}"), key) for key, value in header.items())
    if [begin for begin, *_ in spans] + [size - 8 - length] != [0] + [end for _, end, *_ in spans]:
        raise UsageError(f"{name}: tensors do not tile the data (a gap, an overlap, or an end past the file's)")
    return {key: Entry(dtype, numel, 8 + length + begin) for begin, _, dtype, numel, key in spans}


def _checked_entry(value: Any, where: str) -> tuple[int, int, str, int]:
    """(begin, end, dtype, numel) of one header entry. Raises UsageError."""
    try:
        dtype, (numel,), (begin, end) = TAGS[value["dtype"]], value["shape"], value["data_offsets"]
        numbers_ok = all(type(number) is int and number >= 0 for number in (numel, begin, end))
    except (KeyError, TypeError, ValueError):
        numbers_ok = False
    if not numbers_ok or len(value) != 3 or end - begin != numel * DTYPES[dtype][1]:
        raise UsageError(f"{where}: not the entry of a one-dimensional tensor")
    return begin, end, dtype, numel

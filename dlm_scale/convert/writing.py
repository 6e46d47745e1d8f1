"""Folders of safetensors files, written so that they are there whole or not at all.

DST.partial/progress.jsonl   the request, then a line for each file that is done: the same command goes on from it
DST.partial/*                what will be in DST; every file is read again and hashed before the one rename
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash

from dlm_scale.checkpoint.files import (
    FileRecord,
    check_record,
    dump_json,
    fsync_folder,
    load_json,
    open_regular,
    write_file,
)
from dlm_scale.checkpoint.layout import DTYPES
from dlm_scale.checkpoint.safetensors_format import encode_header, read_header
from dlm_scale.errors import UsageError

PROGRESS = "progress.jsonl"
DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `read()` gives it, in its shape and dtype (torch's name)."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * DTYPES[self.dtype][1]


Files = Callable[[dict[str, FileRecord]], Mapping[str, bytes]]


def split_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries in order, as many in a file as `max_bytes` allows; one that is larger stands alone."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + entry.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(entry)
    return shards


def refuse_existing(target: Path) -> None:
    if target.exists():
        raise UsageError(f"{target} exists: name another place, or remove it first")
    if not target.resolve().parent.is_dir():
        raise UsageError(f"{target.parent} is no folder: make it first")


def write_target(
    target: Path, shards: Mapping[str, Sequence[Entry]], files: Files, identity: str, metadata: dict[str, str],
    say: Callable[[str], None] = lambda text: None, *, is_file: bool = False,
) -> None:  # fmt: skip
    """Write `shards` (file name -> entries) and then `files(records of the shards)` (name or folder/name -> content) as
    the folder `target`, or with `is_file` the one shard as the file `target`.

    Raises UsageError where it exists or cannot be written; then it still does not exist."""
    refuse_existing(target)
    partial = target.with_name(f"{target.name}.partial")
    layout = {name: [(entry.key, entry.shape, entry.dtype) for entry in entries] for name, entries in shards.items()}
    request = xxhash.xxh3_128_hexdigest(json.dumps([identity, layout, metadata]).encode())
    needed = sum(entry.num_bytes for entries in shards.values() for entry in entries)
    try:
        partial.mkdir(exist_ok=True)
        with _progress(partial, request) as (done, record):
            _require_space(partial, needed, done)
            for name, entries in shards.items():
                if name not in done:
                    (partial / name).unlink(missing_ok=True)
                    header = encode_header([(e.key, e.dtype, e.shape) for e in entries], metadata)
                    done[name] = write_file(partial / name, chain([header], map(_raw_bytes, entries)))
                    record(name, done[name])
                say(f"{name}: {len(entries)} tensors, {done[name].size / 1e6:.1f} MB")
            for name, data in files(done).items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).unlink(missing_ok=True)
                done[name] = write_file(partial / name, [data])
            _verify(partial, done, layout)
        (partial / PROGRESS).unlink()
        fsync_folder(partial)
        if is_file:
            os.rename(partial / next(iter(shards)), target)
            partial.rmdir()
        else:
            os.rename(partial, target)
        fsync_folder(target.resolve().parent)
    except UsageError:
        if not any((partial / name).exists() for name in shards):  # nothing to go on from
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise UsageError(
            f"{target} not written: {error}. What is done stays in {partial}: the same command goes on from there"
        ) from error


def _raw_bytes(entry: Entry) -> Any:
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
        raise ValueError(f"{entry.key}: {tuple(tensor.shape)} {tensor.dtype}, not {entry.shape} {entry.dtype}")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


@contextmanager
def _progress(partial: Path, request: str) -> Iterator[tuple[dict[str, FileRecord], Callable[[str, FileRecord], None]]]:
    """What an earlier attempt at the same request has done, and how to add to it. One attempt at a time."""
    with open(partial / PROGRESS, "a+b") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{partial} is being written by another conversion: wait for it") from None
        log.seek(0)
        first, *lines = log.read().split(b"\n")
        done = {}
        if first == request.encode():
            for line in lines[:-1]:  # the last one is empty, or was cut short
                name, *values = load_json(line, PROGRESS)
                if _is_good(partial / name, FileRecord(*values)):
                    done[name] = FileRecord(*values)
        for path in partial.iterdir():
            if path.name not in done and path.name != PROGRESS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        log.truncate(0)

        def record(*line: Any) -> None:
            log.write((dump_json(line) if len(line) > 1 else line[0].encode()) + b"\n")
            log.flush()
            os.fsync(log.fileno())

        record(request)
        for name, values in done.items():
            record(name, *values)
        yield done, lambda name, values: record(name, *values)


def _is_good(path: Path, record: FileRecord) -> bool:
    try:
        with open_regular(path) as fd:
            check_record(fd, record, path.name, with_hash=True)
    except UsageError:
        return False
    return True


def _verify(partial: Path, records: dict[str, FileRecord], layout: dict[str, list[tuple]]) -> None:
    """Every file against what was meant to be written. Raises UsageError."""
    for name, record in records.items():
        with open_regular(partial / name) as fd:
            check_record(fd, record, name, with_hash=True)
            if name in layout:
                found = {(key, e.shape, e.dtype) for key, e in read_header(fd, name, num_dims=None).items()}
                if found != {(key, tuple(shape), dtype) for key, shape, dtype in layout[name]}:
                    raise UsageError(f"{partial / name}: holds other tensors than were written; the disk lies")


def _require_space(partial: Path, needed: int, done: dict[str, FileRecord]) -> None:
    needed -= sum(record.size for record in done.values())
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise UsageError(f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free in {partial.parent}: free some space")

"""Packing: which documents share a row, decided once for a dataset and kept in a file.

D long documents, P pieces, R packed rows, L = seq_len. A document of at least L tokens gives full rows from its front;
what remains of it, and every shorter document, is a piece. Pieces are packed best-fit decreasing within groups of
GROUP_DOCUMENTS documents in file order, so that neighbours in a row lie near each other in the file and building needs
little more memory than the plan: 12 bytes a piece, 8 a row, 16 a long document.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dlm_scale.data.files import open_regular
from dlm_scale.errors import UsageError

VERSION = 1  # of the algorithm: another plan for the same documents needs another number
GROUP_DOCUMENTS = 1 << 20
CACHE_FOLDER = ".packing"
HEADER = struct.Struct("<8s16s16s24s")  # magic, key, hash of all that follows, which begins with SIZES
SIZES = struct.Struct("<3Q")  # numbers of long documents, packed rows, pieces
MAGIC = b"DLMPACK\x01"
HASHED_BYTES = 1 << 20

Bounds = Callable[[int, int], np.ndarray]  # (i, j) -> token offsets, int64 [j-i+1], of documents i..j-1 and their end


@dataclass(frozen=True)
class PackingPlan:
    """Rows 0..F-1 are full rows of long documents, the rest hold the pieces `row_piece_R1[r]` up to the next.

    `full_row_D1` int64: full rows before each long document, and in all; `full_start_D` int64: the token it begins at;
    `start_P` int64, `length_P` int32: tokens of each piece.
    """

    seq_len: int
    full_row_D1: np.ndarray
    full_start_D: np.ndarray
    row_piece_R1: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.full_row_D1[-1]) + len(self.row_piece_R1) - 1

    @property
    def used(self) -> float:
        """Share of all positions that hold tokens."""
        tokens = int(self.full_row_D1[-1]) * self.seq_len + int(self.length_P.sum(dtype=np.int64))
        return tokens / (self.num_rows * self.seq_len)

    def pieces(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first tokens, lengths, how many in each row), int64, of the pieces of some rows in sequence."""
        is_packed_B = row_B >= self.full_row_D1[-1]
        full_B, packed_B = row_B[~is_packed_B], row_B[is_packed_B] - self.full_row_D1[-1]
        first_B = self.row_piece_R1[packed_B]
        count_B = np.ones(len(row_B), dtype=np.int64)
        count_B[is_packed_B] = self.row_piece_R1[packed_B + 1] - first_B
        piece_S = ranges(first_B, count_B[is_packed_B])
        document_B = np.searchsorted(self.full_row_D1, full_B, side="right") - 1
        start_S, length_S = np.empty(count_B.sum(), np.int64), np.full(count_B.sum(), self.seq_len, np.int64)
        is_packed_S = np.repeat(is_packed_B, count_B)
        start_S[is_packed_S], length_S[is_packed_S] = self.start_P[piece_S], self.length_P[piece_S]
        within_B = (full_B - self.full_row_D1[document_B]) * self.seq_len
        start_S[~is_packed_S] = self.full_start_D[document_B] + within_B
        return start_S, length_S, count_B


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The integers first[i] ... first[i] + count[i] - 1 of all i in sequence, int64."""
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())


def best_fit(length_P: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64 [P], rows numbered from 0: best-fit decreasing (Johnson 1973).

    The longest piece first, each into the row with the least room that still holds it; pieces of one length, which
    follow each other, are placed at once. Pure; lengths are 1..capacity.
    """
    order_P, row_P = np.argsort(-length_P, kind="stable"), np.empty(len(length_P), dtype=np.int64)
    rows_of_room: dict[int, np.ndarray] = {}
    is_there, num_rows = np.zeros(capacity + 1, dtype=bool), 0

    def put(room: int, rows: np.ndarray) -> None:
        if room and rows.size:
            rows_of_room[room] = np.concatenate([rows, rows_of_room[room]]) if is_there[room] else rows
            is_there[room] = True

    counts = np.bincount(length_P, minlength=capacity + 1)
    ends = np.cumsum(counts[::-1])
    for length in np.flatnonzero(counts)[::-1].tolist():
        mine = order_P[ends[capacity - length] - counts[length] : ends[capacity - length]]
        while mine.size:
            room = length + int(is_there[length:].argmax())
            if is_there[room]:
                rows, is_there[room] = rows_of_room.pop(room), False
            else:
                room, rows = capacity, np.arange(num_rows, num_rows - (-mine.size // (capacity // length)))
                num_rows += rows.size
            each = room // length
            used = min(rows.size, -(-mine.size // each))
            taken = min(mine.size, used * each)
            in_last = taken - (used - 1) * each
            row_P[mine[:taken]] = np.repeat(rows[:used], each)[:taken]
            put(room, rows[used:])
            put(room - in_last * length, rows[used - 1 : used])
            put(room - each * length, rows[: used - 1])
            mine = mine[taken:]
    return row_P


def make_plan(bounds: Bounds, num_documents: int, seq_len: int) -> PackingPlan:
    """The plan of a dataset's documents; it depends on nothing but their lengths and L."""
    groups = [(i, min(i + GROUP_DOCUMENTS, num_documents)) for i in range(0, num_documents, GROUP_DOCUMENTS)]
    counts = np.array([_counts(np.diff(bounds(*group)), seq_len) for group in groups])
    (long_end, piece_end), (num_long, num_pieces) = np.cumsum(counts, axis=0).T, counts.sum(axis=0)
    full_D, full_start_D, start_P = (np.empty(size, np.int64) for size in (num_long, num_long, num_pieces))
    length_P, counts_of_rows = np.empty(num_pieces, np.int32), []
    for group, (longs, pieces), long_stop, piece_stop in zip(groups, counts, long_end, piece_end, strict=True):
        D, P = slice(long_stop - longs, long_stop), slice(piece_stop - pieces, piece_stop)
        full_D[D], full_start_D[D], count_R, start_P[P], length_P[P] = _pack_group(bounds(*group), seq_len)
        counts_of_rows.append(count_R.astype(np.int32))
    return PackingPlan(seq_len, _from_zero([full_D]), full_start_D, _from_zero(counts_of_rows), start_P, length_P)


def _counts(length_N: np.ndarray, seq_len: int) -> tuple[int, int]:
    """How many documents are long, how many leave a piece."""
    return np.count_nonzero(length_N >= seq_len), np.count_nonzero(length_N % seq_len)


def one_a_row(bounds: Bounds, num_documents: int, seq_len: int) -> PackingPlan:
    """The plan of documents of at most L tokens each, every one in a row of its own, in file order."""
    bounds_D1 = bounds(0, num_documents)
    none, row_piece_R1 = np.zeros(0, np.int64), np.arange(num_documents + 1)
    return PackingPlan(seq_len, np.zeros(1, np.int64), none, row_piece_R1, bounds_D1[:-1], np.diff(bounds_D1))


def _pack_group(bounds_N1: np.ndarray, seq_len: int) -> tuple[np.ndarray, ...]:
    """Of some documents: (full rows, first token) of the long ones, pieces of each row, (first token, length) of each
    piece, row by row and within a row in file order."""
    start_N, length_N = bounds_N1[:-1], np.diff(bounds_N1)
    full_N, rest_N = np.divmod(length_N, seq_len)
    is_long_N, has_rest_N = full_N > 0, rest_N > 0
    length_P = rest_N[has_rest_N]
    row_P = best_fit(length_P, seq_len)
    order_P = np.argsort(row_P, kind="stable")
    start_P = (start_N + full_N * seq_len)[has_rest_N]
    return full_N[is_long_N], start_N[is_long_N], np.bincount(row_P), start_P[order_P], length_P[order_P]


def _from_zero(counts: list[np.ndarray]) -> np.ndarray:
    out = np.zeros(1 + sum(map(len, counts)), dtype=np.int64)
    np.cumsum(np.concatenate(counts), out=out[1:])
    return out


def open_plan(prefix: str, bounds: Bounds, num_documents: int, idx_xxh3: str, seq_len: int) -> PackingPlan:
    """The plan of the dataset `prefix`, from the folder `.packing` beside it; made, and left there, where it is not.

    One process makes it while the others wait. Where the folder cannot be written each process keeps a plan in its
    memory. A file that is not whole, or not of these documents, is made anew.
    """
    about = {"version": VERSION, "group": GROUP_DOCUMENTS, "seq_len": seq_len, "idx_xxh3": idx_xxh3}
    key = xxhash.xxh3_128_digest(json.dumps(about, sort_keys=True).encode())
    path = Path(prefix).parent / CACHE_FOLDER / f"{Path(prefix).name}_{seq_len}_{key.hex()[:16]}.plan"
    if plan := _read(path, key, seq_len):
        return plan
    with _locked(path.parent) as is_ours:
        if plan := _read(path, key, seq_len):
            return plan
        plan = make_plan(bounds, num_documents, seq_len)
        is_kept = is_ours and _write(path, key, plan)
    where = path if is_kept else f"in memory only ({path.parent} cannot be written)"
    print(f"packed {prefix} into {plan.num_rows:,} rows of {seq_len}, {plan.used:.2%} of their positions used; {where}",
          file=sys.stderr)
    return plan


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder may be written; if so, one process at a time is inside."""
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False
        return
    try:
        with suppress(OSError):  # a file system without locks: several make the same file
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(lock)


def _arrays(num_long: int, num_rows: int, num_pieces: int) -> list[np.dtype]:
    """The arrays of a file in sequence, as types of so many elements."""
    sizes = [("<i8", num_long + 1), ("<i8", num_long), ("<i8", num_rows + 1), ("<i8", num_pieces), ("<i4", num_pieces)]
    return [np.dtype((kind, (size,))) for kind, size in sizes]


def _read(path: Path, key: bytes, seq_len: int) -> PackingPlan | None:
    """The plan in a file, mapped; None where it is not whole or has another key."""
    try:
        with open_regular(path) as file:
            magic, found_key, found_digest, sizes = HEADER.unpack(file.read(HEADER.size))
            digest = xxhash.xxh3_128(sizes)
            for block in iter(lambda: file.read(HASHED_BYTES), b""):
                digest.update(block)
            if (magic, found_key, found_digest) != (MAGIC, key, digest.digest()):
                return None
            data, at, arrays = np.asarray(np.memmap(file, dtype=np.uint8, mode="r")), HEADER.size, []
    except (OSError, UsageError, ValueError, struct.error):
        return None
    for dtype in _arrays(*SIZES.unpack(sizes)):
        arrays.append(data[at : at + dtype.itemsize].view(dtype.base))
        at += dtype.itemsize
    return PackingPlan(seq_len, *arrays)


def _write(path: Path, key: bytes, plan: PackingPlan) -> bool:
    """Whether the file is there now, whole; another process never sees a part of it."""
    arrays = [plan.full_row_D1, plan.full_start_D, plan.row_piece_R1, plan.start_P, plan.length_P]
    sizes = SIZES.pack(len(plan.full_start_D), len(plan.row_piece_R1) - 1, len(plan.start_P))
    digest, part = xxhash.xxh3_128(sizes), path.with_name(f"{path.name}.{os.getpid()}.part")
    for array in arrays:
        digest.update(array)
    try:
        with open(part, "wb") as file:
            file.write(HEADER.pack(MAGIC, key, digest.digest(), sizes))
            for array in arrays:
                array.tofile(file)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        return False
    return True

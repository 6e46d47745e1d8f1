"""Token files in Megatron-LM's indexed format (PREFIX.bin, PREFIX.idx), written byte for byte as its builder does.

.idx, little endian: 9-byte magic, u64 version 1, u8 dtype code, u64 n sequences, u64 m document entries,
int32 lengths[n], int64 byte pointers[n], int64 document indices[m] (first 0, last n).
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from dlm_scale.data.files import open_regular, sync
from dlm_scale.errors import UsageError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLUSH_TOKENS = 1 << 21
CHECKED_SEQUENCES = 1 << 20  # at a time, so that opening needs little memory
FLUSH_BYTES, INDEX_BLOCK, MAX_SEQUENCE = 1 << 20, 1 << 20, 1 << 30


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 below 65500 ids, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class IndexedWriter:
    """Appends documents, one sequence each (more of one beyond 2^30 tokens); the .idx, written by `close`, makes the
    pair complete.

    `resume` opens what is there: `skip` passes over ids that an earlier writer has synced, `add` writes the others.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, resume: bool = False):
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        path = self.prefix + ".bin"
        self._bin: IO[bytes] = open(path, "r+b" if resume and os.path.exists(path) else "wb", buffering=FLUSH_BYTES)
        self._lengths = array("i")  # 4 bytes a document
        self._continued: list[int] = []  # sequences that go on with the document of the one before
        self.num_tokens = self._open_length = 0

    def add_document(self, ids: np.ndarray) -> None:
        """ids: [L] of any integer type, L >= 1, that the dtype holds."""
        if not len(ids):
            raise UsageError(f"{self.prefix}.bin: a document of 0 tokens; the format holds 1 or more")
        self.add(ids, [len(ids)], [True])

    def add(self, ids: np.ndarray, lengths: Sequence[int], is_end: Sequence[bool]) -> None:
        """The ids of several documents, or of pieces of them, one behind the other; empty documents are left out."""
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._count(lengths, is_end)

    def skip(self, lengths: Sequence[int], is_end: Sequence[bool]) -> None:
        """As `add`, of ids that are in the file already."""
        self._count(lengths, is_end)
        self._bin.seek(self.num_tokens * self.dtype.itemsize)

    @property
    def is_inside(self) -> bool:
        """Whether a document has begun that has not ended."""
        return self._open_length > 0

    def lengths(self, start: int) -> list[int]:
        """Of the documents from number `start` on that have ended."""
        ends = np.append(np.setdiff1d(np.arange(len(self._lengths)), self._continued), len(self._lengths))
        sums = np.add.reduceat(np.frombuffer(self._lengths, "<i4"), ends[:-1], dtype=np.int64) if len(ends) > 1 else []
        return [int(length) for length in sums[start:]]

    def sync(self) -> None:
        """All ids so far are on the disk when this returns."""
        sync(self._bin)

    def close(self) -> None:
        """Finish both files."""
        self._bin.truncate()
        self.sync()
        self._bin.close()
        lengths, continued = np.frombuffer(self._lengths, dtype="<i4"), np.array(self._continued, dtype="<i8")
        with open(self.prefix + ".idx", "wb") as file:
            num_entries = len(lengths) + 1 - len(continued)
            file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), num_entries))
            file.write(lengths.data)
            at = 0
            for start in range(0, len(lengths), INDEX_BLOCK):
                sizes = lengths[start : start + INDEX_BLOCK].astype("<i8") * self.dtype.itemsize
                ends = at + np.cumsum(sizes)
                file.write((ends - sizes).data)
                at = ends[-1]
            for start in range(0, len(lengths) + 1, INDEX_BLOCK):
                numbers = np.arange(start, min(start + INDEX_BLOCK, len(lengths) + 1), dtype="<i8")
                file.write(numbers[~np.isin(numbers, continued)].data)
            sync(file)

    def _count(self, lengths: Sequence[int], is_end: Sequence[bool]) -> None:
        for length, ends in zip(lengths, is_end, strict=True):
            self.num_tokens += int(length)
            self._open_length += int(length)
            while self._open_length > MAX_SEQUENCE:
                self._lengths.append(MAX_SEQUENCE)
                self._continued.append(len(self._lengths))
                self._open_length -= MAX_SEQUENCE
            if ends and self._open_length:
                self._lengths.append(self._open_length)
                self._open_length = 0


class IndexedDataset:
    """A read-only view of one pair; opening it checks everything that the two files say of each other.

    `tokens`: all ids, [T] of uint16 or int32, mapped not read. `lengths` [n], `document_indices` [m]; `index` is the
    whole .idx as bytes.
    Raises UsageError naming the file and what is wrong in it.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = self.prefix + ".bin", self.prefix + ".idx"
        self.index = _map(self.idx_path)
        self.dtype, num_sequences = _read_header(self.index, self.idx_path)
        body = self.index[HEADER.size :]
        self.lengths = body[: 4 * num_sequences].view("<i4")
        pointers = body[4 * num_sequences : 12 * num_sequences].view("<i8")
        self.document_indices = body[12 * num_sequences :].view("<i8")
        self._pointers = pointers
        self._check_index(pointers)
        data = _map(self.bin_path)
        expected = int(pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if data.size != expected:
            cause = "cut short or still being written" if data.size < expected else "longer than its index says"
            _refuse(self.bin_path, f"{data.size} bytes where its index says {expected}: {cause}")
        self.tokens = data.view(self.dtype)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def document(self, i: int) -> np.ndarray:
        """Ids of document i, [L]."""
        start, stop = self.bounds(i, i + 1).tolist()
        return self.tokens[start:stop]

    def bounds(self, start: int, stop: int) -> np.ndarray:
        """Where documents start ... stop - 1 begin in `tokens`, and where the last of them ends; int64."""
        sequence = self.document_indices[start : stop + 1]
        ends = np.append(self._pointers[sequence[:-1]] // self.dtype.itemsize, len(self.tokens))
        if sequence[-1] < len(self.lengths):
            ends[-1] = self._pointers[sequence[-1]] // self.dtype.itemsize
        return ends

    def release(self) -> None:
        """What has been read need not stay resident; it is mapped again where it is read again."""
        for values in (self.tokens, self.index):
            _mapping(values).madvise(mmap.MADV_DONTNEED)

    def expect_random_reads(self, is_random: bool = True) -> None:
        """Whether tokens are read here and there: then what the system reads ahead of them costs much for nothing."""
        _mapping(self.tokens).madvise(mmap.MADV_RANDOM if is_random else mmap.MADV_NORMAL)

    def _check_index(self, pointers: np.ndarray) -> None:
        if pointers[0] != 0:
            _refuse(self.idx_path, f"byte pointers begin at {pointers[0]}, not at 0")
        for start in range(0, len(self.lengths), CHECKED_SEQUENCES):
            lengths = self.lengths[start : start + CHECKED_SEQUENCES]
            if lengths.min() <= 0:
                _refuse(self.idx_path, f"sequence {start + int(lengths.argmin())} has length {lengths.min()}")
            following = pointers[start + 1 : start + 1 + CHECKED_SEQUENCES]
            ends = pointers[start] + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            if not np.array_equal(following, ends[: len(following)]):
                _refuse(self.idx_path, "byte pointers do not follow from the sequence lengths (or from the dtype code)")
        documents = self.document_indices
        if documents[0] != 0 or documents[-1] != len(self.lengths) or (documents[1:] < documents[:-1]).any():
            _refuse(self.idx_path, f"document indices do not rise from 0 to {len(self.lengths)} sequences")


def _read_header(index: np.ndarray, path: str) -> tuple[np.dtype, int]:
    if index.size < HEADER.size:
        _refuse(path, f"{index.size} bytes are less than a header")
    magic, version, code, num_sequences, num_entries = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        _refuse(path, "not an index in Megatron's format (bad magic)")
    if version != 1:
        _refuse(path, f"version {version} of the format; only 1 is known")
    if code not in DTYPES:
        _refuse(path, f"dtype code {code}; token files are 4 (int32) or 8 (uint16)")
    if not num_sequences or num_entries < 2:
        _refuse(path, "no documents in it")
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    if index.size == expected + num_sequences:
        _refuse(path, "it carries modes of a multimodal dataset, which are not text")
    if index.size != expected:
        _refuse(path, f"{index.size} bytes where its header says {expected}")
    return DTYPES[code], num_sequences


def _map(path: str) -> np.ndarray:
    try:
        with open_regular(path) as file:
            # not an np.memmap: slicing one costs half of the reading time
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}. Is the prefix right (the path without .bin)?") from error
    except ValueError:
        _refuse(path, "it is empty")


def _mapping(array: np.ndarray) -> mmap.mmap:
    """The mapping that a view of `_map`'s array lies in."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def _refuse(path: str, cause: str) -> NoReturn:
    raise UsageError(f"{path}: {cause}. Copy the dataset again, or prepare it again")

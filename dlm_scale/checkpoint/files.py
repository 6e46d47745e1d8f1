"""The few operations on files that a checkpoint is made of: all that is written is fsynced, all reads are checked."""
from __future__ import annotations

import json
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import xxhash

from dlm_scale.errors import UsageError

CHUNK_BYTES = 16 << 20


class FileRecord(NamedTuple):
    size: int
    xxh3_128: str


def write_file(path: Path, parts: Iterable[Any]) -> FileRecord:
    """Create `path` from buffers, one at a time, and fsync it. Raises OSError, also when it exists already."""
    digest, size = xxhash.xxh3_128(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            data = memoryview(part).cast("B")
            size += len(data)
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start:start + CHUNK_BYTES]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(fd, chunk):]
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(size, digest.hexdigest())


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folders_above(path: Path) -> None:
    """Make the names on the way to `path` durable: its folder must agree, those further up may refuse (not ours)."""
    first, *others = path.resolve().parents
    fsync_folder(first)
    for folder in others:
        with suppress(OSError):
            fsync_folder(folder)


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Descriptor of a regular file. A link (which may leave the folder) or a pipe (which may block) is refused.

    Raises UsageError, also for any failure of the system while the descriptor is in use.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path.name}: not a regular file")
            yield fd
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise UsageError(f"{path.name}: missing") from None
    except OSError as error:
        reason = "a symbolic link" if path.is_symlink() else error.strerror
        raise UsageError(f"{path.name}: cannot be read ({reason})") from None


def read_at(fd: int, offset: int, size: int, name: str) -> bytearray:
    """Exactly `size` bytes at `offset`. Raises UsageError when the file ends before."""
    data = bytearray(size)
    read_into(fd, offset, memoryview(data), name)
    return data


def read_into(fd: int, offset: int, target: memoryview, name: str) -> None:
    """Fill `target`, of bytes, from `offset` on. Raises UsageError when the file ends before."""
    done, size = 0, len(target)
    while done < size:
        count = os.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            raise UsageError(f"{name}: ends at byte {offset + done}, {offset + size} expected")
        done += count


def read_file(path: Path, max_bytes: int) -> bytes:
    """The whole of a small file. Raises UsageError when it is larger than `max_bytes`."""
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise UsageError(f"{path.name}: {size} bytes, at most {max_bytes} expected")
        return bytes(read_at(fd, 0, size, path.name))


def check_record(fd: int, record: FileRecord, name: str, *, with_hash: bool) -> None:
    """Raise UsageError unless the file has the size (and hash) of `record`."""
    size = os.fstat(fd).st_size
    if size != record.size:
        raise UsageError(f"{name}: {size} bytes, the manifest says {record.size}")
    if not with_hash:
        return
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(CHUNK_BYTES, size)))
    for offset in range(0, size, CHUNK_BYTES):
        part = buffer[:size - offset]
        read_into(fd, offset, part, name)
        digest.update(part)
    if digest.hexdigest() != record.xxh3_128:
        raise UsageError(f"{name}: content has hash {digest.hexdigest()}, the manifest says {record.xxh3_128}")


def load_json(data: bytes, name: str) -> Any:
    """Strict JSON: no NaN, no key twice. Raises UsageError."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not valid JSON ({error})") from None


def dump_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

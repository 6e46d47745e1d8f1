"""What lies beside the output while it is made, so that a killed job finishes without a duplicate or a gap.

    OUT.state/manifest.json    what the results depend on: input, checkpoint, settings, numerics
              index.npy        the good lines of the input
              parts/           results, a file a worker, appended and synced a batch at a time
              times/           seconds of each batch
              locks/, *.lock   a lock a worker, held for as long as it lives; one to prepare, one to merge
              complete.json    size and hash of the merged output; the parts are gone then

A record of a part is `number hash json`: the number of the sample, XXH3 of the JSON, the line of the output. What a
kill leaves half-written has no right hash, or no end of line, and does not count.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dlm_scale.errors import UsageError

PLACE = np.dtype([("part", "<i4"), ("size", "<i4"), ("offset", "<i8")])
_HASH_CHARS = 16


class State:
    """The paths of one output. `worker` names this process among all that work on it."""

    def __init__(self, out: Path, worker: int = 0, num_workers: int = 1):
        self.out, self.folder = out, Path(f"{out}.state")
        self.errors, self.times = Path(f"{out}.errors.jsonl"), Path(f"{out}.times.jsonl")
        self.manifest, self.index = self.folder / "manifest.json", self.folder / "index.npy"
        self.complete = self.folder / "complete.json"
        self.worker = f"worker_{worker:05d}_of_{num_workers:05d}"
        self.part = self.folder / "parts" / f"{self.worker}.part"
        self.own_times = self.folder / "times" / f"{self.worker}.jsonl"

    def parts(self) -> list[Path]:
        return sorted((self.folder / "parts").glob("*.part"))

    def remove(self) -> None:
        """All of an output but the locks. The manifest goes first: without it nothing else counts."""
        for path in (self.manifest, self.complete, self.out, self.errors, self.times):
            path.unlink(missing_ok=True)
        self.clear()

    def clear(self) -> None:
        """Parts, and what writers that were killed have left."""
        for name in ("parts", "times"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for folder, name in ((self.folder, ""), (self.out.parent, f"{self.out.name}.")):
            for path in list(folder.iterdir()):
                if path.name.startswith(name) and path.name.endswith(".tmp"):
                    path.unlink(missing_ok=True)


def write_atomic(path: Path, pieces: Iterable[bytes]) -> None:
    """The whole file or none of it, durably. Raises OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> "dict[str, Any] | None":
    """A small JSON object of ours, None where there is none. Raises UsageError where it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): start anew with --overwrite") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged (not an object): start anew with --overwrite")
    return value


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """`key: before -> now` for each value that differs, by dotted key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))
    elif old != new:
        yield f"{name}: {json.dumps(old)[:80]} -> {json.dumps(new)[:80]}"


@contextmanager
def worker_lock(state: State) -> Iterator[None]:
    """Held while this worker works. Raises UsageError where another job works on the output."""
    folder = state.folder / "locks"
    folder.mkdir(exist_ok=True)
    num_workers = state.worker.partition("_of_")[2]
    with _lock(folder / state.worker, wait=False) as is_ours:
        others = [path for path in folder.iterdir() if path.name.partition("_of_")[2] != num_workers]
        busy = [path for path in others if _is_held(path)] if is_ours else [folder / state.worker]
        if busy:
            holder = busy[0].name.replace("_", " ")
            raise UsageError(f"{state.out} is being written by another job ({holder}): wait for it, or stop it; or "
                             "choose another --output")
        yield


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Whether we have it. A file system without locks refuses nobody: there is nothing to tell by."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        is_ours = True
    except OSError as error:
        is_ours = not isinstance(error, BlockingIOError)
    try:
        yield is_ours
    finally:
        os.close(fd)


def _is_held(path: Path) -> bool:
    with _lock(path, wait=False) as is_ours:
        return not is_ours


def preparing(state: State) -> AbstractContextManager:
    """One at a time sets up the folder of an output: the tasks of an array start together."""
    state.folder.mkdir(exist_ok=True)
    return _lock(state.folder / "prepare.lock", wait=True)


class Part:
    """The results of one worker, opened for appending; what a kill left half-written is cut off first."""

    def __init__(self, path: Path):
        path.parent.mkdir(exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._fd, _end_of_last_line(self._fd))
        sync_folder(path.parent)

    def append(self, rows: Sequence[tuple[int, dict]]) -> None:
        """Add (sample number, output row) and return when they are on the disk. Raises OSError."""
        data = memoryview(b"".join(encode_record(number, row) for number, row in rows))
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._fd)


def _end_of_last_line(fd: int) -> int:
    end, chunk = os.fstat(fd).st_size, 1 << 16
    while end > 0:
        start = max(0, end - chunk)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def encode_record(number: int, row: dict) -> bytes:
    """A line of a part."""
    line = json.dumps(row, ensure_ascii=False, separators=(", ", ": ")).encode()
    return b"%d %s %s\n" % (number, xxhash.xxh3_64_hexdigest(line).encode(), line)


def find_results(parts: Sequence[Path], total: int) -> np.ndarray:
    """PLACE [total] of each sample's line of output; size 0 where there is none yet."""
    places = np.zeros(total, dtype=PLACE)
    for number, path in enumerate(parts):
        offset = 0
        with open(path, "rb") as file:
            for record in file:
                sample, start = _checked_record(record)
                if sample is not None and sample < total:
                    places[sample] = (number, len(record) - start - 1, offset + start)
                offset += len(record)
    return places


def _checked_record(record: bytes) -> tuple["int | None", int]:
    """(sample number, where its JSON starts), or None where the record is not whole."""
    digits, space, _ = record[:24].partition(b" ")
    start = len(digits) + 1 + _HASH_CHARS + 1
    is_whole = space and digits.isdigit() and record.endswith(b"\n") and record[start - 1 : start] == b" "
    if not is_whole or xxhash.xxh3_64_hexdigest(record[start:-1]).encode() != record[len(digits) + 1 : start - 1]:
        return None, 0
    return int(digits), start


def results_in_order(parts: Sequence[Path], places: np.ndarray) -> Iterator[bytes]:
    """The lines of output, without their ends."""
    files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in parts]
    try:
        for part, size, offset in places.tolist():
            yield os.pread(files[part], size, offset)
    finally:
        for fd in files:
            os.close(fd)


def merge(state: State, total: int, write: Callable[[Path, Iterator[bytes]], None]) -> "dict[str, Any] | None":
    """Make the output if all its results are there; what complete.json says of it, or None.

    Whoever finds them complete does it; the others wait and find it done. `write(path, lines)` writes one format.
    """
    with _lock(state.folder / "merge.lock", wait=True):
        if (done := read_json(state.complete)) is not None:
            return done
        parts = state.parts()
        places = find_results(parts, total)
        if not places["size"].all():
            return None
        write(state.out, results_in_order(parts, places))
        write_atomic(state.times, _whole_lines(sorted((state.folder / "times").glob("*.jsonl"))))
        done = describe(state.out) | {"results": total}
        write_atomic(state.complete, [json.dumps(done).encode()])
        state.clear()
        return done


def _whole_lines(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file. Raises OSError."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"size": file.tell(), "xxh3_128": digest.hexdigest()}

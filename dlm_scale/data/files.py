"""Reading what others may have written: only regular files (a pipe would block), and JSON of any content; writing that
survives a power failure."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from dlm_scale.errors import UsageError


def open_regular(path: str | Path) -> IO[bytes]:
    """The file, or what it links to, opened for reading. Raises OSError, and UsageError where it is no regular file."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError(f"{path} is not a regular file. Copy the file itself there")
    return file


def read_regular(path: str | Path) -> bytes:
    """The whole of it. Raises as `open_regular`, and UsageError where it does not fit into memory."""
    with open_regular(path) as file:
        try:
            return file.read()
        except MemoryError:
            size = os.fstat(file.fileno()).st_size
            raise UsageError(f"{path}: {size / 1e9:.1f} GB do not fit into memory. Give it in smaller files") from None


def sync(file: IO[bytes]) -> None:
    """What was written is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """So are the names in it."""
    folder_fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def parse_json(raw: bytes, where: str, what: str, remedy: str = "") -> Any:
    """The value. Raises UsageError `where ... what (cause)`, also where it is nested too deeply."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} {what} ({error}){remedy}") from error

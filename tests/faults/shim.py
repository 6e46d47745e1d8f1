"""The fault shim (shim.c): compiled when it is needed, preloaded into a process, steered from inside it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


class NoCompiler(RuntimeError):
    """The shim is C and there is nothing here to compile it with."""


class Mode(IntEnum):
    COUNT, KILL, ENOSPC, EIO, RECORD = range(5)


@functools.cache
def compiled() -> Path:
    """The shared library, compiled once a process. Raises NoCompiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        raise NoCompiler("faults in file operations need Linux and a C compiler (cc) on PATH")
    library = Path(tempfile.mkdtemp(prefix="fault-shim-")) / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def preloaded(**fault: object) -> dict[str, str]:
    """The environment of a process with the shim; `folder`, `mode` (kill, enospc, eio) and `at` arm it from the start."""
    return os.environ | {"LD_PRELOAD": str(compiled())} | {f"FAULT_{k.upper()}": str(v) for k, v in fault.items()}


class Shim:
    """The shim inside this process, which must have been started with `preloaded()`."""

    def __init__(self):
        self._library = ctypes.CDLL(None)
        self._library.fault_count.restype = ctypes.c_long
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # the full disk is full for all forked ranks
        self._is_full = ctypes.c_int.from_buffer(self._shared)

    def arm(self, folder: Path, mode: Mode = Mode.COUNT, at: int = 0, log_fd: int = -1) -> None:
        self._library.fault_arm(os.fsencode(folder), int(mode), ctypes.c_long(at), log_fd, ctypes.byref(self._is_full))

    def free_space(self) -> None:
        self._is_full.value = 0

    def mark(self, number: int) -> None:
        self._library.fault_mark(ctypes.c_long(number))

    @property
    def count(self) -> int:
        return self._library.fault_count()

"""One job a run folder: RUN/control/lock, held by rank 0 for as long as it lives.

The system's lock ends with its holder. Where the file system does not share locks between machines, or keeps those of
a machine that died, the content decides: a holder on this machine is looked up by its process number and start time;
of one elsewhere the content must change while we watch, for the holder counts its heartbeats there.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dlm_scale.errors import UsageError

HEARTBEAT_SECONDS = 5.0
PATIENCE_SECONDS = 30.0


class RunLock:
    """The lock of `out`, taken. Raises UsageError naming the holder where another job has it."""

    def __init__(self, out: Path, patience_seconds: float = PATIENCE_SECONDS):
        self.path = out / "control" / "lock"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._take(patience_seconds)
        except OSError as error:
            raise UsageError(f"train.out={out}: cannot write there ({error}); check the path, its owner and the free "
                             "space") from None
        self._identity = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid()),
                          "job": os.environ.get("SLURM_JOB_ID"), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._beats, self._released = 0, threading.Event()
        self._write()
        threading.Thread(target=self._keep, name="run lock", daemon=True).start()

    def _take(self, patience: float) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        is_locked, holder = _try_lock(fd), _read(self.path)
        if holder and _is_held(holder, self.path, patience) or not holder and not is_locked:
            os.close(fd)
            named = "process {pid} on {host}, since {since}".format_map(holder) if holder else "a job that just starts"
            raise UsageError(f"train.out={self.path.parents[1]} is in use by {named}: wait for it, stop it (touch "
                             f"{self.path.with_name('stop')}), or choose another train.out")
        if holder:
            logging.getLogger("dlm_scale").warning("recovered the lock of a job that is gone: %s", holder)
        if not is_locked:  # a lock that the file system kept for a dead holder: its file is left to it
            os.close(fd)
            self.path.unlink()
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _try_lock(fd)
        return fd

    def _write(self) -> None:
        text = json.dumps(self._identity | {"beats": self._beats}).ljust(512)
        os.pwrite(self._fd, text.encode(), 0)
        os.fsync(self._fd)

    def _keep(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            self._beats += 1
            try:
                self._write()
                is_ours = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
            except OSError:  # no room, or the folder is gone: the training itself says so
                continue
            if not is_ours:
                logging.getLogger("dlm_scale").critical("another job took over %s: this one ends", self.path.parents[1])
                os._exit(1)

    def release(self) -> None:
        self._released.set()
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def _try_lock(fd: int) -> bool:
    """False where someone holds it. A file system without locks refuses nobody: there the content decides alone."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        return content if {"host", "pid", "started", "since"} <= content.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_held(holder: dict[str, Any], path: Path, patience: float) -> bool:
    if holder["host"] == socket.gethostname():
        return holder["started"] is not None and _start_of(holder["pid"]) == holder["started"]
    if holder.get("job") and holder["job"] == os.environ.get("SLURM_JOB_ID"):  # requeued: its last attempt has ended
        return False
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))
        if _read(path) != holder:
            return True
    return False


def _start_of(pid: int) -> str | None:
    """When a living process of this machine started, in ticks since it booted; None where there is none."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else fields[19]

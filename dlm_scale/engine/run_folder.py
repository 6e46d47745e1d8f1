"""A run's folder: resolved config, metrics, logs, status. Written by rank 0, whole files by rename."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import dlm_scale
from dlm_scale.errors import UsageError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` durably: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def provenance() -> dict[str, Any]:
    """Versions and git commit, for the run folder and every checkpoint."""
    import deepspeed
    import torch

    return {
        "dlm_scale": dlm_scale.__version__,
        "git_commit": _git_commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def _git_commit() -> str | None:
    """The commit of the source tree, or of the one that a job's copy was made of; None where neither is known."""
    root = Path(__file__).parents[2]
    with suppress(OSError):
        return (root / "git_commit").read_text().strip() or None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def prepare_folder(out: Path, resume: str, has_checkpoint: bool) -> None:
    """Make the folder, or refuse: `never` wants it empty, `must` wants a checkpoint to go on from."""
    if resume == "never" and out.exists() and any(out.iterdir()):
        raise UsageError(f"train.out={out}: the folder is not empty and train.resume=never; "
                         "choose another train.out, or train.resume=auto to continue it")
    if resume == "must" and not has_checkpoint:
        raise UsageError(f"train.out={out}: no good checkpoint to resume from and train.resume=must; "
                         "check the path, or use train.resume=auto to start anew")
    for folder in ("checkpoints", "control", "logs", "plots"):
        (out / folder).mkdir(parents=True, exist_ok=True)


def open_log(out: Path, rank: int) -> logging.Logger:
    """Every rank has its log file (train.log is rank 0's); only rank 0 also speaks on stderr."""
    logger = logging.getLogger("dlm_scale")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    path = out / "train.log" if rank == 0 else out / "logs" / f"rank_{rank:05d}.log"
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setFormatter(logging.Formatter("%(message)s"))
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    for handler in handlers:
        logger.addHandler(handler)
    return logger


class Metrics:
    """metrics.jsonl: a line a logged step. Opening it for a resumed run drops the lines after the resumed step.

    A line that cannot be written is kept and tried again with the next; that is said once.
    """

    def __init__(self, path: Path, resumed_step: int):
        kept = [line for line in _lines(path) if _step_of(line) <= resumed_step] if resumed_step else []
        text = "".join(line + "\n" for line in kept).encode()
        write_atomically(path, text)
        self._path, self._size, self._pending, self._is_failing = path, len(text), b"", False

    def write(self, record: dict[str, Any]) -> None:
        self._pending += json.dumps(record).encode() + b"\n"
        log = logging.getLogger("dlm_scale")
        try:
            self._flush(log)
        except OSError as error:
            if not self._is_failing:
                log.error("METRICS NOT WRITTEN, training goes on: %s; the lines wait in memory", error)
            self._is_failing = True
        else:
            if self._is_failing:
                log.warning("metrics are written again, with the lines that waited")
            self._is_failing = False

    def _flush(self, log: logging.Logger) -> None:
        """All pending lines after the last whole one: a write that failed may have left a part."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = min(self._size, os.fstat(fd).st_size)
            if size < self._size:
                log.error("%s has vanished: its lines so far are lost", self._path)
            os.ftruncate(fd, size)
            while self._pending:
                written = os.pwrite(fd, self._pending, size)
                size, self._pending = size + written, self._pending[written:]
                self._size = size
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Make the lines so far durable: a checkpoint must not outlive the lines of its steps."""
        with suppress(OSError), open(self._path) as file:
            os.fsync(file.fileno())


def _lines(path: Path) -> list[str]:
    """Whole lines only: a run that was killed may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().split("\n")[:-1] if line]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file."""
    return [json.loads(line) for line in _lines(path) if _step_of(line) != float("inf")]


def read_status(out: Path) -> dict[str, Any]:
    """status.json; empty where there is none that can be read."""
    try:
        status = json.loads((out / "status.json").read_text())
        return status if isinstance(status, dict) else {}
    except (OSError, ValueError):
        return {}


def write_status(out: Path, status: dict[str, Any]) -> None:
    """Replace status.json. A disk that refuses is said: it stops no training."""
    try:
        write_atomically(out / "status.json", (json.dumps(status, indent=1) + "\n").encode())
    except OSError as error:
        logging.getLogger("dlm_scale").error("status.json not written: %s", error)

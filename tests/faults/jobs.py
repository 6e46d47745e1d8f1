"""Training jobs that may be killed, stopped or starved: `dlm train` in forked ranks, with the environment of a launcher.

The process that forks them must have imported everything and started no thread: `python -m tests.faults.training`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm_scale import cli
from dlm_scale.data.prepare import prepare
from tests.forked import free_port

SECONDS = 90.0
VOLATILE = ("tokens_per_second", "mfu", "seconds", "rank_seconds", "slowest_rank")
CONFIG = """
model: {{num_layers: 4, hidden_size: {width}, num_heads: 4, seq_len: 32}}
data: {{train: {folder}/data/train, validation: {folder}/data/val}}
train: {{global_batch_size: 8, micro_batch_size: 2, num_steps: {steps}, precision: fp32, log_every: 1, eval_every: 20,
         eval_rows: 8, eval_draws: 2, save_every: 4, keep_last: 2, ema_decay: 0.9, seed: 3, device: cpu, out: unset}}
optimizer: {{learning_rate: 1e-3, warmup_steps: 4}}
deepspeed: {{zero_optimization: {{stage: 1}}}}
"""
TEXT = "it was the best of times, it was the worst of times; \n" * 300


def make_config(folder: Path, steps: int, width: int) -> Path:
    """A config of a small model on a small text, both below `folder`."""
    (folder / "text.txt").write_text(TEXT)
    prepare([str(folder / "text.txt")], "char", folder / "data")
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(folder=folder, steps=steps, width=width))
    return path


@dataclass
class Job:
    """`dlm train CONFIG train.out=OUT ...` on some ranks. `change(rank)` runs in each of them first."""

    config: Path
    out: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 2
    change: Callable[[int], None] = lambda rank: None
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)

    def start(self) -> Job:
        self.out.mkdir(parents=True, exist_ok=True)
        port = free_port()
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                self._become_rank(rank, port)
            self.pids.append(pid)
        return self

    def _become_rank(self, rank: int, port: int) -> None:
        code = 70
        try:
            said = os.open(self.out.parent / f"{self.out.name}.rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(self.ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1",
                              LOCAL_WORLD_SIZE=str(self.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            self.change(rank)
            code = cli.main(["train", str(self.config), f"train.out={self.out}", *self.overrides])
        finally:
            os._exit(code)

    def poll(self) -> bool:
        """Whether any rank lives; notes the exit codes of those that ended, and when."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(done[1]), time.monotonic()
        return len(self.codes) < self.ranks

    def wait(self, seconds: float = SECONDS) -> list[int | None]:
        """The exit codes; None for a rank that had to be killed."""
        deadline = time.monotonic() + seconds
        while self.poll() and time.monotonic() < deadline:
            time.sleep(0.005)
        return [self.codes.get(rank) for rank in range(self.ranks)]

    def end(self) -> None:
        """Kill what is left."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def send(self, rank: int, number: int) -> None:
        if rank not in self.codes:
            os.kill(self.pids[rank], number)

    def wait_until(self, is_true: Callable[[], Any], seconds: float = SECONDS) -> bool:
        """False where the job ends, or the time passes, before it is true."""
        deadline = time.monotonic() + seconds
        while not is_true():
            if not self.poll() or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def catches(self, number: int) -> bool:
        """Whether all ranks have a handler for the signal by now."""
        for rank, pid in enumerate(self.pids):
            try:
                fields = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                if rank not in self.codes and not int(fields["SigCgt"], 16) >> (number - 1) & 1:
                    return False
            except (OSError, ValueError, KeyError):
                return False
        return True

    def said(self) -> str:
        files = (self.out.parent / f"{self.out.name}.rank{rank}.txt" for rank in range(self.ranks))
        return " | ".join(" ".join(path.read_text()[-600:].split()) for path in files if path.exists())


def run_to_end(job: Job) -> list[int | None]:
    """Start it, leave it alone, and take its exit codes."""
    job.start()
    try:
        return job.wait()
    finally:
        job.end()


def status(out: Path) -> dict[str, Any]:
    """status.json; empty where there is none."""
    try:
        return json.loads((out / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def losses(out: Path) -> list[dict[str, Any]]:
    """All that metrics.jsonl says and that must not depend on the moment; one unreadable line is an error."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in found]

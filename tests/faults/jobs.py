"""Training jobs that may be killed, stopped or starved: `dlm train` in forked ranks, with the environment of a launcher.

The process that forks them must have imported everything and started no thread: `python -m tests.faults.training`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dlm_scale import cli
from dlm_scale.data.prepare import prepare
from tests.forked import free_port

SECONDS = 90.0
VOLATILE = ("tokens_per_second", "mfu", "data_wait", "seconds", "rank_seconds", "slowest_rank")
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


class ForkedRank:
    """A forked process, with those methods of subprocess.Popen that are needed, and the time at which it ended."""

    def __init__(self, work: Callable[[], None]):
        self.code: int | None = None
        self.ended = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work()
            finally:
                os._exit(70)

    def poll(self) -> int | None:
        if self.code is None and (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code, self.ended = os.waitstatus_to_exitcode(done[1]), time.monotonic()
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.002)
        return self.code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def fork_ranks(arguments: list[str], ranks: int, log: Path, change: Callable[[int], None]) -> list[ForkedRank]:
    """`dlm train` once a rank; what rank r says goes to LOG.r."""
    port = free_port()

    def train(rank: int) -> None:
        said = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1",
                          LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        change(rank)
        os._exit(cli.main(["train", *arguments]))

    return [ForkedRank(partial(train, rank)) for rank in range(ranks)]


@dataclass
class Job:
    """`dlm train CONFIG train.out=OUT ...` on some ranks. `change(rank)` runs in each of them first."""

    config: Path
    out: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 2
    change: Callable[[int], None] = lambda rank: None
    processes: list[ForkedRank] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".said")

    def start(self) -> Job:
        arguments = [str(self.config), f"train.out={self.out}", *self.overrides]
        self.processes = fork_ranks(arguments, self.ranks, self.log, self.change)
        return self

    def lives(self) -> bool:
        return None in [process.poll() for process in self.processes]  # asks each, so that each has its time

    def wait(self, seconds: float = SECONDS) -> list[int | None]:
        """The exit codes; None for a rank that had to be killed."""
        self.wait_until(lambda: False, seconds)
        return [process.poll() for process in self.processes]

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def wait_until(self, is_true: Callable[[], Any], seconds: float = SECONDS) -> bool:
        """False where the job ends, or the time passes, before it is true."""
        deadline = time.monotonic() + seconds
        while not is_true():
            if not self.lives() or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def catches(self, number: int) -> bool:
        """Whether all ranks have a handler for the signal by now."""
        try:
            return all(_caught(process.pid) >> (number - 1) & 1 for process in self.processes)
        except (OSError, ValueError, StopIteration):
            return False

    def said(self) -> str:
        files = [Path(f"{self.log}.{rank}") for rank in range(self.ranks)]
        return " | ".join(" ".join(path.read_text()[-600:].split()) for path in files if path.exists())


def _caught(pid: int) -> int:
    """Bits of the signals that a process has handlers for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)


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

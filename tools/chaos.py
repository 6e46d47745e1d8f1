"""A training run under random faults: python tools/chaos.py CONFIG --out DIR [--ranks N] [--every N] [section.key=value]

Trains CONFIG twice below DIR: `calm`, left alone, and `storm`, with a fault about every so many steps: a rank killed, a
signal, the newest checkpoint damaged, the disk full or failing at a random operation of a save (this needs Linux and
cc). Every time the same command starts again, until the run has finished. Its losses and weights must then equal those
of the calm one, bit for bit. Prints one JSON object; exit code 1 where they differ. Needs train.keep_last >= 2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dlm_scale.checkpoint.folders import list_checkpoints
from tests.faults.shim import NoCompiler, preloaded

FAULTS = ("kill", "signal", "damage", "disk")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
GONE_SECONDS = 60.0  # that the other ranks are given to end by themselves
STILL_SECONDS = 600.0  # without a new step
MAX_OPERATION = 200
Launch = Callable[[list[str], int, dict[str, str], Path], Sequence[Any]]


def launch_processes(arguments: list[str], ranks: int, fault: dict[str, str], log: Path) -> list[subprocess.Popen]:
    """`python -m dlm_scale.train` once a rank, with a launcher's environment and, where `fault` says so, the shim."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = (preloaded(**fault) if fault else dict(os.environ)) | {
        "PYTHONPATH": path, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}
    command = [sys.executable, "-m", "dlm_scale.train", *arguments]
    with open(log, "ab") as said:
        return [subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                 stdin=subprocess.DEVNULL, stdout=said, stderr=said) for rank in range(ranks)]


@dataclass
class Storm:
    """One run that is disturbed until it has finished."""

    arguments: list[str]
    out: Path
    ranks: int
    every: int
    faults: Sequence[str]
    random: random.Random
    launch: Launch
    counts: Counter = field(default_factory=Counter)
    executed: int = 0
    outages: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Raises RuntimeError where the run does not come up again, or stands still."""
        disk: dict[str, str] = {}
        while status_of(self.out).get("status") != "finished":
            start, had_disk_fault, is_up = self.resumed_step(), bool(disk), False
            target = self.step() + self.random.randint(1, 2 * self.every - 1)
            processes = self.launch(self.arguments, self.ranks, disk, self.out.with_suffix(".log"))
            try:
                is_up = self._wait_for_step(target, processes, start)
                disk = self._strike(self.random.choice(self.faults), processes)
            finally:
                codes = self._end(processes)
            self.counts["attempts"] += 1
            self.executed += self.step() - start if is_up else 0
            if 2 in codes and not had_disk_fault:  # an error of the disk while reading is refused too
                raise RuntimeError(f"the run was refused: see {self.out.with_suffix('.log')}")

    def step(self) -> int:
        """The last step that metrics.jsonl has."""
        return max((line["step"] for line in lines_of(self.out)), default=0)

    def resumed_step(self) -> int:
        return max((int(path.name[5:13]) for path in list_checkpoints(self.out)), default=0)

    def _wait_for_step(self, target: int, processes: Sequence[Any], start: int) -> bool:
        """Until that step, or the end of a process; whether the run came up: its first new step is there."""
        began = last = time.monotonic()
        is_cut = is_up = False  # whether the lines after the resumed step are gone, and there are new ones
        seen = self.step()
        while self.step() < target and all(process.poll() is None for process in processes):
            if (now := self.step()) != seen:
                seen, last = now, time.monotonic()
            is_cut = is_cut or now <= start
            if is_cut and now > start and not is_up:
                is_up = True
                self.outages.append(last - began)
            if time.monotonic() - last > STILL_SECONDS:
                raise RuntimeError(f"no new step for {STILL_SECONDS:.0f} s after step {seen}")
            time.sleep(0.01)
        return is_up or is_cut and self.step() > start

    def _strike(self, fault: str, processes: Sequence[Any]) -> dict[str, str]:
        """The fault; returns the shim's settings of the next attempt."""
        if any(process.poll() is not None for process in processes):
            return {}  # it was over, or the disk had its fault, before this one
        self.counts[fault] += 1
        if fault == "signal":
            self.random.choice(processes).send_signal(self.random.choice(STOP_SIGNALS))
            return {}
        self.random.choice(processes).send_signal(signal.SIGKILL)
        self._end(processes)
        if fault == "damage" and len(found := list_checkpoints(self.out)) > 1:  # of one alone no run could go on
            damage(self.random.choice(sorted(found[-1].iterdir())), self.random)
        if fault != "disk":
            return {}
        return {"folder": str(self.out / "checkpoints"), "mode": self.random.choice(("enospc", "eio", "kill")),
                "at": str(self.random.randint(1, MAX_OPERATION))}

    @staticmethod
    def _end(processes: Sequence[Any]) -> list[int]:
        """The exit codes; what has not ended by itself in time is killed."""
        deadline = time.monotonic() + GONE_SECONDS
        while lives := [process for process in processes if process.poll() is None]:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                lives[0].send_signal(signal.SIGKILL)
        return [process.wait() for process in processes]


def damage(path: Path, rng: random.Random) -> None:
    """Cut a file short, or flip a bit of it."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(rng.choice((data, data[:at])))


def status_of(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl that have a loss."""
    try:
        whole = (out / "metrics.jsonl").read_text().split("\n")[:-1]
        return [line for line in map(json.loads, whole) if "loss" in line]
    except (OSError, ValueError):
        return []


def soak(config: str, out: Path, *, ranks: int = 1, every: int = 20, seed: int = 0, faults: Sequence[str] = FAULTS,
         overrides: Sequence[str] = (), launch: Launch = launch_processes) -> dict[str, Any]:
    """Run both; the report. `goodput`: share of executed steps that were not lost again. Raises RuntimeError."""
    out.mkdir(parents=True, exist_ok=True)
    calm, storm = ([config, f"train.out={out / name}", "train.log_every=1", *overrides] for name in ("calm", "storm"))
    codes = [process.wait() for process in launch(calm, ranks, {}, out / "calm.log")]
    if any(codes):
        raise RuntimeError(f"the calm run ended with {codes}: see {out / 'calm.log'}")
    run = Storm(storm, out / "storm", ranks, every, faults, random.Random(seed), launch)
    run.run()
    ends = [status_of(out / name) for name in ("calm", "storm")]
    losses = [[(line["step"], line["loss"], line["batch_hash"]) for line in lines_of(out / name)]
              for name in ("calm", "storm")]
    is_equal = ends[0]["weights_hash"] == ends[1]["weights_hash"] and losses[0] == losses[1]
    return {"equal": is_equal, "steps": ends[1]["step"], "ranks": ranks, **run.counts,
            "goodput": round(ends[1]["step"] / max(1, run.executed), 3), "weights_hash": ends[1]["weights_hash"],
            "median_recovery_seconds": sorted(run.outages)[len(run.outages) // 2] if run.outages else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--every", type=int, default=20, help="mean number of steps between two faults (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="default: all")
    arguments = vars(parser.parse_intermixed_args())
    try:
        report = soak(**arguments)
    except (RuntimeError, NoCompiler) as error:
        print(f"chaos: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())

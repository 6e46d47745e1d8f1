"""Faults in training runs: `python -m tests.faults.training FOLDER ROW:COUNT ... [--width W] [--seed S]`.

Every case is compared with the run that nothing disturbed: all lines of its metrics.jsonl, bit for bit, and the hash of
its last weights. Prints a JSON object: row -> [count, [what went wrong, ...], {measurement: value}].
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import deepspeed
import matplotlib.pyplot  # noqa: F401  (once, before any fork; so are the others)
import torch

import dlm_scale.checkpoint.writer
import dlm_scale.data.loader
import dlm_scale.engine.session  # noqa: F401
import dlm_scale.model.transformer
from dlm_scale.checkpoint.folders import find_checkpoint
from tests.faults.jobs import Job, fork_ranks, losses, make_config, run_to_end, status
from tests.faults.shim import Mode, Shim

ROOT = Path(__file__).resolve().parents[2]
STEPS, AHEAD = 30, 20  # a killed run has at least so many steps still before it
BREATH = 0.01  # seconds that a forward pass takes longer, so that random moments fall into training too
HANG_SECONDS = 4.0
PHASES: dict[str, tuple[object, str]] = {  # what is called in each
    "data": (dlm_scale.data.loader.Windows, "rows"),
    "forward": (dlm_scale.model.transformer.Transformer, "forward"),
    "backward": (deepspeed.DeepSpeedEngine, "backward"),
    "step": (deepspeed.DeepSpeedEngine, "step"),
    "save": (dlm_scale.checkpoint.writer, "write_file"),
}


def wrap(phase: str, act: Callable[[int, bool], None]) -> None:
    """In this process, call `act(number, is_over)` before and after every call of a phase's function."""
    owner, name = PHASES[phase]
    real, calls = getattr(owner, name), [0]

    def changed(*arguments, **options):
        calls[0] += 1
        number = calls[0]
        act(number, False)
        result = real(*arguments, **options)
        act(number, True)
        return result

    setattr(owner, name, changed)


def breathe() -> None:
    wrap("forward", lambda number, is_over: None if is_over else time.sleep(BREATH))


class Trials:
    """Runs of one config below one folder, and the one that nothing disturbed."""

    def __init__(self, folder: Path, width: int, seed: int):
        self.folder, self.random, self.number = folder, random.Random(seed), 0
        self.config = make_config(folder, STEPS, width)
        self.whole = folder / "whole"
        self.calls = {}
        started = time.monotonic()
        codes = run_to_end(job := Job(self.config, self.whole, change=self._count))
        if codes != [0, 0]:
            raise RuntimeError(f"the undisturbed run ended with {codes}: {job.said()}")
        self.seconds = time.monotonic() - started
        self.calls = {phase: int((folder / f"calls-{phase}").read_text()) for phase in PHASES}

    def _count(self, rank: int) -> None:
        for phase in PHASES if rank == 1 else ():
            wrap(phase, lambda number, is_over, phase=phase: (self.folder / f"calls-{phase}").write_text(str(number)))

    def fresh(self, name: str) -> Path:
        self.number += 1
        return self.folder / f"{name}-{self.number}"

    def compare(self, out: Path) -> str | None:
        """What differs from the undisturbed run."""
        found, wanted = status(out), status(self.whole)
        if found.get("status") != "finished" or found.get("weights_hash") != wanted["weights_hash"]:
            return f"ended as {found}"
        ours, theirs = losses(out), losses(self.whole)
        if ours != theirs:
            first = next((a for a, b in zip(ours, theirs) if a != b), f"{len(ours)} lines, not {len(theirs)}")
            return f"other lines, from {first}"
        return None

    def kills(self, count: int) -> Iterator[tuple[str | None, dict]]:
        """SIGKILL of a random rank in each phase by turns, before or after the call, early enough that 20 steps remain."""
        for number in range(count):
            phase, victim = list(PHASES)[number % len(PHASES)], self.random.randrange(2)
            at = self.random.randint(1, max(1, self.calls[phase] * (STEPS - AHEAD - 2) // STEPS))
            yield self._kill(phase, victim, at, self.random.random() < 0.5)

    def _kill(self, phase: str, victim: int, at: int, when_over: bool) -> tuple[str | None, dict]:
        out = self.fresh("kill")
        where = f"rank {victim} killed {'after' if when_over else 'in'} {phase} {at}"

        def act(number: int, is_over: bool) -> None:
            if number == at and is_over == when_over:
                signal.raise_signal(signal.SIGKILL)

        job = Job(self.config, out, change=lambda rank: wrap(phase, act) if rank == victim else None).start()
        codes = job.wait()
        job.end()
        if codes[victim] != -9 or codes[1 - victim] in (None, 0):
            return f"{where}: the ranks ended with {codes}", {}
        notes = {"others gone": job.processes[1 - victim].ended - job.processes[victim].ended}
        started = time.monotonic()
        codes = run_to_end(again := Job(self.config, out))
        notes["recovery"] = time.monotonic() - started
        problem = f"resumed, the ranks ended with {codes}: {again.said()}" if codes != [0, 0] else self.compare(out)
        if not problem and notes["others gone"] > 15.0:
            problem = f"the other rank lived for {notes['others gone']:.0f} s"
        shutil.rmtree(out)
        return problem and f"{where}: {problem}", notes

    def signals(self, count: int) -> Iterator[tuple[str | None, dict]]:
        """Signals to one rank or both, once or twice, at random moments from the start of the program on."""
        sent, out = 0, self.fresh("signals")
        while sent < count:
            problem, notes = self._signal(out)
            if notes:
                sent += 1
                yield problem, notes
            if problem:
                out = self.fresh("signals")
            elif status(out).get("status") == "finished":
                problem = self.compare(out)
                if problem:
                    yield f"after signals: {problem}", {}
                out = self.fresh("signals")
        if status(out) and status(out)["status"] == "stopped":
            codes = run_to_end(Job(self.config, out))
            problem = self.compare(out) if codes == [0, 0] else f"the ranks ended with {codes}"
            if problem:
                yield f"after signals: {problem}", {}

    def _signal(self, out: Path) -> tuple[str | None, dict]:
        """(what went wrong, notes); no notes where the run was over before the signal."""
        rng, before = self.random, status(out).get("step", 0)
        job = Job(self.config, out, change=lambda rank: breathe()).start()
        job.wait_until(partial(job.catches, signal.SIGUSR1))
        delay = rng.uniform(0.0, self.seconds)
        if job.wait_until(lambda: False, delay) or not job.lives():
            job.end()
            return None, {}
        number = rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT))
        started = time.monotonic()
        for rank in rng.choice(([0], [1], [0, 1], [1, 1])):
            job.processes[rank].send_signal(number)
        codes = job.wait()
        job.end()
        found, spent = status(out), time.monotonic() - started
        where, notes = f"{number.name} after {delay:.2f} s", {"seconds to stop": spent}
        if codes != [0, 0]:
            return f"{where}: the ranks ended with {codes}: {job.said()}", notes
        if found["status"] not in ("stopped", "finished") or found["step"] < before:
            return f"{where}: {found}", notes
        newest, skipped = find_checkpoint(out)
        if skipped or newest != out / found["checkpoint"] or newest.name != f"step_{found['step']:08d}":
            return f"{where}: {found} but the newest good one is {newest}, {skipped}", notes
        return None, notes

    def full_disk(self, count: int) -> Iterator[tuple[str | None, dict]]:
        """ENOSPC (until some steps later) and EIO (once) at a random operation of the saves: training goes on."""
        shim = Shim()
        for number in range(count):
            mode, victim = (Mode.ENOSPC, Mode.EIO)[number % 2], self.random.randrange(2)
            yield self._full_disk(shim, mode, victim, self.random.randint(1, 60 if victim == 0 else 8))

    def _full_disk(self, shim: Shim, mode: Mode, victim: int, at: int) -> tuple[str | None, dict]:
        out = self.fresh("disk")
        shim.free_space()

        def change(rank: int) -> None:
            if rank == victim or mode is Mode.ENOSPC:
                shim.arm(out / "checkpoints", mode, at if rank == victim else 0)
            wrap("step", lambda number, is_over: shim.arm(out / "checkpoints") if number == 2 * STEPS - 16 else None)

        codes = run_to_end(job := Job(self.config, out, change=change))
        problem = f"the ranks ended with {codes}: {job.said()}" if codes != [0, 0] else self.compare(out)
        failed = status(out).get("failed_saves", 0)
        return problem and f"{mode.name} at operation {at} of rank {victim}: {problem}", {"failed saves": failed}

    def hangs(self, count: int) -> Iterator[tuple[str | None, dict]]:
        """A rank is stopped (SIGSTOP), or sleeps in a phase: it is named in status.json in time."""
        for number in range(count):
            victim, phase = self.random.randrange(2), (None, "data", "forward", "save")[number % 4]
            yield self._hang(victim, phase)

    def _hang(self, victim: int, phase: str | None) -> tuple[str | None, dict]:
        out = self.fresh("hang")
        moment = out.parent / f"{out.name}.moment"

        def sleep(number: int, is_over: bool) -> None:
            if number == (3 if phase == "save" else 9):  # a rank may write one file a save
                moment.touch()
                time.sleep(3600)

        job = Job(self.config, out, (f"train.hang_timeout_seconds={HANG_SECONDS}",),
                  change=lambda rank: wrap(phase, sleep) if phase and rank == victim else breathe()).start()
        if phase:
            job.wait_until(moment.exists)
        else:
            job.wait_until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 5)
            job.processes[victim].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        job.wait_until(lambda: status(out).get("status") == "failed", 4 * HANG_SECONDS + 10)
        spent = time.monotonic() - started
        job.end()
        where, error = f"rank {victim} hangs in {phase or 'SIGSTOP'}", status(out).get("error", "")
        if not re.search(rf"(frozen|dead|hanging).*: rank {victim} ", error):
            return f"{where}: not named in {error!r}", {}
        over = spent - HANG_SECONDS
        return (f"{where}: named after {spent:.1f} s" if over > 5.0 else None), {"seconds over the timeout": over}

    def soak(self, steps: int) -> Iterator[tuple[str | None, dict]]:
        """tools/chaos.py over so many steps, a fault about every 20: one case."""
        spec = importlib.util.spec_from_file_location("chaos", ROOT / "tools" / "chaos.py")
        sys.modules["chaos"] = chaos = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(chaos)
        shim = Shim()

        def launch(arguments: list[str], ranks: int, fault: dict[str, str], log: Path) -> list:
            shim.free_space()
            modes = {"kill": Mode.KILL, "enospc": Mode.ENOSPC, "eio": Mode.EIO}
            arm = partial(shim.arm, fault["folder"], modes[fault["mode"]], int(fault["at"])) if fault else shim.free_space
            return fork_ranks(arguments, ranks, log, lambda rank: arm())

        overrides = (f"train.num_steps={steps}", "train.eval_every=0", "optimizer.schedule=constant")
        report = chaos.soak(str(self.config), self.fresh("soak"), ranks=2, seed=self.random.randrange(99),
                            overrides=overrides, launch=launch)
        faults = sum(report.get(name, 0) for name in chaos.FAULTS)
        notes = {"faults": faults, "attempts": report["attempts"], "goodput": report["goodput"],
                 "recovery": report["median_recovery_seconds"]}
        yield (None if report["equal"] and report["steps"] == steps else f"{report}"), notes

    def stall(self, saves: int) -> Iterator[tuple[str | None, dict]]:
        """How long training waits for a save written behind it, against one written at once, on 1 and 2 ranks: the
        model of the other rows, and a larger one."""
        large = ("model.hidden_size=384", "model.num_layers=6")
        for size, overrides in (("", ()), (" (large model)", large)):
            for ranks in (1, 2):
                yield self._stall(saves, ranks, overrides, f"ranks {ranks}{size}")

    def _stall(self, saves: int, ranks: int, size: tuple[str, ...], where: str) -> tuple[str | None, dict]:
        """Medians over the saves but the first, in runs that take turns."""
        waited: dict[bool, list[float]] = {True: [], False: []}
        cadence = (f"train.num_steps={2 * saves}", "train.save_every=2")
        for is_async in (True, False, False, True):
            out = self.fresh("stall")
            codes = run_to_end(job := Job(self.config, out, (*size, *cadence, f"train.async_save={is_async}".lower()),
                                          ranks=ranks))
            if any(codes):
                return f"{where}: ended with {codes}: {job.said()}", {}
            pairs = re.findall(r"durable, ([\d.]+) s after training waited ([\d.]+) s", (out / "train.log").read_text())
            waited[is_async] += [float(pair[1 if is_async else 0]) for pair in pairs][1:-1]
            shutil.rmtree(out)
        waits, whole = (statistics.median(waited[is_async]) for is_async in (True, False))
        notes = {f"{where}": waits / whole, "asynchronous seconds": waits, "synchronous seconds": whole}
        return (None if waits <= 0.1 * whole else f"{where}: {waits:.4f} s of {whole:.4f} s"), notes


ROWS = ("kills", "signals", "full_disk", "hangs", "soak", "stall")


def row(trials: Trials, name: str, count: int) -> list:
    cases = list(getattr(trials, name)(count))
    measured: dict[str, list[float]] = {}
    for _, notes in cases:
        for key, value in notes.items():
            measured.setdefault(key, []).append(value)
    summary = {key: f"median {sorted(v)[len(v) // 2]:.3g}, most {max(v):.3g}" for key, v in measured.items()}
    return [len(cases), [problem for problem, _ in cases if problem], summary]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="+", help=f"ROW:COUNT; rows: {', '.join(ROWS)}")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials = Trials(arguments.folder.resolve(), arguments.width, arguments.seed)
    wanted = (item.split(":") for item in arguments.rows)
    print(json.dumps({name: row(trials, name, int(count)) for name, count in wanted}))


if __name__ == "__main__":
    sys.exit(main())

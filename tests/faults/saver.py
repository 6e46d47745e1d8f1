"""Saves under faults, in a process that carries the shim: `LD_PRELOAD=shim python -m tests.faults.saver CASE FOLDER`.

A case is JSON: the number of ranks, whether the second save replaces the first (same step) or follows it with deletion
(keep-1), whether it is written by a thread while the caller's tensors change, a stride over the operations, and a
sabotage of the writer, by which the campaign itself is tested.
Prints a JSON object: name of the fault -> [number of cases, [what went wrong in a case, ...]].
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import torch

from dlm_scale.checkpoint import writer
from dlm_scale.checkpoint.folders import find_checkpoint, list_checkpoints
from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.reader import open_checkpoint
from dlm_scale.checkpoint.writer import CheckpointError, Save, plan_save, stage, write_staged
from dlm_scale.errors import UsageError
from tests.faults.power_loss import WORLDS, Disk, read_log
from tests.faults.shim import Mode, Shim

KILLED, SAVED, REFUSED, BROKEN = -9, 0, 3, 4
SECONDS = 30.0
SHAPE = (16, 24)


@dataclass(frozen=True)
class Case:
    world: int
    replaces: bool = False
    asynchronous: bool = False
    stride: int = 1
    sabotage: str = ""

    @property
    def second_step(self) -> int:
        return 1 if self.replaces else 2


def tensors(generation: int) -> dict[tuple[str, str], torch.Tensor]:
    """What a save of this generation holds; no two generations agree in any element."""
    values = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).view(SHAPE)
    keys = [("a", "param"), ("a", "exp_avg"), ("b", "param"), ("c", "param")]
    return {key: values + 1000.0 * generation + 10_000.0 * i for i, key in enumerate(keys)}


def pieces(generation: int, rank: int, world: int) -> list[Piece]:
    """`a` is cut into boxes, its moment flat and unevenly, `b` flat, `c` stands on all ranks."""
    made = []
    for (name, slot), values in tensors(generation).items():
        box, flat = ((0, SHAPE[0]), (0, SHAPE[1])), values.reshape(-1)
        start, stop = 0, flat.numel()
        if (name, slot) == ("a", "param"):
            rows = SHAPE[0] // world
            box = ((rank * rows, rank * rows + rows), (0, SHAPE[1]))
            flat, stop = values[rank * rows:rank * rows + rows].reshape(-1), rows * SHAPE[1]
        elif name != "c":
            bounds = [0, 100, flat.numel()] if world == 2 else [0, flat.numel()]
            start, stop = bounds[rank], bounds[rank + 1]
        made.append(Piece(name, slot, SHAPE, SHAPE, box, start, flat[start:stop].clone()))
    return made


def gather_over(connection: tuple[int, Connection] | None) -> Callable:
    """`gather` of one rank alone, or of two over a pipe."""
    def gather(value: object) -> list:
        if connection is None:
            return [value]
        connection[1].send(value)
        other = connection[1].recv()
        return [value, other] if connection[0] == 0 else [other, value]

    return gather


def save(run: Path, step: int, generation: int, rank: int, case: Case, gather: Callable) -> None:
    """One save of this rank; an asynchronous one while its tensors change. Raises what write_staged raises."""
    mine = pieces(generation, rank, case.world)
    documents = {"state.json": b'{"generation": %d}' % generation, "config.yaml": b"model: {}\n"}
    settings = Save(run, step, rank, case.world, gather, documents, 1, 0)
    copies, errors = [replace(piece, tensor=piece.tensor.clone()) for piece in mine], []

    def write() -> None:
        try:
            plan = plan_save(settings, copies)
            write_staged(settings, plan, stage(plan))
        except BaseException as error:
            errors.append(error)

    if not case.asynchronous:
        write()
    else:
        _behind_training(write, mine)
    if errors:
        raise errors[0]


def _behind_training(write: Callable[[], None], mine: list[Piece]) -> None:
    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        for piece in mine:
            piece.tensor.add_(1.0)
        thread.join(0.0005)


def in_ranks(world: int, work: Callable[[int, Callable], int]) -> list[int]:
    """`work(rank, gather)` in forked ranks; their exit codes, -9 for a killed one. A rank that hangs is BROKEN."""
    ends = Pipe() if world == 2 else (None, None)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if ends[0] is not None:
                ends[1 - rank].close()
            os._exit(_guarded(work, rank, gather_over(ends[0] and (rank, ends[rank]))))
        children.append(child)
    for end in filter(None, ends):
        end.close()
    return [_exit_code(child) for child in children]


def _guarded(work: Callable, rank: int, gather: Callable) -> int:
    try:
        return work(rank, gather)
    except (EOFError, ConnectionError):  # the other rank is dead
        return BROKEN
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return BROKEN


def _exit_code(child: int) -> int:
    descriptor = os.pidfd_open(child)
    if not wait([descriptor], SECONDS):
        os.kill(child, 9)
        os.waitpid(child, 0)
        return BROKEN
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Campaign:
    """All faults of one case, below one folder."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.folder, self.shim = case, folder, Shim()
        self.shim.arm(folder)  # counts only; and no fsync of these thousands of files waits for the disk
        self.template = folder / "template"
        self._check(in_ranks(case.world, self._saving(self.template, 1, 1)), SAVED)

    @staticmethod
    def _check(codes: list[int], wanted: int) -> None:
        if set(codes) != {wanted}:
            raise RuntimeError(f"a save without faults ended with {codes}")

    def _saving(self, run: Path, step: int, generation: int, before: Callable = lambda rank: None) -> Callable:
        def work(rank: int, gather: Callable) -> int:
            before(rank)
            try:
                save(run, step, generation, rank, self.case, gather)
                return SAVED
            except CheckpointError:
                pass
            self.shim.free_space()
            self.shim.arm(self.folder)
            if rank == 0 and (problem := survivors(run, 1)):
                raise RuntimeError(f"after the refusal: {problem}")
            gather(None)  # training goes on, and saves again
            save(run, 8, 3, rank, self.case, gather)
            return REFUSED

        return work

    def operations(self) -> list[int]:
        """How many operations the second save has on each rank."""
        run, counts = self._fresh("count"), self.folder / "counts"
        counts.mkdir()

        def work(rank: int, gather: Callable) -> int:
            self.shim.arm(run)
            save(run, self.case.second_step, 2, rank, self.case, gather)
            total, _ = self.shim.count, self.shim.arm(self.folder)
            (counts / str(rank)).write_text(str(total))
            return SAVED

        self._check(in_ranks(self.case.world, work), SAVED)
        return [int((counts / str(rank)).read_text()) for rank in range(self.case.world)]

    def _fresh(self, name: str) -> Path:
        run = self.folder / name
        shutil.copytree(self.template, run)
        return run

    def at_every_operation(self, mode: Mode) -> Iterator[str | None]:
        """One case for each operation of each rank: what went wrong, or None."""
        for rank, total in enumerate(self.operations_of_ranks):
            for at in range(1, total + 1, self.case.stride):
                problem = self._one(mode, rank, at)
                yield problem and f"{self.case} {mode.name} at operation {at} of rank {rank}: {problem}"

    def _one(self, mode: Mode, victim: int, at: int) -> str | None:
        run = self._fresh(f"{mode.name}-{victim}-{at}")
        self.shim.free_space()
        armed_everywhere = mode is Mode.ENOSPC  # the others find the disk full too, but do not count

        def before(rank: int) -> None:
            if rank == victim or armed_everywhere:
                self.shim.arm(run, mode, at if rank == victim else 0)

        codes = in_ranks(self.case.world, self._saving(run, self.case.second_step, 2, before))
        expected = {KILLED, SAVED, BROKEN} if mode is Mode.KILL else {SAVED, REFUSED}
        if not set(codes) <= expected or (mode is not Mode.KILL and len(set(codes)) > 1):
            return f"the ranks ended with {codes}"
        if mode is Mode.KILL and codes[victim] != KILLED and SAVED not in codes:
            return f"nobody was killed: {codes}"
        problem = survivors(run, 3 if REFUSED in codes else 2 if SAVED in codes else 1)
        problem = problem or self._saves_again(run)
        shutil.rmtree(run)
        return problem

    def _saves_again(self, run: Path) -> str | None:
        save(run, 9, 4, 0, Case(1), gather_over(None))
        left = os.listdir(run / "checkpoints")
        return None if left == ["step_00000009"] else f"after the next save there are {left}"

    def power_losses(self, seed: int) -> Iterator[str | None]:
        """One case for each event of three saves and each world of power_loss.WORLDS."""
        base, log = self.folder / "recorded", self.folder / "log"
        base.mkdir()
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for generation, step in enumerate((1, 2, self.case.second_step + 1), 1):
            self._check(in_ranks(self.case.world, self._recorded(base, log_fd, step, generation)), SAVED)
        disk, rng, saved = Disk(base), random.Random(seed), 0
        for number, event in enumerate(read_log(log)):
            if event.what == "!":
                saved = max(saved, event.offset)
            else:
                disk.apply(event)
            if number % self.case.stride == 0:
                yield from self._losses(disk, saved, rng, f"after event {number} ({event.what} {event.path})")
        yield self._is_complete(disk, base)

    def _recorded(self, base: Path, log_fd: int, step: int, generation: int) -> Callable:
        def work(rank: int, gather: Callable) -> int:
            self.shim.arm(base, Mode.RECORD, log_fd=log_fd)
            if rank == 0:  # as a run makes its folder, without any fsync
                (base / "runs" / "mine" / "checkpoints").mkdir(parents=True, exist_ok=True)
            gather(None)
            save(base / "runs" / "mine", step, generation, rank, self.case, gather)
            self.shim.mark(generation)
            self.shim.arm(self.folder)
            return SAVED

        return work

    def _losses(self, disk: Disk, saved: int, rng: random.Random, where: str) -> Iterator[str | None]:
        for world in WORLDS:
            target = self.folder / "lost"
            target.mkdir()
            disk.write_out(target, world, rng)
            run = target / "runs" / "mine"
            problem = None if not saved and not run.is_dir() else survivors(run, saved, may_be_damaged=True)
            if not problem and run.is_dir():
                problem = self._saves_again(run)
            shutil.rmtree(target)
            yield problem and f"{self.case} power lost {where}, world {world}, {saved} saves done: {problem}"

    def _is_complete(self, disk: Disk, base: Path) -> str | None:
        """The log must lack nothing: played in full it gives the real folder."""
        target = self.folder / "whole"
        target.mkdir()
        disk.write_out(target, "everything", random.Random(0))
        ours, real = ({str(p.relative_to(top)): p.is_file() and p.read_bytes() for p in top.rglob("*")}
                      for top in (target, base))
        return None if ours == real and any(real.values()) else "the recording does not give the folder that was made"

    def run(self, faults: list[str], seed: int = 0) -> dict[str, list]:
        self.operations_of_ranks = self.operations()
        found = {}
        for fault in faults:
            started = time.monotonic()
            outcomes = list(self.power_losses(seed) if fault == "POWER" else self.at_every_operation(Mode[fault]))
            found[fault] = [len(outcomes), [o for o in outcomes if o], time.monotonic() - started]
        return found


SABOTAGES: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "no fsync": lambda: setattr(os, "fsync", lambda fd: None),
    "no fsync of folders": lambda: setattr(writer, "fsync_folder", lambda path: None),
    "no rename": lambda: setattr(writer, "replace_folder", lambda a, b: shutil.copytree(a, b, dirs_exist_ok=True)),
}


def survivors(run: Path, least: int, may_be_damaged: bool = False) -> str | None:
    """What is wrong with what a run can resume from: it must be a whole save, of generation `least` or later.

    Nothing damaged may be visible at all, unless data was lost behind the program's back.
    """
    try:
        folder, skipped = find_checkpoint(run)
    except UsageError as error:
        return None if least == 0 else str(error)
    checkpoint = open_checkpoint(folder)
    generation = checkpoint.state["generation"]
    if generation < least:
        return f"generation {generation} where {least} had been saved"
    if skipped and not may_be_damaged:
        return f"visible though damaged: {skipped}"
    for visible in [folder] if may_be_damaged else list_checkpoints(run):
        opened = open_checkpoint(visible)
        for key, values in tensors(opened.state["generation"]).items():
            if not torch.equal(opened.read(*key), values):
                return f"{visible}: {key} has other values"
    return None


def main() -> None:
    torch.set_num_threads(1)
    case, folder, faults = Case(**json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3].split(",")
    SABOTAGES[case.sabotage]()
    print(json.dumps(Campaign(case, folder).run(faults)))


if __name__ == "__main__":
    main()

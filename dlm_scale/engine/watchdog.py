"""Who is where: each rank's phase and step, a heartbeat file a rank, and an end to a job that hangs.

All ranks pass the same phases in the same order, so the rank that has entered the fewest is the one that the others
wait for; where several have, the one that has come to the fewest meetings behind training. One that has not even
renewed its heartbeat for half of the time is frozen or dead.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

EXIT_HANG = 75
CHECK_SECONDS = 0.5  # when half of the time is over
WATCH_SECONDS = 3.0  # how long the ranks look at each other before they end
HEARTBEAT_SECONDS = 30.0


class Watchdog:
    """Enter a phase before you start it. After `timeout` seconds in one, RUN/logs/stacks_rank_N.txt gets the stacks of
    all threads, `on_hang(message)` is called on one rank, and the process ends with exit code 75.

    `mark()` gives a point in time, `between(a, b)` the seconds from one to another (of the device, on a GPU).
    """

    def __init__(self, out: Path, rank: int, world_size: int, timeout: float, on_hang: Callable[[str], None],
                 mark: Callable[[], Any] = time.perf_counter, between: Callable = lambda a, b: b - a):
        self._logs, self._rank, self._world_size, self._timeout = out / "logs", rank, world_size, timeout
        self._stacks = self._logs / f"stacks_rank_{rank}.txt"
        self._on_hang, self._mark, self._between = on_hang, mark, between
        self._timeline: deque[tuple[str, Any]] = deque(maxlen=4096)
        self._place = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "count": 0}
        self._meetings, self._closed = 0, threading.Event()
        self.enter("start", 0)
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """`phase` begins; `step` updates are done (default: as many as before)."""
        step = self._place["step"] if step is None else step
        self._entered = time.monotonic()
        self._place = self._place | {"phase": phase, "step": step, "count": self._place["count"] + 1}
        self._timeline.append((phase, self._mark()))

    def meet(self) -> None:
        """This rank comes to a meeting behind training: another thread's, which writes a checkpoint."""
        self._meetings += 1

    def where(self) -> str:
        return "{phase} after step {step}".format_map(self._place)

    def seconds_in(self, *phases: str) -> float:
        """Time spent in these phases since the last call."""
        spans = list(zip(self._timeline, list(self._timeline)[1:]))
        self._timeline = deque([self._timeline[-1]], maxlen=4096)
        return sum(self._between(start, stop) for (phase, start), (_, stop) in spans if phase in phases)

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            self._stacks.unlink()

    def _run(self) -> None:
        with open(self._stacks, "w") as stacks:
            self._beat()
            while not self._closed.wait(self._period()):
                # Where even this thread cannot run (the interpreter is held), or hangs on the disk, this ends it.
                faulthandler.dump_traceback_later(self._timeout + WATCH_SECONDS + 1, exit=True, file=stacks)
                self._beat()
                if self._stalled() > self._timeout:
                    self._end(stacks)

    def _period(self) -> float:
        is_near = self._stalled() > self._timeout / 2
        return CHECK_SECONDS if is_near else min(HEARTBEAT_SECONDS, self._timeout / 10)

    def _stalled(self) -> float:
        return time.monotonic() - self._entered

    def _beat(self, has_fired: bool = False) -> None:
        now = {"meetings": self._meetings, "seconds": self._stalled(), "has_fired": has_fired}
        path, place = self._heartbeat(self._rank), self._place | now
        try:
            path.with_suffix(".tmp").write_text(json.dumps(place))
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as error:
            logging.getLogger("dlm_scale").warning("no heartbeat written: %s", error)

    def _heartbeat(self, rank: int) -> Path:
        return self._logs / f"heartbeat_rank_{rank}.json"

    def _is_frozen(self, rank: int) -> bool:
        """By the file system's own clock: the machines' may differ."""
        try:
            own, other = (self._heartbeat(r).stat().st_mtime for r in (self._rank, rank))
        except OSError:
            return True
        return own - other > self._timeout / 2

    def _end(self, stacks: Any) -> None:
        faulthandler.dump_traceback_later(WATCH_SECONDS + 1.5, exit=True, file=stacks)
        faulthandler.dump_traceback(stacks, all_threads=True)
        self._beat(has_fired=True)
        if all(self._is_frozen(rank) for rank in range(self._rank)):
            self._report()
        else:
            time.sleep(WATCH_SECONDS)  # the first rank that lives speaks for all, before a launcher ends it
        logging.shutdown()
        os._exit(EXIT_HANG)

    def _report(self) -> None:
        deadline, places = time.monotonic() + WATCH_SECONDS, {}
        while sum(place["has_fired"] for place in places.values()) < self._world_size and time.monotonic() < deadline:
            time.sleep(CHECK_SECONDS)
            places = {rank: place for rank in range(self._world_size) if (place := _read(self._heartbeat(rank)))}
        frozen = [rank for rank in places if self._is_frozen(rank)]
        message = f"{describe_hang(places, frozen, self._timeout)}. Stacks: {self._logs}/stacks_rank_*.txt"
        logging.getLogger("dlm_scale").critical(message)
        self._on_hang(message)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def describe_hang(places: dict[int, dict[str, Any]], frozen: list[int], timeout: float) -> str:
    """One line that names the ranks that hang, and where the others wait."""
    passed = {rank: (place["count"], place["meetings"]) for rank, place in places.items()}
    culprits = frozen or [rank for rank, found in passed.items() if found == min(passed.values())]
    what = "frozen or dead (no heartbeat)" if frozen else "hanging"
    named = "; ".join("rank {rank} (process {pid} on {host}) in {phase} after step {step}".format_map(places[rank])
                      for rank in culprits[:8])
    others = sorted({"{phase} after step {step}".format_map(p) for rank, p in places.items() if rank not in culprits})
    waiting = f"; the other ranks wait in {', '.join(others)}" if others else ""
    return f"no progress for {timeout:g} s: {what}: {named}{waiting}"

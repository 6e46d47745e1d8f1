"""What is asked of a run from outside: to stop, or to save. All ranks agree on it at the same step boundary."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
BY_HAND = "control/stop"
REASONS = (*(number.name for number in STOP_SIGNALS), BY_HAND)


class StopRequest:
    """Remembers the first stop signal. The handler only sets a flag, so any moment is safe, and so is a second
    one. Make it when all ranks have met: a process that waits for them in vain must end at the first signal."""

    def __init__(self):
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def ignore(self) -> None:
        """The run is over: a late signal must not change its exit code."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Asked:
    """`stop`: why the run must stop now, or None. `loss`: the ranks' shares of the last loss, summed."""

    stop: str | None
    save: bool
    loss: float


class Control:
    """`touch RUN/control/stop` (or `stop.JOB`, in Slurm job JOB) and `RUN/control/save` ask by hand; rank 0 looks."""

    def __init__(self, signals: StopRequest, out: Path, group: Any, is_first: bool):
        self._signals, self._folder, self._group, self._looks = signals, out / "control", group, is_first

    def agree(self, loss: float = 0.0) -> Asked:
        """What any rank was asked. Collective, one all-reduce; it fails at once where another rank has died."""
        by_hand = self._take("stop") or self._take(f"stop.{os.environ.get('SLURM_JOB_ID')}")
        flags = [float(reason == self._signals.received or by_hand and reason == BY_HAND) for reason in REASONS]
        counts = self._sum([*flags, float(self._take("save")), loss])
        stop = next((reason for reason, count in zip(REASONS, counts) if count), None)
        return Asked(stop, bool(counts[-2]), counts[-1])

    def _sum(self, values: list[float]) -> list[float]:
        if self._group is None:
            return values
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def _take(self, name: str) -> bool:
        """Whether the file is there; it is removed, so that it asks once."""
        try:
            if self._looks:
                (self._folder / name).unlink()
            return self._looks
        except OSError:
            return False

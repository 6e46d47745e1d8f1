"""Graceful stop: a signal on any rank ends the run at the same step boundary on all of them."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers that a stop signal came. The handler only sets a flag, so any moment is safe."""

    def __init__(self):
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop. Collective over the world."""
        if dist.get_world_size() == 1:
            return self.received is not None
        flag = torch.tensor([self.received is not None], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

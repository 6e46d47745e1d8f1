"""Batches made ahead of training, in another thread: what the step needs is ready when it comes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from dlm_scale.engine.state import TrainState

DEPTH = 4  # batches in memory beside the one in use


class Prefetcher:
    """The batches `make(state)` of `state` and the states after it, in sequence, up to step `last_step`.

    At most DEPTH are made ahead, one after the other by one thread, each a function of its state alone; `prepare` runs
    first in that thread. What `make` raises is raised by `next` in its turn. `waited_seconds`: spent in `next`.
    """

    def __init__(self, make: Callable[[TrainState], Any], state: TrainState, last_step: int, global_batch_size: int,
                 prepare: Callable[[], None] = lambda: None):
        self._make, self._batch, self._last_step = make, global_batch_size, last_step
        self._following: TrainState | None = state
        self._made: deque[Future] = deque()
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=prepare)
        self.waited_seconds = 0.0

    def __enter__(self) -> Prefetcher:
        self._order()
        return self

    def __exit__(self, *_exception) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def is_ready(self, seconds: float) -> bool:
        """Whether `next` would not wait, after waiting so long at most; also where no batch is left."""
        start = time.perf_counter()
        not_done = wait(list(self._made)[:1], seconds).not_done
        self.waited_seconds += time.perf_counter() - start
        return not not_done

    def peek(self) -> Any:
        """The batch that `next` will give."""
        return self._made[0].result()

    def next(self) -> Any:
        """The next batch; another is ordered in its place."""
        start = time.perf_counter()
        batch = self._made.popleft().result()
        self.waited_seconds += time.perf_counter() - start
        self._order()
        return batch

    def _order(self) -> None:
        while self._following and len(self._made) < DEPTH:
            self._made.append(self._thread.submit(self._make, self._following))
            following = self._following.advanced(self._batch)
            self._following = following if following.step < self._last_step else None

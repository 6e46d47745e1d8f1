"""Checkpoints written behind training: copied to the host before the next update, written while training goes on.

Forward and backward passes change nothing that is saved, so training waits for the copy only where it would update.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.writer import CheckpointError, Save, plan_save, stage, write_staged
from dlm_scale.engine.state import TrainState

LAST_SAVE_DELAYS = (0.0, 1.0, 2.0, 4.0)  # seconds before each attempt


class Saver:
    """At most one save is in flight. One that fails is said and counted, leaves the last good one, and does not stop
    training. Memory for the copies is taken at once and kept.

    `make_save(state)` describes a save; its `gather` must have a process group that nothing else uses. `before()` runs
    on every rank before a save is written, `on_durable(state, path)` after.
    """

    def __init__(self, trainer: Any, make_save: Callable[[TrainState], Save], durable: tuple[TrainState, Path] | None,
                 before: Callable[[], None], on_durable: Callable[[TrainState, Path], None]):
        self._trainer, self._make_save, self._before, self._on_durable = trainer, make_save, before, on_durable
        self.durable, self.failures = durable, 0
        self._writer, self._copied, self._waited = ThreadPoolExecutor(1, "checkpoint"), threading.Event(), 0.0
        self._copied.set()
        self._in_flight: Future | None = None
        self._buffers: list[torch.Tensor] = []
        if trainer.config.train.async_save:
            on_host(trainer.state_access.pieces(), self._buffers)
        self._log = logging.getLogger("dlm_scale")

    def start(self, state: TrainState) -> None:
        """Save `state`, unless it is saved. It may change after `before_update`; where `train.async_save` is off, it is
        on the disk when this returns. Collective."""
        self.wait()
        if self._is_durable(state):
            return
        began, is_async = time.monotonic(), self._trainer.config.train.async_save
        save, pieces = self._make_save(state), list(self._trainer.state_access.pieces())
        copy = _copy_behind(pieces, self._buffers) if is_async else lambda: pieces
        self._copied.clear()
        self._in_flight = self._writer.submit(self._write, save, copy, state, began)
        if not is_async:
            self.wait()
        self._waited = time.monotonic() - began

    def before_update(self) -> None:
        """Wait until what is being saved has been copied: now the state may change."""
        began = time.monotonic()
        self._copied.wait()
        self._waited += time.monotonic() - began

    def wait(self) -> None:
        """For the save in flight. Raises what is no failure of a save, as the death of another rank."""
        if self._in_flight:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def finish(self, state: TrainState) -> Path:
        """`state` on the disk, whatever it takes. Raises CheckpointError after the last attempt. Collective."""
        self.wait()
        for delay in LAST_SAVE_DELAYS:
            if self._is_durable(state):
                return self.durable[1]
            time.sleep(delay)
            self.start(state)
            self.wait()
        if not self._is_durable(state):
            raise CheckpointError(f"the last state, step {state.step}, could not be saved in {len(LAST_SAVE_DELAYS)} "
                                  f"attempts; the last good checkpoint: {self._last_good()}")
        return self.durable[1]

    def abandon(self, seconds: float) -> None:
        """The run has failed: give the save in flight some time to complete."""
        if self._in_flight:
            with suppress(Exception):
                self._in_flight.result(seconds)
        self._writer.shutdown(wait=False)

    def _is_durable(self, state: TrainState) -> bool:
        return self.durable is not None and self.durable[0] == state

    def _write(self, save: Save, copy: Callable[[], Iterable[Piece]], state: TrainState, began: float) -> None:
        try:
            pieces = copy()
        finally:
            self._copied.set()
        try:
            self._before()
            plan = plan_save(save, pieces)
            path = write_staged(save, plan, stage(plan))
        except CheckpointError as error:
            self._fail(error)
            return
        self.durable = (state, path)
        self._on_durable(state, path)
        self._log.info("checkpoint %s is durable, %.3f s after training waited %.3f s for it", path.name,
                       time.monotonic() - began, self._waited)

    def _fail(self, error: CheckpointError) -> None:
        self.failures += 1
        self._log.error("SAVE FAILED, training goes on: %s. Last good: %s", error, self._last_good())

    def _last_good(self) -> str:
        return str(self.durable[1]) if self.durable else "none"


def _copy_behind(pieces: list[Piece], buffers: list[torch.Tensor]) -> Callable[[], Iterable[Piece]]:
    """`on_host`, to be called by another thread: on a GPU on a stream of its own, from what is computed by now."""
    if not pieces or not pieces[0].tensor.is_cuda:
        return lambda: on_host(pieces, buffers)
    stream = torch.cuda.Stream(pieces[0].tensor.device)
    stream.wait_stream(torch.cuda.current_stream(stream.device))

    def copy() -> Iterable[Piece]:
        with torch.cuda.stream(stream):
            return on_host(pieces, buffers)

    return copy


def on_host(pieces: Iterable[Piece], buffers: list[torch.Tensor]) -> Iterable[Piece]:
    """Copies of all pieces, in `buffers`, which grow at the first call: taking memory costs more than the copy.

    A failure (no memory) comes when the copies are read, where all ranks agree on failures.
    """
    try:
        copies = []
        for number, piece in enumerate(pieces):
            tensor = piece.tensor
            if number == len(buffers):
                buffers.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda))
            buffers[number].copy_(tensor, non_blocking=True)
            copies.append(replace(piece, tensor=buffers[number]))
        if copies and tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return copies
    except Exception as error:
        return _raising(error)


def _raising(error: Exception) -> Iterator[Piece]:
    raise error
    yield

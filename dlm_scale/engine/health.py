"""Is the training healthy: losses and gradients that are not finite, spikes of the loss, slow ranks."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlm_scale.engine.build import Trainer
from dlm_scale.engine.run_folder import write_atomically
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import sample_ids, samples_of_rank
from dlm_scale.engine.watchdog import Watchdog

SPIKE_WINDOW, SPIKE_SIGMAS = 128, 6.0
SLOWER_THAN_MEDIAN, PART_OF_INTERVAL, SECONDS_WORTH_SAYING = 1.5, 0.1, 0.1


class TrainingFailed(RuntimeError):
    """Training cannot go on; every rank raises it. The message says why, and what to do."""


class SpikeDetector:
    """How far each loss lies above the last `window` ones."""

    def __init__(self, window: int = SPIKE_WINDOW):
        self._losses: deque[float] = deque(maxlen=window)

    def sigmas(self, loss: float) -> float:
        """Standard deviations above their mean; 0 while there are fewer than a window of them."""
        known = np.array(self._losses)
        self._losses.append(loss)
        return float((loss - known.mean()) / (known.std() + 1e-12)) if len(known) == self._losses.maxlen else 0.0


class Health:
    """Watches the steps of one attempt. `gather(value)` gives the values of all ranks."""

    def __init__(self, trainer: Trainer, out: Path, gather: Callable[[Any], list]):
        self._trainer, self._out, self._gather = trainer, out, gather
        self._spikes, self._bad_in_a_row, self._since = SpikeDetector(), 0, time.monotonic()
        self.counts = {"skipped_steps": 0, "loss_spikes": 0}
        self._log = logging.getLogger("dlm_scale")

    def check_step(self, result: dict[str, Any], state: TrainState) -> None:
        """Note a skipped update; raise TrainingFailed after `train.max_bad_steps` in a row. `state` is that before the
        step. Collective where the update was skipped."""
        if not result["is_skipped"]:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        self.counts["skipped_steps"] += 1
        path, step = self._out / "bad_batches" / f"step_{state.step + 1:08d}.json", state.step + 1
        self._dump(path, result, state)
        self._log.error("step %d: loss or gradient is not finite, no rank updates its weights; batch: %s", step, path)
        if self._bad_in_a_row >= self._trainer.config.train.max_bad_steps:
            raise TrainingFailed(
                f"loss or gradient was not finite in {self._bad_in_a_row} steps in a row, up to step {step} (see "
                f"{path.parent}). If the data is at fault, pass over it in another train.out: train.branch_from="
                f"{self._out} data.skip_samples={self._bad_samples(state)}; if not, lower optimizer.learning_rate from "
                "an earlier checkpoint")

    def _bad_samples(self, state: TrainState) -> str:
        """All ranges of samples to pass over: those so far, and the bad steps in a row up to the one after `state`."""
        skipped, batch = self._trainer.config.data.skip_samples, self._trainer.config.train.global_batch_size
        ends = np.array([state.samples - (self._bad_in_a_row - 1) * batch, state.samples + batch - 1])
        first, last = sample_ids(skipped, ends).tolist()
        return str([list(r) for r in sorted([*skipped, (first, last + 1)])]).replace(" ", "")

    def _dump(self, path: Path, result: dict[str, Any], state: TrainState) -> None:
        samples, losses = samples_of_rank(self._trainer, state).tolist(), [float(loss) for loss in result["losses"]]
        mine = [{"samples": s, "loss_sum": finite(loss)} for s, loss in zip(samples, losses)]
        everyone = self._gather(mine)
        if self._trainer.runtime.is_first:
            document = {"step": state.step + 1, "seed": self._trainer.config.train.seed,
                        "grad_norm": finite(float(result["grad_norm"])), "micro_batches_of_ranks": everyone}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
            except OSError as error:
                self._log.error("%s not written: %s", path, error)

    def check_loss(self, loss: float, state: TrainState) -> None:
        """Say and count a spike of the global batch's loss in the step that led to `state`."""
        sigmas = self._spikes.sigmas(loss) if math.isfinite(loss) else 0.0
        if sigmas > SPIKE_SIGMAS:
            self.counts["loss_spikes"] += 1
            self._log.warning("step %d: loss spike, %.4f is %.1f standard deviations above the last %d", state.step,
                              loss, sigmas, SPIKE_WINDOW)

    def check_ranks(self, watch: Watchdog) -> None:
        """Name ranks that took much longer than the others for data and forward passes. Collective."""
        interval, self._since = time.monotonic() - self._since, time.monotonic()
        for rank, seconds, median in slow_ranks(self._gather(watch.seconds_in("data", "forward")), interval):
            self._log.warning("rank %d is slow: %.3f s for data and forward passes since the last line, the median is "
                              "%.3f s", rank, seconds, median)


def slow_ranks(busy: list[float], interval: float) -> list[tuple[int, float, float]]:
    """(rank, its seconds, median) of those over 1.5 times the median, where that costs a tenth of the interval."""
    median = statistics.median_low(busy)
    least = max(SLOWER_THAN_MEDIAN * median, median + PART_OF_INTERVAL * interval, median + SECONDS_WORTH_SAYING)
    return [(rank, seconds, median) for rank, seconds in enumerate(busy) if seconds > least]


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None

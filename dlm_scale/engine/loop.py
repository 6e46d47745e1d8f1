"""The loop, read top to bottom: batch, step, log, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.labels import LABEL_OBJECTIVES
from dlm_scale.engine.async_saving import Saver
from dlm_scale.engine.batch_hash import batch_hash
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.checks import check_same_batch
from dlm_scale.engine.evaluation import evaluate
from dlm_scale.engine.label_evaluation import evaluate_labels
from dlm_scale.engine.health import Health, finite
from dlm_scale.engine.optimizer import rate_factor
from dlm_scale.engine.prefetch import Prefetcher
from dlm_scale.engine.signals import Asked, Control
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import loss_share, make_batch, reduce_sums, train_step
from dlm_scale.engine.watchdog import Watchdog
from dlm_scale.model.parameters import flops_per_token, peak_flops


AGREE_SECONDS = 1.0  # between two looks whether all ranks have their batch


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: `finished`, `stop_at_step`, a signal or `control/stop`; and the last checkpoint."""

    state: TrainState
    reason: str
    checkpoint: Path


def train_loop(trainer: Trainer, data: Any, validation: Any, state: TrainState, *, record: Callable[[dict], None],
               control: Control, saver: Saver, watch: Watchdog, health: Health) -> Outcome:
    """Train from `state` to the configured end. `record` takes a line for metrics.jsonl (rank 0 writes it)."""
    train = trainer.config.train
    last_step = min(train.num_steps, train.stop_at_step or train.num_steps)
    clock = Clock(trainer, state)
    if state.step == 0:
        record(evaluation_record(trainer, validation, state, watch))

    def save(state: TrainState) -> None:
        with clock.paused():
            watch.enter("save")
            saver.start(state)

    with Prefetcher(partial(host_batch, trainer, data), state, last_step, train.global_batch_size,
                    partial(use_device, trainer.runtime.device)) as batches, closing(data):
        wait = partial(await_batch, data, batches, control, save, watch)
        asked = wait(state, Asked(None, False, 0.0))
        if not asked.stop:
            check_same_batch(batches.peek(), trainer.runtime.mesh, trainer.runtime.device)
            asked = control.agree()
        while state.step < last_step and not asked.stop:
            watch.enter("data", state.step)
            batch, following = batches.next(), state.advanced(train.global_batch_size)
            result = train_step(trainer, batch, state, watch.enter, saver.before_update)
            watch.enter("log")
            health.check_step(result, state)
            if _due(following.step, train.log_every, last_step):
                record(step_record(trainer, batch, result, state, following, clock, batches.waited_seconds))
                health.check_ranks(watch)
            state = following
            if _due(state.step, train.eval_every, last_step):
                with clock.paused():
                    record(evaluation_record(trainer, validation, state, watch))
            watch.enter("agree", state.step)
            asked = control.agree(loss_share(trainer, result))
            health.check_loss(asked.loss, state)
            if asked.save or _due(state.step, train.save_every, last_step):
                save(state)
            asked = wait(state, asked)
    watch.enter("save", state.step)
    return Outcome(state, _reason(state, train, asked), saver.finish(state))


def await_batch(data: Any, batches: Prefetcher, control: Control, save: Callable[[TrainState], None], watch: Watchdog,
                state: TrainState, asked: Asked) -> Asked:
    """Where the data is still being prepared: until all ranks have their next batch, or a stop is asked for. That may
    take hours and is no hang. Collective there."""
    while data.is_growing and not asked.stop:
        watch.enter("data", state.step)
        asked = control.agree(float(not batches.is_ready(AGREE_SECONDS)))
        if asked.save:
            save(state)
        if not asked.loss:
            break
    return asked


def host_batch(trainer: Trainer, data: Any, state: TrainState) -> list[Corrupted]:
    """`make_batch`, in page-locked memory where a GPU is to copy it while it computes."""
    batch = make_batch(trainer, data, state)
    return [corrupted.pin_memory() for corrupted in batch] if trainer.runtime.device.type == "cuda" else batch


def use_device(device: torch.device) -> None:
    """In a thread that allocates page-locked memory: else each rank's would set up the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _due(step: int, every: int, last_step: int) -> bool:
    return step == last_step or bool(every) and step % every == 0


def _reason(state: TrainState, train: Any, asked: Asked) -> str:
    if state.step >= train.num_steps:
        return "finished"
    return "stop_at_step" if state.step == train.stop_at_step else asked.stop


class Clock:
    """Tokens a second, MFU and the share of the time spent waiting for batches since the last look; evaluation and
    saving do not count."""

    def __init__(self, trainer: Trainer, state: TrainState):
        config = trainer.config.model
        self._started = self._mark = time.monotonic()
        self._samples, self._seq_len, self._waited = state.samples, config.seq_len, 0.0
        self._flops = flops_per_token(config, trainer.vocabulary, attended_length=config.seq_len)
        device = trainer.runtime.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = peak and peak * trainer.runtime.env.world_size

    def look(self, samples: int, waited_seconds: float) -> dict[str, float | None]:
        now = time.monotonic()
        seconds = max(1e-9, now - self._mark)
        rate, waited = (samples - self._samples) * self._seq_len / seconds, (waited_seconds - self._waited) / seconds
        self._mark, self._samples, self._waited = now, samples, waited_seconds
        mfu = rate * self._flops / self._peak if self._peak else None
        return {"tokens_per_second": round(rate, 1), "mfu": mfu, "data_wait": round(waited, 5),
                "seconds": round(now - self._started, 3)}

    def paused(self) -> Clock:
        return self

    def __enter__(self) -> None:
        self._paused_at = time.monotonic()

    def __exit__(self, *_exception) -> None:
        self._mark += time.monotonic() - self._paused_at


def step_record(trainer, batch, result, state: TrainState, following: TrainState, clock: Clock,
                waited_seconds: float) -> dict[str, Any]:
    """The line of a logged step; what is not finite is null. Collective: statistics and hashes are gathered over the
    data-parallel ranks."""
    means = reduce_sums(trainer, result["sums"], result["means"])
    means = {name: [c and finite(c) for c in value] if isinstance(value, list) else value and finite(value)
             for name, value in means.items()}
    options = trainer.config.optimizer
    return {
        "step": following.step,
        "tokens": following.samples * trainer.config.model.seq_len,
        **means,
        "learning_rate": options.learning_rate * rate_factor(state.step, trainer.config.train.num_steps, options),
        "grad_norm": finite(float(result["grad_norm"])),
        **clock.look(following.samples, waited_seconds),
        "batch_hash": batch_hash(batch, trainer.runtime.mesh, trainer.runtime.device),
    }


def evaluation_record(trainer: Trainer, validation: Any, state: TrainState, watch: Watchdog) -> dict[str, Any]:
    """The line of an evaluation; without a validation set it says so. Collective."""
    watch.enter("evaluate", state.step)
    line = {"step": state.step, "tokens": state.samples * trainer.config.model.seq_len}
    nothing = {"val_nelbo": None, "val_nelbo_se": None}
    if validation is None:
        return line | nothing
    if trainer.config.objective.kind in LABEL_OBJECTIVES:
        return line | nothing | evaluate_labels(trainer, validation, on_batch=lambda _: watch.enter("evaluate"))
    estimate = evaluate(trainer.engine, validation, trainer.vocabulary, trainer.config, trainer.runtime.mesh,
                        trainer.runtime.device, on_batch=lambda _: watch.enter("evaluate"))
    return line | {
        "val_nelbo": estimate.nelbo,
        "val_nelbo_se": estimate.nelbo_se,
        "val_nelbo_se_mc": estimate.nelbo_se_mc,
        "val_ce_by_mask_ratio": list(estimate.ce_by_mask_ratio),
    }

"""Evaluation of a classifier of replaced tokens or a scorer of texts in training: its loss, in place of a NELBO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale import ops
from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.draws import row_offsets
from dlm_scale.diffusion.rng import Stream
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.segments import Rows
from dlm_scale.diffusion.substitution import substitute
from dlm_scale.diffusion.timestep import wrap_time
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.evaluation import EVALUATION_SEED, batches_of_rank
from dlm_scale.engine.step import text_ids


@torch.no_grad()
def evaluate_labels(
    trainer: Trainer, validation: Any, on_batch: Callable[[int], None] | None = None
) -> dict[str, float | None]:
    """`val_loss` (nats a maskable token) and each mean of the objective, as `val_label_accuracy`, over
    `train.eval_draws` looks a row. What is replaced is a function of (row, look) alone. Collective over the data
    group."""
    train, mesh, total, means = trainer.config.train, trainer.runtime.mesh, 0.0, []
    trainer.engine.eval()
    for number, index_B in enumerate(batches_of_rank(validation.num_rows, train.micro_batch_size, mesh)):
        rows = validation.rows(np.maximum(index_B, 0))
        for draw in range(train.eval_draws):
            corrupted = _look(trainer, validation.meta, rows, index_B, draw).to(trainer.runtime.device)
            loss_sum, stats = trainer.objective(trainer.engine, corrupted, 0)
            means = sorted(name for name, value in stats.items() if value.shape == (2,))
            loss = torch.stack([loss_sum.double(), corrupted.num_maskable_B.sum().double()])
            total = total + torch.stack([loss, *(stats[name] for name in means)])
        if on_batch:
            on_batch(number + 1)
    trainer.engine.train()
    if mesh.data_size > 1:
        dist.all_reduce(total, group=mesh.data_group)
    names = [f"val_{name}" for name in ("loss", *means)]
    return {name: value / count if count else None for name, (value, count) in zip(names, total.tolist(), strict=True)}


def _look(trainer: Trainer, meta: Any, given: np.ndarray | Rows, index_B: np.ndarray, draw: int) -> Corrupted:
    """The rows at the time (u_r + draw / draws) mod 1; rows of negative index keep ranks in step and do not count."""
    config, rows = trainer.config, given if isinstance(given, Rows) else Rows(given, np.ones(given.shape, bool))
    offset_B = row_offsets(EVALUATION_SEED, index_B)
    t_S, attention = wrap_time(offset_B + draw / config.train.eval_draws), None
    if rows.bounds_S1 is not None:
        attention = ops.Segments(torch.from_numpy(rows.bounds_S1))
        t_S = t_S[rows.bounds_S1[:-1] // rows.ids_BL.shape[1]]
    return substitute(
        rows.ids_BL, index_B, t_S, seed=EVALUATION_SEED, schedule=SCHEDULES[config.diffusion.schedule],
        ids_K=text_ids(meta), mask_id=trainer.vocabulary.mask_id, denominator=1.0,
        maskable_BL=rows.maskable_BL & (index_B >= 0)[:, None], attention=attention,
        stream=Stream.REPLACEMENT + 256 * draw,
    )  # fmt: skip

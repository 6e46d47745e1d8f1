"""The one train step: micro-batches in, one optimizer update and its statistics out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale.diffusion.corruption import Corrupted, corrupt
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.gradients import clip_by_global_norm
from dlm_scale.engine.muon import muon_update
from dlm_scale.engine.optimizer import rate_factor
from dlm_scale.engine.state import TrainState

STATS = ("nelbo_sum", "ce_sum", "num_masked", "num_correct")


def rows_of_rank(trainer: Trainer) -> np.ndarray:
    """Indices [accumulation, micro] within the global batch of the rows that this data-parallel rank computes."""
    train, mesh = trainer.config.train, trainer.runtime.mesh
    rows = np.arange(train.global_batch_size)
    return rows.reshape(trainer.accumulation, mesh.data_size, train.micro_batch_size)[:, mesh.data_rank]


def make_batch(trainer: Trainer, data, state: TrainState) -> list[Corrupted]:
    """This rank's micro-batches of the step after `state`, noised, on the host.

    Ids, times and masks are functions of (seed, step, global sample) alone, so no layout changes them.
    """
    config = trainer.config
    times_G = stratified_times(config.train.seed, state.step, config.train.global_batch_size)
    denominator = float(config.train.global_batch_size * config.model.seq_len)
    return [
        corrupt(
            data.rows(state.samples + rows_B),
            state.samples + rows_B,
            times_G[rows_B],
            seed=config.train.seed,
            schedule=SCHEDULES[config.diffusion.schedule],
            weighting=WEIGHTINGS[config.diffusion.weighting],
            mask_id=trainer.vocabulary.mask_id,
            denominator=denominator,
        )
        for rows_B in rows_of_rank(trainer)
    ]


def train_step(trainer: Trainer, batch: Sequence[Corrupted], state: TrainState) -> dict[str, torch.Tensor]:
    """Accumulate gradients over `batch`, clip by the global norm, update the weights.

    Returns device tensors, not yet summed over ranks: `sums` float64 [1 + len(STATS)] (loss sum first) and `grad_norm`,
    the true global norm before clipping.
    """
    engine, mesh = trainer.engine, trainer.runtime.mesh
    factor = rate_factor(state.step, trainer.config.train.num_steps, trainer.config.optimizer)
    for group in engine.optimizer.param_groups:
        group["lr"] = trainer.config.optimizer.learning_rate * factor
    sums = torch.zeros(1 + len(STATS), dtype=torch.float64, device=trainer.runtime.device)
    for corrupted in batch:
        corrupted = corrupted.to(trainer.runtime.device)
        loss_sum, stats = masked_diffusion(engine, corrupted)
        # DeepSpeed averages gradients over the data-parallel ranks: undo that, and its division by the accumulation.
        engine.backward(loss_sum * (mesh.data_size / corrupted.denominator), scale_wrt_gas=False)
        sums += torch.stack([loss_sum.detach().double(), *(stats[name] for name in STATS)])
        if engine.is_gradient_accumulation_boundary():
            norm = clip_by_global_norm(trainer, trainer.config.optimizer.gradient_clip)
            if trainer.config.optimizer.name == "muon":
                muon_update(trainer, trainer.config.optimizer.muon_learning_rate * factor)
        engine.step()
    return {"sums": sums, "grad_norm": norm}


def reduce_sums(trainer: Trainer, sums: torch.Tensor) -> dict[str, float]:
    """Statistics of the global batch: loss and NELBO in nats a maskable token, mean CE and accuracy a masked one."""
    if trainer.runtime.mesh.data_size > 1:
        dist.all_reduce(sums, group=trainer.runtime.mesh.data_group)
    loss, nelbo, ce, masked, correct = sums.tolist()
    tokens = trainer.config.train.global_batch_size * trainer.config.model.seq_len
    return {
        "loss": loss / tokens,
        "nelbo": nelbo / tokens,
        "masked_ce": ce / max(1.0, masked),
        "masked_accuracy": correct / max(1.0, masked),
    }

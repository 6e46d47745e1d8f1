"""NELBO of the validation rows during training, spread over the data-parallel ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.likelihood import NelboEstimate, RowSums, row_sums, summarise

EVALUATION_SEED = 0  # fixed: all checkpoints of all runs are compared on the same masks


def cross_entropy_fn(module: Any, device: torch.device):
    """ce_fn(corrupted) -> ce [N] float32 of a model (or engine) that takes docs/design.md's hidden_fn arguments."""

    def ce_fn(corrupted: Corrupted) -> torch.Tensor:
        corrupted = corrupted.to(device)
        weight_N = torch.ones_like(corrupted.weight_N)
        ask = lambda head: head.cross_entropy(corrupted.target_N, weight_N)  # noqa: E731
        return module(corrupted.xt_BL, m_B=corrupted.m_B, rows_N=corrupted.rows_N, readout=ask,
                      attention=corrupted.attention)[1]

    return ce_fn


def _batches_of_rank(num_rows: int, batch_size: int, mesh: Any) -> list[np.ndarray]:
    """Row indices of this rank's batches. Every rank gets as many batches (ZeRO-3 forwards are collective); fillers
    are rows of index -1. Whole batches are dealt out, so a row's numbers do not depend on the number of ranks."""
    starts = np.arange(0, num_rows, batch_size)
    rounds = -(-len(starts) // mesh.data_size)
    mine = [starts[i] for i in range(mesh.data_rank, len(starts), mesh.data_size)]
    batches = [np.arange(start, min(num_rows, start + batch_size)) for start in mine]
    return batches + [np.full(1, -1)] * (rounds - len(batches))


@torch.no_grad()
def evaluate(module: Any, validation: Any, mask_id: int, batch_size: int, num_draws: int, mesh: Any, device,
             seed: int = EVALUATION_SEED, on_batch=None) -> NelboEstimate:
    """The estimate over all rows of `validation` (`num_rows`, `rows(indices)`). Collective over the data group."""
    ce_fn = cross_entropy_fn(module, device)
    module.eval()
    parts = []
    for index_B in _batches_of_rank(validation.num_rows, batch_size, mesh):
        x0_BL = validation.rows(np.maximum(index_B, 0))
        parts.append(row_sums(ce_fn, x0_BL, index_B, seed=seed, num_draws=num_draws, mask_id=mask_id))
        if on_batch:
            on_batch(len(parts))
    module.train()
    return summarise(_gather(parts, mesh))


def _gather(parts: list[RowSums], mesh: Any) -> list[RowSums]:
    if mesh.data_size == 1:
        return parts
    everyone: list[Any] = [None] * mesh.data_size
    dist.all_gather_object(everyone, parts, group=mesh.data_group)
    return [part for rank_parts in everyone for part in rank_parts]

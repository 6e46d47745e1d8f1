"""Likelihood of a data set's rows, spread over the data-parallel ranks: during training and by `dlm evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale import ops
from dlm_scale.diffusion.autoregressive import shifted
from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.draws import default_estimator
from dlm_scale.diffusion.likelihood import NelboEstimate, RowSums, exact_sums, row_sums, sums_of_draws, summarise
from dlm_scale.diffusion.segments import Rows
from dlm_scale.engine.gaussian_evaluation import gaussian_sums
from dlm_scale.engine.objectives import process_of

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


def batches_of_rank(num_rows: int, batch_size: int, mesh: Any) -> list[np.ndarray]:
    """Row indices of this rank's batches. Every rank gets as many batches (ZeRO-3 forwards are collective); fillers
    are rows of index -1. Whole batches are dealt out, so a row's numbers do not depend on the number of ranks."""
    starts = np.arange(0, num_rows, batch_size)
    rounds = -(-len(starts) // mesh.data_size)
    mine = [starts[i] for i in range(mesh.data_rank, len(starts), mesh.data_size)]
    batches = [np.arange(start, min(num_rows, start + batch_size)) for start in mine]
    return batches + [np.full(1, -1)] * (rounds - len(batches))


SumsOfBatch = Callable[[Any, np.ndarray], RowSums]  # (what `rows` gives, row indices)


def nelbo_sums(ce_fn: Callable, mask_id: int, num_draws: int, seed: int = EVALUATION_SEED,
               estimator: str | None = None) -> SumsOfBatch:
    """The NELBO of masked diffusion; without a name, the estimator that suits `num_draws`."""
    options = {"seed": seed, "num_draws": num_draws, "mask_id": mask_id,
               "estimator": estimator or default_estimator(num_draws)}

    def sums(rows: np.ndarray | Rows, row_index_B: np.ndarray) -> RowSums:
        if not isinstance(rows, Rows):
            return row_sums(ce_fn, rows, row_index_B, **options)
        return row_sums(_apart(ce_fn, rows), rows.ids_BL, row_index_B, maskable_BL=rows.maskable_BL, **options)

    return sums


def _apart(ce_fn: Callable, rows: Rows) -> Callable:
    """The ce_fn of rows whose segments do not see each other: an answer with its past, and padding."""
    if rows.bounds_S1 is None:
        return ce_fn
    attention, row_S = ops.Segments(torch.from_numpy(rows.bounds_S1)), rows.bounds_S1[:-1] // rows.ids_BL.shape[1]
    return lambda corrupted: ce_fn(replace(corrupted, attention=attention, m_B=corrupted.m_B[row_S]))


def autoregressive_sums(ce_fn: Callable, mask_id: int) -> SumsOfBatch:
    """The exact likelihood of the autoregressive twin, in one pass."""

    def sums(x0_BL: np.ndarray, row_index_B: np.ndarray) -> RowSums:
        options = {"mask_id": mask_id, "denominator": 1.0, "causal": ops.Causal()}
        one = sums_of_draws(ce_fn, row_index_B, [shifted(x0_BL, row_index_B, **options)])
        return exact_sums(row_index_B, one.weighted_ce_RK[:, 0], one.num_maskable_R)

    return sums


@torch.no_grad()
def dataset_sums(sums_of_batch: SumsOfBatch, validation: Any, batch_size: int, mesh: Any,
                 on_batch: Callable[[int], None] | None = None) -> list[RowSums]:
    """The sums of all rows of `validation` (`num_rows`, `rows(indices)`). Collective over the data group."""
    parts = []
    for index_B in batches_of_rank(validation.num_rows, batch_size, mesh):
        parts.append(sums_of_batch(validation.rows(np.maximum(index_B, 0)), index_B))
        if on_batch:
            on_batch(len(parts))
    return gather_parts(parts, mesh)


def evaluate(module: Any, validation: Any, vocabulary: Any, config: Any, mesh: Any, device: torch.device,
             on_batch: Callable[[int], None] | None = None) -> NelboEstimate:
    """The estimate over `validation` during training, by the run's settings. Collective over the data group."""
    ce_fn, train, mask_id = cross_entropy_fn(module, device), config.train, vocabulary.mask_id
    sums = {
        "masked": lambda: nelbo_sums(ce_fn, mask_id, train.eval_draws),
        "autoregressive": lambda: autoregressive_sums(ce_fn, mask_id),
        "gaussian": lambda: gaussian_sums(
            module, device, process_of(config.gaussian), mask_id, train.eval_draws, EVALUATION_SEED
        ),
    }[config.objective.kind]()
    module.eval()
    parts = dataset_sums(sums, validation, train.micro_batch_size, mesh, on_batch)
    module.train()
    return summarise(parts)


def gather_parts(parts: list[Any], mesh: Any) -> list[Any]:
    """The parts of all data-parallel ranks, on each of them. Collective over the data group."""
    if mesh.data_size == 1:
        return parts
    everyone: list[Any] = [None] * mesh.data_size
    dist.all_gather_object(everyone, parts, group=mesh.data_group)
    return [part for rank_parts in everyone for part in rank_parts]

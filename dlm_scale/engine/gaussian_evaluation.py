"""The bound of Gaussian diffusion over a data set's rows: what engine/evaluation.py is for masked diffusion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dlm_scale import ops
from dlm_scale.diffusion.draws import NUM_REPLICATES, check_draws
from dlm_scale.diffusion.gaussian import Process, noised
from dlm_scale.diffusion.gaussian_objective import bound_of_row_step
from dlm_scale.diffusion.likelihood import RowSums
from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform53
from dlm_scale.diffusion.segments import Rows

_NO_COLUMN = 0xFFFFFFFF


def gaussian_sums(module: Any, device: torch.device, process: Process, mask_id: int, num_draws: int, seed: int) -> Any:
    """(what `rows` of a dataset gives, row_index_B) -> RowSums of the discrete bound (diffusion/gaussian.py), in two
    independent replicates.

    A replicate looks at num_draws/2 steps after the process's first one, stratified, each with the weight that makes
    their mean the sum over all of them, and once at the first for the reconstruction. With self-conditioning the
    network reads the prediction of its own first pass, everywhere: that too is a function of z alone, so the bound holds.
    """
    check_draws("exact", num_draws)
    num_passes, num_later = num_draws // NUM_REPLICATES, process.num_used - 1

    def look(rows: Rows, index_B: np.ndarray, step_B: np.ndarray, draw: int) -> list[np.ndarray]:
        attention = None if rows.bounds_S1 is None else ops.Segments(torch.from_numpy(rows.bounds_S1))
        options = {"seed": seed, "process": process, "mask_id": mask_id, "denominator": 1.0, "attention": attention}
        corrupted = noised(rows.ids_BL, index_B, step_B, maskable_BL=rows.maskable_BL, stream=Stream.EVAL + 256 * draw,
                           **options)  # fmt: skip
        row_N, num_rows = corrupted.rows_N.numpy() // rows.ids_BL.shape[1], len(rows.ids_BL)
        corrupted = replace(corrupted, reads_guess_B=torch.ones_like(corrupted.reads_guess_B)).to(device)
        parts = bound_of_row_step(module, corrupted, process)
        return [np.bincount(row_N, part_N.double().cpu().numpy(), num_rows) for part_N in parts]

    def sums(given: np.ndarray | Rows, row_index_B: np.ndarray) -> RowSums:
        rows = given if isinstance(given, Rows) else Rows(given, np.ones(given.shape, bool))
        num_rows = len(rows.ids_BL)
        bound_KB, ce_KB = [], []
        for replicate in range(NUM_REPLICATES):
            first = replicate * (num_passes + 1)
            begin_B = np.full(num_rows, process.first)
            _, reconstruction_B, prior_B, _ = look(rows, row_index_B, begin_B, first)
            w0_B, w1_B, _, _ = philox(seed, *counter_of(row_index_B), _NO_COLUMN, Stream.EVAL + 256 * first)
            for stratum in range(num_passes):
                place_B = (uniform53(w0_B, w1_B) + stratum / num_passes) % 1.0
                step_B = begin_B + 1 + np.floor(place_B * num_later)
                kl_B, _, _, ce_B = look(rows, row_index_B, step_B, first + 1 + stratum)
                bound_KB.append(num_later * kl_B + reconstruction_B + prior_B)
                ce_KB.append(ce_B)
        length_B = rows.maskable_BL.sum(1)
        tokens_RK = np.repeat(length_B[:, None], num_draws, axis=1)
        return RowSums(row_index_B, np.stack(bound_KB, 1), np.stack(ce_KB, 1), tokens_RK, length_B)

    return sums

"""Ids drawn for all masked positions at once, each on its own: what a critic is trained on, and a judge scores.

Shapes: B rows, L positions, N selected positions of the flattened batch, V output vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlm_scale.diffusion.corruption import KIND_MASKED, Corrupted
from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform53

FILL_ROWS = 256  # of log-probabilities at a time


def categorical(weight_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Ids [N] in proportion to the weights (>= 0), by inverse CDF in vocabulary order; the sums are float64."""
    cdf_NV = weight_NV.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_NV, uniform_N[:, None] * cdf_NV[:, -1:], right=True)[:, 0]


def fill_uniforms(seed: int, sample_index_B: np.ndarray, num_columns: int) -> Tensor:
    """float64 [B, L] in [0, 1): one number a position for its id, from (seed, global sample, column)."""
    low_B, high_B = counter_of(sample_index_B)
    words = philox(seed, low_B[:, None], high_B[:, None], np.arange(num_columns), Stream.CRITIC)
    return torch.from_numpy(uniform53(words[0], words[1]))


@torch.no_grad()
def one_shot_fill(head: Any, uniform_N: Tensor) -> Tensor:
    """Ids [N] of `head`'s law at each position. No [N, V] tensor but FILL_ROWS rows of it.

    A network that has diverged gives some id or other: its loss says so, not this.
    """
    blocks = zip(head.hidden_ND.detach().split(FILL_ROWS), uniform_N.split(FILL_ROWS), strict=True)
    ids = []
    for hidden_ND, uniform in blocks:
        probability_NV = head.over(hidden_ND).log_probs().exp()
        ids.append(categorical(probability_NV, uniform).clamp(max=probability_NV.shape[1] - 1))
    return torch.cat(ids)


def draw(head: Any, corrupted: Corrupted) -> Tensor:
    """Ids [N] for the positions that carry loss, from the batch's own uniforms. Call in a readout."""
    return one_shot_fill(head, corrupted.uniform_BL.flatten()[corrupted.rows_N])


def filled(corrupted: Corrupted, ids_N: Tensor) -> Tensor:
    """int64 [B, L]: the noised text with `ids_N` where it was masked."""
    xt, rows_N = corrupted.xt_BL.flatten(), corrupted.rows_N
    y_N = torch.where(corrupted.kind_N == KIND_MASKED, ids_N, xt[rows_N])
    return xt.index_copy(0, rows_N, y_N).view_as(corrupted.xt_BL)

"""One-shot fills: every masked position of a noised text gets an id from the network's law there, all at once.

The uniforms are functions of (seed, global sample index, column) alone, so a sample is filled alike wherever it is
computed.
"""

from typing import Any

import numpy as np
import torch

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform53

ROWS_AT_A_TIME = 256  # log-probabilities of the whole vocabulary are there for so many positions


def fill_uniforms(seed: int, sample_index_B: np.ndarray, rows_N: torch.Tensor, length: int) -> torch.Tensor:
    """float64 [N] in [0, 1) for flat positions `rows_N` of [B, length]: Philox(seed; sample, column, CRITIC)."""
    row_N, column_N = np.divmod(rows_N.cpu().numpy(), length)
    low_B, high_B = counter_of(sample_index_B)
    w0_N, w1_N, _, _ = philox(seed, low_B[row_N], high_B[row_N], column_N, Stream.CRITIC)
    return torch.from_numpy(uniform53(w0_N, w1_N)).to(rows_N.device)


@torch.no_grad()
def one_shot(log_probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the inverse of each row's distribution function at its uniform; never an id of probability 0."""
    cdf_NV = log_probs_NV.double().exp().cumsum(1)
    id_N = torch.searchsorted(cdf_NV, (uniform_N * cdf_NV[:, -1])[:, None], right=True)[:, 0]
    return torch.where(id_N < cdf_NV.shape[1], id_N, log_probs_NV.argmax(1))  # a product may round up to the whole


@torch.no_grad()
def filled(head: Any, corrupted: Corrupted) -> torch.Tensor:
    """int64 [B, L]: the noised ids, filled at `rows_N` from `head`'s law by `corrupted.uniform_N`. Call in a readout."""
    parts = zip(head.hidden_ND.split(ROWS_AT_A_TIME), corrupted.uniform_N.split(ROWS_AT_A_TIME))
    ids = [one_shot(head.over(hidden_CD).log_probs(), uniform_C) for hidden_CD, uniform_C in parts]
    ids_N = torch.cat(ids) if ids else corrupted.target_N
    return corrupted.xt_BL.flatten().index_copy(0, corrupted.rows_N, ids_N).view_as(corrupted.xt_BL)

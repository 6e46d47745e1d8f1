"""The autoregressive twin: the same network, data and loss, predicting each token from those before it.

The network reads the row moved right by one, the mask id standing for "no token yet" at the front, under causal
attention; position i then predicts token i from tokens 0 ... i-1. So all L tokens of a row carry loss, the first from
nothing, and nats per token mean the same as a NELBO over the same rows: both are of the whole row.
"""

from typing import Any

import numpy as np
import torch

from dlm_scale.diffusion.corruption import Corrupted, assemble, clean_rows, replace
from dlm_scale.diffusion.segments import row_bounds


def moved_right(x_BL: torch.Tensor, mask_id: int) -> torch.Tensor:
    """What the network reads to predict x_BL: the mask id, then all but the last token."""
    return torch.cat([torch.full_like(x_BL[:, :1], mask_id), x_BL[:, :-1]], dim=1)


def shifted(
    x0_BL, sample_index_B: np.ndarray, *, mask_id: int, denominator: float | None, causal: Any, maskable_BL=None
) -> Corrupted:
    """The rows as a `Corrupted` whose weighted cross-entropies add up to -log p(row): every weight is 1.

    `causal`: the mask value of causal attention. Positions that are not maskable (padding, prompts) are read, but carry
    no loss. Mask ratio and time are 1, for a token sees nothing of itself or after it.
    """
    x0_BL, sample_index_B, maskable_BL = clean_rows(x0_BL, sample_index_B, maskable_BL, mask_id)
    ones_B, weight_B = np.ones(len(x0_BL)), torch.ones(len(x0_BL))
    predicted = replace(x0_BL, maskable_BL, row_bounds(*x0_BL.shape), mask_id)
    return assemble(
        predicted._replace(xt_BL=moved_right(torch.from_numpy(x0_BL), mask_id)), weight_S=weight_B,
        elbo_weight_S=weight_B, m_S=ones_B, t_S=ones_B.copy(), num_maskable_S=maskable_BL.sum(1),
        denominator=denominator, attention=causal,
    )  # fmt: skip

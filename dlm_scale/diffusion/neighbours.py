"""What a sampler head is trained on: a masked id, given the hidden state at it and the ids to its left and right.

Of the masked positions of x_t each is told to the head with probability 1/2, on its own. A neighbour's id is known where
it stands in the same segment and is visible in x_t or told; the loss is the cross-entropy of every masked position under
the head's law, with the weights of the network's own loss. What is told does not depend on the ids, so the best head is
p(x_i | x_t, the known ids beside i): what sampling in waves (sampling/waves.py) asks of it, where ids drawn a wave ago
stand beside those still masked. The four patterns of known neighbours all occur, whatever is visible.

Source: seed 002's sampler head, whose inputs are detached too. Shapes: B rows, L positions, N masked positions.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.objective import Stats, mean_stat
from dlm_scale.diffusion.rng import Stream, counter_of, philox

UNKNOWN = -1


def told_positions(seed: int, sample_index_B: np.ndarray, num_columns: int) -> Tensor:
    """bool [B, L], each True with probability 1/2: last word of the stream PART at (seed, global sample, column)."""
    low_B, high_B = counter_of(sample_index_B)
    word_BL = philox(seed, low_B[:, None], high_B[:, None], np.arange(num_columns), Stream.PART)[3]
    return torch.from_numpy(word_BL >= 1 << 31)


def known_neighbours(corrupted: Corrupted) -> tuple[Tensor, Tensor]:
    """(left_N, right_N) int64: clean ids beside the positions that carry loss, UNKNOWN where the head is not told."""
    rows_N, (num_rows, length) = corrupted.rows_N, corrupted.xt_BL.shape
    x0 = corrupted.xt_BL.flatten().index_copy(0, rows_N, corrupted.target_N)
    is_known = (~corrupted.is_masked_BL | corrupted.told_BL).flatten()
    bounds = corrupted.bounds_S1
    bounds = torch.arange(0, x0.numel() + 1, length, device=x0.device) if bounds is None else bounds.long()
    is_first = torch.zeros_like(is_known).index_fill(0, bounds[:-1], True)
    is_last = torch.zeros_like(is_known).index_fill(0, bounds[1:] - 1, True)
    left, right = (torch.where(is_known, x0, UNKNOWN).roll(shift) for shift in (1, -1))
    return left.masked_fill(is_first, UNKNOWN)[rows_N], right.masked_fill(is_last, UNKNOWN)[rows_N]


def sampler_term(head: Any, corrupted: Corrupted, *, alpha: float) -> tuple[Tensor, Stats]:
    """`alpha` times the sampler head's weighted cross-entropies; stats: `sampler_ce`, its mean in nats."""
    local = head.local(*known_neighbours(corrupted))
    loss_sum, ce_N, _ = local.cross_entropy(corrupted.target_N, corrupted.weight_N)
    return alpha * loss_sum, {"sampler_ce": mean_stat(ce_N)}


def idle_sampler(head: Any, corrupted: Corrupted) -> tuple[Tensor, Stats]:
    """A term of 0, by which the sampler head has a gradient (of 0) in every step and at every layout."""
    one = head.over(head.hidden_ND.detach()[:1])
    unknown = torch.full_like(corrupted.rows_N[:1], UNKNOWN)
    return 0.0 * one.local(unknown, unknown).hidden_ND.float().sum(), {}

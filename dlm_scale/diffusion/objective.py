"""The training objective of masked diffusion.

loss = sum over masked tokens of weight * cross-entropy, divided by the maskable positions of the global batch, never
by the number of MASKED ones: that would be a ratio estimator whose mean depends on the micro-batch.
"""

from collections.abc import Callable

import torch

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.likelihood import NUM_BINS


def masked_diffusion(
    hidden_fn: Callable, corrupted: Corrupted, z_loss: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss_sum, stats) of one micro-batch.

    `hidden_fn(xt_BL, *, m_B, rows_N, readout, attention)` runs the network and returns `readout(head)`;
    `head.cross_entropy(target_N, weight_N, z_loss)` gives (weighted sum, ce_N in nats, is_correct_N). loss_sum is the
    local sum of weighted cross-entropies, before the denominator, and of z_loss times each masked token's squared
    log-sum-exp. stats: detached float64 that add up over micro-batches and ranks, free of the z-loss: nelbo_sum (nats),
    ce_sum (unweighted nats), num_masked, num_correct; by mask ratio, [NUM_BINS], ce_sum_bins and num_masked_bins.
    """

    def readout(head):
        return head.cross_entropy(corrupted.target_N, corrupted.weight_N, z_loss)

    loss_sum, ce_N, is_correct_N = hidden_fn(
        corrupted.xt_BL, m_B=corrupted.m_B, rows_N=corrupted.rows_N, readout=readout, attention=corrupted.attention
    )
    ce_N = ce_N.detach().double()
    ce_sum_bins, num_masked_bins = cross_entropy_by_bin(ce_N, corrupted.m_B[corrupted.segment_N], NUM_BINS)
    stats = {
        "nelbo_sum": (corrupted.elbo_weight_N.double() * ce_N).sum(),
        "ce_sum": ce_N.sum(),
        "num_masked": ce_N.new_tensor(corrupted.rows_N.numel()),
        "num_correct": is_correct_N.detach().double().sum(),
        "ce_sum_bins": ce_sum_bins,
        "num_masked_bins": num_masked_bins,
    }
    return loss_sum, stats


def cross_entropy_by_bin(ce_N: torch.Tensor, m_N: torch.Tensor, num_bins: int) -> torch.Tensor:
    """float64 [2, num_bins]: sum of ce and number of rows by mask ratio m in (0, 1], in bins of equal width.

    Sums add up over micro-batches and ranks. Deterministic (a matmul, no atomics).
    """
    bin_N = (m_N.double() * num_bins).ceil().long().clamp(1, num_bins) - 1
    is_in_bin = (bin_N[:, None] == torch.arange(num_bins, device=m_N.device)).double()
    return torch.stack([ce_N.double(), torch.ones_like(ce_N, dtype=torch.float64)]) @ is_in_bin

"""The training objective of masked diffusion.

loss = sum over masked tokens of weight * cross-entropy, divided by the maskable positions of the global batch, never
by the number of MASKED ones: that would be a ratio estimator whose mean depends on the micro-batch.
"""

from collections.abc import Callable

import torch

from dlm_scale.diffusion.corruption import Corrupted


def masked_diffusion(hidden_fn: Callable, corrupted: Corrupted) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss_sum, stats) of one micro-batch.

    `hidden_fn(xt_BL, *, m_B, rows_N, readout, attention)` runs the network and returns `readout(head)`;
    `head.cross_entropy(target_N, weight_N)` gives (weighted sum, ce_N in nats, is_correct_N). loss_sum is the local
    sum of weighted cross-entropies, before the denominator. stats: detached float64 scalars that add up over
    micro-batches and ranks: nelbo_sum (nats), ce_sum (unweighted nats), num_masked, num_correct.
    """

    def readout(head):
        return head.cross_entropy(corrupted.target_N, corrupted.weight_N)

    loss_sum, ce_N, is_correct_N = hidden_fn(
        corrupted.xt_BL, m_B=corrupted.m_B, rows_N=corrupted.rows_N, readout=readout, attention=corrupted.attention
    )
    ce_N = ce_N.detach().double()
    stats = {
        "nelbo_sum": (corrupted.elbo_weight_N.double() * ce_N).sum(),
        "ce_sum": ce_N.sum(),
        "num_masked": ce_N.new_tensor(corrupted.rows_N.numel()),
        "num_correct": is_correct_N.detach().double().sum(),
    }
    return loss_sum, stats

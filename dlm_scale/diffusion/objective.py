"""The training objective of masked diffusion.

loss = sum over masked tokens of weight * cross-entropy, divided by the maskable positions of the global batch, never
by the number of MASKED ones: that would be a ratio estimator whose mean depends on the micro-batch.
"""

from collections.abc import Callable, Sequence

import torch

from dlm_scale.diffusion.corruption import KIND_MASKED, Corrupted
from dlm_scale.diffusion.likelihood import NUM_BINS

Stats = dict[str, torch.Tensor]  # what adds up over micro-batches and ranks; [2] is (sum, number) of a mean
Term = Callable[..., tuple[torch.Tensor, Stats]]  # (head, corrupted) -> (loss_sum, stats), on the same hidden states
Measure = Callable[..., Stats]  # (corrupted, ce_N, is_correct_N) -> stats beside those of the masked tokens


def masked_diffusion(
    hidden_fn: Callable,
    corrupted: Corrupted,
    z_loss: float = 0.0,
    *,
    label_smoothing: float = 0.0,
    weigh: Callable | None = None,
    terms: Sequence[Term] = (),
    measures: Sequence[Measure] = (),
) -> tuple[torch.Tensor, Stats]:
    """(loss_sum, stats) of one micro-batch.

    `hidden_fn(xt_BL, *, m_B, rows_N, readout, attention)` runs the network and returns `readout(head)`;
    `head.cross_entropy(target_N, weight_N, z_loss, label_smoothing)` gives (weighted sum, ce_N in nats, is_correct_N).
    weigh(head, corrupted) -> float32 [N], detached: the weights in place of `corrupted.weight_N`. Each of `terms` adds
    its loss and its stats, each of `measures` its stats of the same cross-entropies.

    loss_sum is the local sum of weighted cross-entropies, before the denominator, and of z_loss times each token's
    squared log-sum-exp. stats: detached float64 that add up over micro-batches and ranks, of the masked tokens alone
    and free of all that is added to the loss: nelbo_sum (nats), ce_sum (unweighted nats), num_masked, num_correct; by
    mask ratio, [NUM_BINS], ce_sum_bins and num_masked_bins; beside these [2] (sum, number) of each mean of a term or
    measure.
    """

    def readout(head):
        weight_N = corrupted.weight_N if weigh is None else weigh(head, corrupted)
        cross = head.cross_entropy(corrupted.target_N, weight_N, z_loss, label_smoothing)
        return cross, [term(head, corrupted) for term in terms]

    (loss_sum, ce_N, is_correct_N), added = hidden_fn(
        corrupted.xt_BL, m_B=corrupted.m_B, rows_N=corrupted.rows_N, readout=readout, attention=corrupted.attention
    )
    stats = masked_stats(corrupted, ce_N, is_correct_N)
    for measure in measures:
        stats |= measure(corrupted, ce_N, is_correct_N)
    for term_sum, term_stats in added:
        loss_sum, stats = loss_sum + term_sum, stats | term_stats
    return loss_sum, stats


def masked_stats(corrupted: Corrupted, ce_N: torch.Tensor, is_correct_N: torch.Tensor) -> Stats:
    """The statistics of `masked_diffusion` from each row's cross-entropy, nats, and whether it was right."""
    is_masked_N = (corrupted.kind_N == KIND_MASKED).double()
    ce_N = ce_N.detach().double() * is_masked_N
    ce_sum_bins, num_masked_bins = cross_entropy_by_bin(
        ce_N, corrupted.m_B[corrupted.segment_N], NUM_BINS, is_masked_N
    )
    return {
        "nelbo_sum": (corrupted.elbo_weight_N.double() * ce_N).sum(),
        "ce_sum": ce_N.sum(),
        "num_masked": is_masked_N.sum(),
        "num_correct": (is_correct_N.detach().double() * is_masked_N).sum(),
        "ce_sum_bins": ce_sum_bins,
        "num_masked_bins": num_masked_bins,
    }


def mean_stat(values_N: torch.Tensor) -> torch.Tensor:
    """[2] float64: sum and number, which add up to a mean over micro-batches and ranks."""
    values_N = values_N.detach().double()
    return torch.stack([values_N.sum(), values_N.new_tensor(values_N.numel())])


def cross_entropy_by_bin(
    ce_N: torch.Tensor, m_N: torch.Tensor, num_bins: int, count_N: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 [2, num_bins]: sum of ce and number of rows by mask ratio m in (0, 1], in bins of equal width.

    Sums add up over micro-batches and ranks. count_N: how much each row counts, default 1. Deterministic (a matmul, no
    atomics).
    """
    bin_N = (m_N.double() * num_bins).ceil().long().clamp(1, num_bins) - 1
    is_in_bin = (bin_N[:, None] == torch.arange(num_bins, device=m_N.device)).double()
    count_N = torch.ones_like(ce_N, dtype=torch.float64) if count_N is None else count_N
    return torch.stack([ce_N.double(), count_N]) @ is_in_bin

"""Two more objectives on the same trunk, for text some of whose tokens were replaced (substitution.py).

    token_classification   which tokens: two classes at each maskable position, cross-entropy
    sequence_scoring       how many: the segment's score is the mean over its positions, sigmoid(score) is held to the
                           share of its maskable positions that was replaced, by binary cross-entropy

The mean over positions, not the first one, carries the score: it takes no special position, so packed documents and cut
rows have one each, and the share of wrong tokens is itself a mean over them. Losses are divided by the maskable
positions of the global batch, a segment counting as its maskable positions; neither is a likelihood.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dlm_scale.diffusion.corruption import KIND_SUBSTITUTED, Corrupted
from dlm_scale.diffusion.likelihood import NUM_BINS
from dlm_scale.diffusion.modifiers import segment_sums
from dlm_scale.diffusion.objective import Stats


def token_classification(hidden_fn: Callable, corrupted: Corrupted) -> tuple[torch.Tensor, Stats]:
    """(loss_sum, stats), as `masked_diffusion`; the head offers `labels()` [N, 2]. Adds `label_accuracy`."""
    logits_N2 = _read(hidden_fn, corrupted, lambda head: head.labels())
    label_N = (corrupted.kind_N == KIND_SUBSTITUTED).long()
    ce_N = F.cross_entropy(logits_N2, label_N, reduction="none")
    weight_N = corrupted.weight_N.double()
    is_right_N = (logits_N2.argmax(1) == label_N).double()
    accuracy = torch.stack([(is_right_N * weight_N).sum(), weight_N.sum()])
    return (ce_N * corrupted.weight_N).sum(), _nothing_masked(corrupted) | {"label_accuracy": accuracy}


def sequence_scoring(hidden_fn: Callable, corrupted: Corrupted) -> tuple[torch.Tensor, Stats]:
    """(loss_sum, stats), as `masked_diffusion`; the head offers `score()` [N]. Adds `score_error`, the mean distance
    of sigmoid(score) from the true share over the segments that have maskable positions."""
    score_S = segment_scores(_read(hidden_fn, corrupted, lambda head: head.score()), corrupted)
    length_S = corrupted.num_maskable_B.double()
    replaced_S = segment_sums((corrupted.kind_N == KIND_SUBSTITUTED).double(), corrupted)
    share_S = replaced_S / length_S.clamp(min=1)
    loss_S = F.binary_cross_entropy_with_logits(score_S, share_S.to(score_S.dtype), reduction="none")
    counts_S = (length_S > 0).double()
    error_S = (score_S.detach().double().sigmoid() - share_S).abs() * counts_S
    error = torch.stack([error_S.sum(), counts_S.sum()])
    return (loss_S * length_S.to(loss_S.dtype)).sum(), _nothing_masked(corrupted) | {"score_error": error}


def segment_scores(score_N: torch.Tensor, corrupted: Corrupted) -> torch.Tensor:
    """[S]: mean over each segment's positions, `rows_N` being all of the batch."""
    num_S = segment_sums(torch.ones_like(score_N), corrupted)
    return segment_sums(score_N, corrupted) / num_S


def _read(hidden_fn: Callable, corrupted: Corrupted, readout: Callable) -> torch.Tensor:
    return hidden_fn(corrupted.xt_BL, m_B=corrupted.m_B, rows_N=corrupted.rows_N, readout=readout,
                     attention=corrupted.attention)  # fmt: skip


def _nothing_masked(corrupted: Corrupted) -> Stats:
    """The statistics of a language model, of no token."""
    zero = torch.zeros((), dtype=torch.float64, device=corrupted.xt_BL.device)
    none = {name: zero for name in ("nelbo_sum", "ce_sum", "num_masked", "num_correct")}
    return none | {name: zero.expand(NUM_BINS) for name in ("ce_sum_bins", "num_masked_bins")}


LABEL_OBJECTIVES = {"token_classification": token_classification, "sequence_scoring": sequence_scoring}

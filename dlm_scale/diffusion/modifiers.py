"""Loss modifiers: what multiplies or replaces the weights of the masked cross-entropies. Not an ELBO any more.

Legend: S segments (rows, where nothing is packed), N positions that carry loss; n_s masked positions of a segment, L_s
its maskable ones, r_s = n_s / L_s the share that was really masked. In this order, each on what came before:

    mask ratio   the weights become  c(r_s) L_s / n_s,  c(r) = clamp(r**-power, .1, 10):  the row means of the masked
                 cross-entropies, weighted by c
    entropy      times  u_s / mean(u),  u_s = 1 / (max(H_s, threshold) + 1e-8),  H_s the segment's mean of the masked
                 positions' normalised entropy of the wrong ids. The mean goes over all segments of the GLOBAL batch
                 that have a masked position, so the factors have mean 1; it is not known here: the weights are without
                 it, and the train step divides the gradient and the loss by the mean of ENTROPY_WEIGHT
    judge        times  clamp((wrong_s / max(y(r_s), 1e-6))**exponent, .1, 10),  y(x) = x**4 - 2 x**3 + 2 x,  wrong_s
                 what a frozen sequence scorer thinks of a one-shot fill

Label smoothing, the fourth, belongs to the cross-entropy itself. Weights are detached, in float64 until the end.
Source: the seed's loss_modifiers (JinxCodesAI/nano_gpt); there the mean goes over each micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dlm_scale.diffusion.corruption import KIND_MASKED, Corrupted
from dlm_scale.diffusion.fill import draw, filled

ENTROPY_WEIGHT = "entropy_weight"  # the statistic by whose mean the weights are still to be divided
LEAST, MOST = 0.1, 10.0
EPS, SMALLEST_WRONGNESS = 1e-8, 1e-6
Judge = Callable[[torch.Tensor, Any], torch.Tensor]  # (filled ids [B, L], attention) -> wrongness [S] in [0, 1]


@dataclass(frozen=True)
class Modifiers:
    """0 = off."""

    mask_ratio_power: float = 0.0
    entropy_threshold: float = 0.0
    judge_exponent: float = 1.0


@torch.no_grad()
def modified_weights(
    head: Any, corrupted: Corrupted, modifiers: Modifiers, judge: Judge | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """float32 [N] in place of `corrupted.weight_N`, and the means [2] (sum, number over segments) of the factors.

    `head` is what a readout gets (docs/design.md, signature 2). With a judge `corrupted.uniform_BL` must be there.
    """
    segment_N, is_masked_N = corrupted.segment_N, corrupted.kind_N == KIND_MASKED
    num_masked_S = segment_sums(is_masked_N.double(), corrupted)
    ratio_S = num_masked_S / corrupted.num_maskable_B.clamp(min=1)
    weight_N, means = corrupted.weight_N.double(), {}
    if modifiers.mask_ratio_power:
        own_N = mask_ratio_weights(ratio_S, modifiers.mask_ratio_power)[segment_N]
        weight_N = torch.where(is_masked_N, own_N, weight_N)
    if modifiers.entropy_threshold:
        entropy_N = head.wrong_entropy(corrupted.target_N).double() * is_masked_N
        entropy_S = segment_sums(entropy_N, corrupted) / num_masked_S.clamp(min=1)
        factor_S = entropy_factors(entropy_S, modifiers.entropy_threshold)
        weight_N, means[ENTROPY_WEIGHT] = weight_N * factor_S[segment_N], _mean(factor_S, num_masked_S)
    if judge is not None:
        wrong_S = judge(filled(corrupted, draw(head, corrupted)), corrupted.attention).double()
        factor_S = judge_factors(wrong_S, ratio_S, modifiers.judge_exponent)
        weight_N, means["judge_factor"] = weight_N * factor_S[segment_N], _mean(factor_S, num_masked_S)
        means["judge_wrongness"] = _mean(wrong_S, num_masked_S)
    return weight_N.float(), means


def segment_sums(values_N: torch.Tensor, corrupted: Corrupted) -> torch.Tensor:
    """[S]: sums over each segment's positions, which lie one behind the other; deterministic on every device."""
    num_N = torch.bincount(corrupted.segment_N, minlength=corrupted.m_B.numel())
    return torch.segment_reduce(values_N, "sum", lengths=num_N, unsafe=True)


def mask_ratio_weights(ratio_S: torch.Tensor, power: float) -> torch.Tensor:
    """Of each masked position: clamp(r**-power, .1, 10) / r, with which a segment adds L times its mean to the sum."""
    factor_S = (1 / (ratio_S + EPS)).pow(power).clamp(LEAST, MOST)
    return torch.where(ratio_S > 0, factor_S / ratio_S, 0.0)


def entropy_factors(entropy_S: torch.Tensor, threshold: float) -> torch.Tensor:
    """1 / (max(H, threshold) + 1e-8): a row whose wrong ids are few and sure weighs more."""
    return 1 / (entropy_S.clamp(min=threshold) + EPS)


def judge_factors(wrong_S: torch.Tensor, ratio_S: torch.Tensor, exponent: float) -> torch.Tensor:
    """How much more wrong than is expected of this share of masks, clamped to [.1, 10]."""
    expected_S = ratio_S**4 - 2 * ratio_S**3 + 2 * ratio_S
    return (wrong_S / expected_S.clamp(min=SMALLEST_WRONGNESS)).pow(exponent).clamp(LEAST, MOST)


def _mean(values_S: torch.Tensor, num_masked_S: torch.Tensor) -> torch.Tensor:
    """Sum and number over the segments that have a masked position."""
    has_loss_S = (num_masked_S > 0).double()
    return torch.stack([(values_S * has_loss_S).sum(), has_loss_S.sum()])

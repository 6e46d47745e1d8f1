"""A critic that learns to see errors: which ids of a text, filled in one shot by the network, are wrong.

With x0 the clean ids, x_t the noised ones, y_i ~ p(. | x_t) drawn for every masked position on its own (no gradient),
and c_i the critic's logit at position i of a second look at the filled text y:

    critic loss of a row = L_r * mean over the scope of BCE(c_i, 1(y_i != x0_i))

L_r counts the row's maskable positions, so that the sum over rows divided by the batch's maskable positions is a mean
over rows, whatever the split; the scope is the masked positions, or all maskable ones. The optimal logit is the
log-odds of an error given the filled text. Sources: Lezama et al. (arXiv 2209.04439), and seed 002's critic head.

With `has_weights` the network's loss weighs masked positions by the critic's error probability e_i (detached), scaled
so that the mean weight of each row stays what it was: w_i <- w_i e_i / mean over the row's masked positions of e.

Shapes: B rows, L positions, S segments, N selected positions of the flattened batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_scale.diffusion.corruption import KIND_MASKED, Corrupted
from dlm_scale.diffusion.fill import draw, filled
from dlm_scale.diffusion.objective import Stats

SCOPES = ("masked_only", "masked_and_visible")


@dataclass(frozen=True)
class Critic:
    """How a critic is trained. Its loss counts `alpha` from step `end` on, in every `every`-th step, less on the way up
    from `start`; `is_detached`: the trunk has no gradient of it."""

    alpha: float
    start: int = 0
    end: int = 0
    every: int = 1
    is_detached: bool = False
    scope: str = "masked_only"
    has_weights: bool = False

    def alpha_at(self, step: int) -> float:
        """What the critic's loss is multiplied by in the step after `step` finished ones; 0: there is none."""
        if step < self.start or step % self.every:
            return 0.0
        if step >= self.end:
            return self.alpha
        return self.alpha * (step - self.start) / (self.end - self.start)


def with_critic(
    plain: Callable[..., tuple[Tensor, Stats]], critic: Critic, hidden_fn: Callable, corrupted: Corrupted, step: int
) -> tuple[Tensor, Stats]:
    """(loss_sum, stats) of `plain(hidden_fn, corrupted, terms=...)` and of the critic, where it is trained now.

    stats has `critic_bce` (nats, mean over the scope) and `critic_errors` (share of wrong ids in it) besides.
    """
    alpha = critic.alpha_at(step)
    if alpha == 0:
        return plain(hidden_fn, corrupted, terms=(idle_critic,))
    drawn: list[Tensor] = []
    if critic.has_weights:  # the weights must be known before the loss: one more look, without gradients
        with torch.no_grad():
            hidden_fn(
                corrupted.xt_BL, m_B=corrupted.m_B, rows_N=corrupted.rows_N, attention=corrupted.attention,
                readout=lambda head: drawn.append(draw(head, corrupted)),
            )  # fmt: skip
    else:
        loss_sum, stats = plain(hidden_fn, corrupted, terms=(lambda head, c: (drawn.append(draw(head, c)) or 0.0, {}),))
    critic_sum, critic_stats, logit_N = critic_loss(hidden_fn, corrupted, drawn[0], critic)
    if critic.has_weights:
        weight_N = doubted_weights(corrupted, logit_N)
        loss_sum, stats = plain(hidden_fn, replace(corrupted, weight_N=weight_N), terms=(idle_critic,))
    return loss_sum + alpha * critic_sum, stats | critic_stats


def idle_critic(head: Any, corrupted: Corrupted) -> tuple[Tensor, Stats]:
    """A term of 0, by which the critic's weights have a gradient (of 0) in every step and at every layout."""
    return 0.0 * head.over(head.hidden_ND.detach()[:1]).critic().sum(), {}


def critic_loss(
    hidden_fn: Callable, corrupted: Corrupted, ids_N: Tensor, critic: Critic
) -> tuple[Tensor, Stats, Tensor]:
    """(loss_sum, stats, logits [N] float32, detached, at the positions that carry loss) of a look at the filled text."""
    y_BL = filled(corrupted, ids_N)
    is_wrong_of_N = y_BL.flatten()[corrupted.rows_N] != corrupted.target_N
    is_wrong = torch.zeros(y_BL.numel(), dtype=torch.bool, device=y_BL.device).index_copy(0, corrupted.rows_N, is_wrong_of_N)
    looks_at_all = critic.scope == "masked_and_visible"
    every = torch.arange(y_BL.numel(), device=y_BL.device)
    rows_N = every if looks_at_all else corrupted.rows_N
    in_scope_N = corrupted.maskable_BL.flatten() if looks_at_all else corrupted.kind_N == KIND_MASKED
    segment_N = replace(corrupted, rows_N=rows_N).segment_N

    def readout(head: Any) -> Tensor:
        return (head.over(head.hidden_ND.detach()) if critic.is_detached else head).critic()

    m_B = torch.zeros_like(corrupted.m_B)  # nothing of a filled text is masked
    logit_N = hidden_fn(y_BL, m_B=m_B, rows_N=rows_N, readout=readout, attention=corrupted.attention)
    is_wrong_N = is_wrong[rows_N]
    bce_N = F.binary_cross_entropy_with_logits(logit_N, is_wrong_N.to(logit_N), reduction="none")
    count_S = sums_of(in_scope_N.double(), segment_N, corrupted)
    weight_S = corrupted.num_maskable_B / count_S.clamp(min=1)
    loss_sum = (bce_N * (weight_S[segment_N] * in_scope_N).to(bce_N)).sum()
    of_scope = in_scope_N.double()
    stats = {"critic_bce": masked_mean(bce_N, of_scope), "critic_errors": masked_mean(is_wrong_N, of_scope)}
    logit_N = logit_N.detach()
    return loss_sum, stats, logit_N[corrupted.rows_N] if looks_at_all else logit_N


def doubted_weights(corrupted: Corrupted, logit_N: Tensor) -> Tensor:
    """float32 [N]: the loss weights times the critic's error probabilities, each row's mean weight kept. Rows that are
    not masked keep theirs."""
    is_masked_N = corrupted.kind_N == KIND_MASKED
    doubt_N = logit_N.double().sigmoid().clamp(min=1e-30) * is_masked_N
    total_S = sums_of(doubt_N, corrupted.segment_N, corrupted).clamp(min=1e-30)
    count_S = sums_of(is_masked_N.double(), corrupted.segment_N, corrupted)
    scale_N = doubt_N * (count_S / total_S)[corrupted.segment_N]
    return (corrupted.weight_N * torch.where(is_masked_N, scale_N, 1.0)).float()


def sums_of(values_N: Tensor, segment_N: Tensor, corrupted: Corrupted) -> Tensor:
    """float64 [S]: sums over the positions of each segment."""
    return values_N.new_zeros(corrupted.num_maskable_B.shape).index_add(0, segment_N, values_N)


def masked_mean(values_N: Tensor, count_N: Tensor) -> Tensor:
    """[2] float64: sum and number of the positions whose count is 1."""
    return torch.stack([(values_N.detach().double() * count_N).sum(), count_N.sum()])

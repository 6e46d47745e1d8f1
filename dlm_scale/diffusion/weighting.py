"""Weights of the masked cross-entropies: one number a row, the same for all its masked tokens.

Legend: B rows, `t_B` times, `num_masked_B` = n and `num_maskable_B` = L, all float64 tensors. The three weightings
with `is_elbo` estimate the same NELBO without bias, in nats per row; they differ in variance.

* `count`: weight (L+1)/n for masks drawn at m = t uniform. P(mask set of size n) = B(n+1, L-n+1), and that times
  (L+1)/n is the integral of m**(n-1) (1-m)**(L-n), the set's exact share of the NELBO. Bounded, no time is clamped.
* `elbo`: w(t) = m'(t)/m(t) (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992, with 1/t).
* `exact`: L/l for a uniform subset of size l, l uniform on 1..L whatever the schedule, which must therefore be the
  linear one (LLaDA's likelihood).
* `simple`: 1, a plain masked cross-entropy. Not an ELBO.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dlm_scale.diffusion.schedule import Schedule

WeightFn = Callable[[Schedule, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Weighting:
    """`fn(schedule, t_B, num_masked_B, num_maskable_B) -> weight_B`, and what it asks of the masks.

    `exact_count`: the mask is a subset of a drawn size, not independent draws. `requires_linear`: unbiased only if the
    mask ratio is uniform. `clamps_time`: unbounded at t = 0, so times below `min_time` are raised to it.
    """

    name: str
    is_elbo: bool
    exact_count: bool
    requires_linear: bool
    fn: WeightFn
    clamps_time: bool = False


def min_time(num_maskable):
    """1/(8L): the least time of a row under a weighting that clamps. Works on numbers, arrays and tensors.

    The row is then masked AND weighted at the clamped time, so that the estimate's bias is only the change of the
    expected cross-entropy below it: at most one masked token in eight rows.
    """
    return 1 / (8 * num_maskable)


def _per_masked(numerator_B: torch.Tensor, num_masked_B: torch.Tensor) -> torch.Tensor:
    return torch.where(num_masked_B > 0, numerator_B / num_masked_B, 0.0)


_count = Weighting(
    "count", is_elbo=True, exact_count=False, requires_linear=True,
    fn=lambda schedule, t_B, num_masked_B, num_maskable_B: _per_masked(num_maskable_B + 1, num_masked_B),
)  # fmt: skip
_elbo = Weighting(
    "elbo", is_elbo=True, exact_count=False, requires_linear=False, clamps_time=True,
    fn=lambda schedule, t_B, num_masked_B, num_maskable_B: schedule.weight(t_B),
)  # fmt: skip
_exact = Weighting(
    "exact", is_elbo=True, exact_count=True, requires_linear=True,
    fn=lambda schedule, t_B, num_masked_B, num_maskable_B: _per_masked(num_maskable_B, num_masked_B),
)  # fmt: skip
_simple = Weighting(
    "simple", is_elbo=False, exact_count=False, requires_linear=False,
    fn=lambda schedule, t_B, num_masked_B, num_maskable_B: torch.ones_like(t_B),
)  # fmt: skip
WEIGHTINGS: dict[str, Weighting] = {w.name: w for w in (_count, _elbo, _exact, _simple)}


def elbo_weighting(weighting: Weighting, schedule: Schedule) -> Weighting:
    """The weighting that turns the same masks into an estimate of the NELBO: itself if it is one."""
    if weighting.is_elbo:
        return weighting
    return _count if schedule.is_linear else _elbo

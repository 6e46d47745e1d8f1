"""Noise schedules, told by the mask ratio m(t) = 1 - alpha(t), t in [0, 1].

m, the ELBO weight w = m'/m and the inverse t(m) are closed forms: 1 - alpha(t) in floating point loses every digit at
small t, and an ELBO weight times that zero is NaN. All functions map float64 tensors to float64 tensors of the same
shape. w(0) is infinite where m(0) = 0; times are drawn from (0, 1].

A schedule is only a density over m: the continuous-time NELBO of a row, the integral over t of w(t) times the expected
sum of masked cross-entropies, is the same for all that reach m = 0 and m = 1. `loglinear` stops at m(1) = 0.999 and
`geometric` at m(0) = 1e-4 and 1 - m(1) = 2e-9, so theirs misses that small part.

Sources: MDLM (arXiv 2406.07524), MD4 (2406.04329), SEDD (2310.16834).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

TensorFn = Callable[[torch.Tensor], torch.Tensor]
_HALF_PI = math.pi / 2


@dataclass(frozen=True)
class Schedule:
    """`mask_ratio`: t -> m, `weight`: t -> m'(t)/m(t), `time`: m -> t. `is_linear`: m is uniform when t is."""

    name: str
    mask_ratio: TensorFn
    weight: TensorFn
    time: TensorFn
    is_linear: bool = False


def _linear() -> Schedule:
    return Schedule("linear", lambda t: t.clone(), lambda t: 1 / t, lambda m: m.clone(), is_linear=True)


def _loglinear(eps: float = 1e-3) -> Schedule:
    return Schedule("loglinear", lambda t: (1 - eps) * t, lambda t: 1 / t, lambda m: m / (1 - eps))


def _poly(power: float = 2.0) -> Schedule:
    return Schedule("poly", lambda t: t**power, lambda t: power / t, lambda m: m ** (1 / power))


def _cosine() -> Schedule:
    """alpha = 1 - cos(pi/2 (1-t)) (MD4)."""
    return Schedule(
        "cosine",
        lambda t: torch.sin(_HALF_PI * t),
        lambda t: _HALF_PI / torch.tan(_HALF_PI * t),
        lambda m: torch.asin(m) / _HALF_PI,
    )


def _cosine2() -> Schedule:
    """alpha = cos(pi t/2)**2 (MDLM's `cosinesqr`)."""
    return Schedule(
        "cosine2",
        lambda t: torch.sin(_HALF_PI * t) ** 2,
        lambda t: math.pi / torch.tan(_HALF_PI * t),
        lambda m: torch.asin(m.sqrt()) / _HALF_PI,
    )


def _cos_mask_ratio(t: torch.Tensor) -> torch.Tensor:
    # 1 - cos(x) = sin(x)**2 / (1 + cos(x)): no cancellation at 0, and exactly 1 at t = 1
    return torch.sin(_HALF_PI * t) ** 2 / (1 + torch.cos(_HALF_PI * t))


def _cos() -> Schedule:
    """alpha = cos(pi t/2) (MDLM's `cosine`); w by the half angle, sin(2x)/(2 sin(x)**2) = cot(x)."""
    return Schedule(
        "cos",
        _cos_mask_ratio,
        lambda t: _HALF_PI / torch.tan(_HALF_PI / 2 * t),
        lambda m: 2 * torch.asin((m / 2).sqrt()) / _HALF_PI,
    )


def _geometric(sigma_min: float = 1e-4, sigma_max: float = 20.0) -> Schedule:
    """alpha = exp(-sigma), sigma = sigma_min**(1-t) sigma_max**t (SEDD)."""
    log_ratio = math.log(sigma_max / sigma_min)

    def sigma(t: torch.Tensor) -> torch.Tensor:
        return sigma_min * torch.exp(log_ratio * t)

    return Schedule(
        "geometric",
        lambda t: -torch.expm1(-sigma(t)),
        lambda t: log_ratio * sigma(t) / torch.expm1(sigma(t)),
        lambda m: torch.log(-torch.log1p(-m) / sigma_min) / log_ratio,
    )


SCHEDULES: dict[str, Schedule] = {
    s.name: s for s in (_linear(), _loglinear(), _poly(), _cosine(), _cosine2(), _cos(), _geometric())
}

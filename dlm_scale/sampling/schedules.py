"""How many: the step at which each reveal, and each masking again, falls due.

Shapes: B rows, L positions, T1 = num_steps + 1 grid points; step s in 1..T goes from time 1-(s-1)/T to 1-s/T.
A schedule fills due_BL: one slot a masked position, holding the step of one reveal (0 = no slot). The slots are a
multiset; selector `due` reads slot i as position i, the others only count how many are due.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dlm_scale.diffusion.schedule import SCHEDULES as NOISE_SCHEDULES
from dlm_scale.sampling.samplers import Sampler

_PLATEAU = (0.55, 0.05, 0.1)  # ReMDM-loop: from which time to which, and at which mask ratio


@dataclass(frozen=True)
class Timetable:
    """What a sampler's steps mean, as float64 tables over the T1 grid points.

    m_T1            mask ratio, exactly 1 at the start and 0 at the end
    log_masked_T1   log-probability that a position masked at the start stays masked so long
    log_kept_T1     log-probability that a token revealed at the start is not masked again so long
    sigma_T         what the revealed positions of a row share, where the reviser looks at the state; else zeros
    """

    m_T1: Tensor
    log_masked_T1: Tensor
    log_kept_T1: Tensor
    sigma_T: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.m_T1) - 1


@lru_cache(maxsize=64)
def timetable(sampler: Sampler, num_steps: int, device: torch.device) -> Timetable:
    """Tables of the reverse process with remasking (ReMDM eq. 4; with sigma 0, MDLM's).

    From grid point a to the next, b: a masked position stays masked with probability
    (m_b - sigma (1 - m_a)) / m_a, a revealed one is masked again with probability sigma.
    """
    m_T1 = mask_ratios(sampler.mask_ratio, num_steps)
    m_a, m_b = m_T1[:-1], m_T1[1:]
    reviser = REVISERS[sampler.reviser]
    sigma_T = reviser.sigma(m_a, m_b, sampler)
    alike_T, shared_T = (sigma_T, 0 * sigma_T) if reviser.share is None else (0 * sigma_T, sigma_T)
    stays_T = ((m_b - alike_T * (1 - m_a)) / m_a).clamp(0, 1)
    tables = m_T1, _log_products(stays_T), _log_products(1 - alike_T), shared_T
    return Timetable(*(table.to(device) for table in tables))


def plateau(t_T: Tensor) -> Tensor:
    """Mask ratio of ReMDM-loop at time t: linear down to the plateau, flat, linear to 0."""
    on, off, m = _PLATEAU
    falling_T = m + (1 - m) * (t_T - on) / (1 - on)
    return torch.where(t_T > on, falling_T, torch.where(t_T >= off, m, m * t_T / off))


CURVES = {name: schedule.mask_ratio for name, schedule in NOISE_SCHEDULES.items()} | {"plateau": plateau}


def mask_ratios(name: str, num_steps: int) -> Tensor:
    """float64 m at times 1, 1-1/T, ..., 0 of a curve, scaled to end points of exactly 1 and 0."""
    if name not in CURVES:
        raise ValueError(f"unknown mask_ratio {name!r}; choose one of: {', '.join(CURVES)}")
    t_T1 = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    m_T1 = CURVES[name](t_T1)
    m_T1 = m_T1 / m_T1[0]
    m_T1[-1] = 0.0
    return m_T1


def _log_products(factor_T: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.float64), factor_T.log().cumsum(0)])


def waiting_step(log_survival_T1: Tensor, step_N: Tensor, uniform_N: Tensor) -> Tensor:
    """The step of the next event for one who has waited since step_N; T+1 = never.

    Inverse CDF of P(no event until k | none until step) = survival[k] / survival[step].
    """
    limit_N = uniform_N.log() + log_survival_T1[step_N]
    found_N = torch.searchsorted(-log_survival_T1, -limit_N)
    # Where survival has reached 0 all later steps look alike, and the event is certain at the next one.
    return torch.maximum(found_N, step_N + 1)


def even(is_masked_BL: Tensor, uniform_BL: Tensor, table: Timetable) -> Tensor:
    """Counts that follow m_T1, rounded cumulatively in every row; slots in random order (ties by position).

    After step s, round(n m_s) of a row's n positions are still masked, so no step gets a rounding remainder.
    """
    num_masked_B1 = is_masked_BL.sum(1, keepdim=True)
    revealed_BT1 = num_masked_B1 - (num_masked_B1 * table.m_T1 + 0.5).floor().long()
    order_BL = torch.where(is_masked_BL, uniform_BL, 2.0).argsort(dim=1, stable=True)
    rank_BL = torch.arange(is_masked_BL.shape[1], device=order_BL.device).expand_as(order_BL).contiguous()
    step_BL = torch.searchsorted(revealed_BT1, rank_BL, right=True)
    return torch.zeros_like(step_BL).scatter(1, order_BL, step_BL) * is_masked_BL


def independent(is_masked_BL: Tensor, uniform_BL: Tensor, table: Timetable) -> Tensor:
    """Every position draws its own reveal step from the law of the reverse process, whatever the tokens."""
    start_BL = torch.zeros_like(is_masked_BL, dtype=torch.long)
    return waiting_step(table.log_masked_T1, start_BL, uniform_BL.contiguous()) * is_masked_BL


SCHEDULES = {"even": even, "independent": independent}


def _largest_sigma(m_a: Tensor, m_b: Tensor) -> Tensor:
    return torch.where(m_b < 1 - m_a, m_b / (1 - m_a), 1.0)


def no_revision(m_a: Tensor, m_b: Tensor, sampler: Sampler) -> Tensor:
    """Revealed tokens stay."""
    return torch.zeros_like(m_a)


def cap(m_a: Tensor, m_b: Tensor, sampler: Sampler) -> Tensor:
    """ReMDM-cap: masked again with probability eta, or the largest one that keeps the marginals."""
    return _largest_sigma(m_a, m_b).clamp(max=sampler.eta)


def rescale(m_a: Tensor, m_b: Tensor, sampler: Sampler) -> Tensor:
    """ReMDM-rescale: eta times the largest probability that keeps the marginals."""
    return sampler.eta * _largest_sigma(m_a, m_b)


def loop(m_a: Tensor, m_b: Tensor, sampler: Sampler) -> Tensor:
    """ReMDM-loop: cap, while the mask ratio stands still."""
    return torch.where(m_a == m_b, cap(m_a, m_b, sampler), 0.0)


def least_probable(confidence_BL: Tensor, is_revealed_BL: Tensor) -> Tensor:
    """ReMDM-conf: softmax over the revealed positions of minus the probability that their token had when drawn."""
    score_BL = torch.where(is_revealed_BL, -confidence_BL, -torch.inf)
    return torch.where(is_revealed_BL, score_BL.softmax(1), 0.0)


@dataclass(frozen=True)
class Reviser:
    """sigma(m_a, m_b, sampler) -> probability [T] of being masked again at each step.

    Without `share` it holds for every revealed position, so waiting times can be drawn in advance. With
    share(confidence [B, L], is_revealed [B, L]) -> parts [B, L], each has its part of sigma, drawn step by step.
    asks_critic: of all that is not fixed, the positions that a critic doubts most are masked again after each reveal, as
    many as the schedule leaves for later.
    """

    sigma: Callable[[Tensor, Tensor, Sampler], Tensor]
    share: "Callable[[Tensor, Tensor], Tensor] | None" = None
    asks_critic: bool = False


REVISERS = {
    "none": Reviser(no_revision),
    "cap": Reviser(cap),
    "rescale": Reviser(rescale),
    "confidence": Reviser(rescale, share=least_probable),
    "loop": Reviser(loop),
    "critic": Reviser(no_revision, asks_critic=True),
}

"""Weighted mixtures: which member the i-th sample comes from, as a pure function of i."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dlm_scale.errors import UsageError

MAX_PERIOD = 1 << 14


@dataclass(frozen=True)
class Mixture:
    """A periodic schedule over K members: `member_P` and its occurrence number `rank_P`, `quota_K` per period."""

    member_P: np.ndarray
    rank_P: np.ndarray
    quota_K: np.ndarray

    def locate(self, sample_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(member, index among that member's own samples), int64 [B] each, of global samples."""
        period_B, at_B = np.divmod(np.asarray(sample_B, dtype=np.int64), len(self.member_P))
        member_B = self.member_P[at_B]
        return member_B, period_B * self.quota_K[member_B] + self.rank_P[at_B]


def mix(weights: Sequence[float]) -> Mixture:
    """A schedule in which after any number of samples each member's count is within one of its exact share.

    Unit jobs with release and deadline, served earliest deadline first: the "pfair" schedule of Baruah et al. 1996.
    Weights whose common denominator exceeds MAX_PERIOD are rounded to multiples of 1 / MAX_PERIOD of the total.
    """
    quota = _quotas(weights)
    period = sum(quota)
    count = [0] * len(quota)
    member, rank = [], []
    for slot in range(period):
        ready = [k for k, q in enumerate(quota) if count[k] * period < q * (slot + 1)]
        chosen = min(ready, key=lambda k: -(-(count[k] + 1) * period // quota[k]))
        member.append(chosen)
        rank.append(count[chosen])
        count[chosen] += 1
    return Mixture(*(np.array(values, dtype=np.int64) for values in (member, rank, quota)))


def _quotas(weights: Sequence[float]) -> list[int]:
    if not weights or any(not math.isfinite(w) or w <= 0 for w in weights):
        raise UsageError(f"data.train: weights {list(weights)} must be positive numbers")
    total = sum(Fraction(str(w)) for w in weights)
    shares = [Fraction(str(w)) / total for w in weights]
    period = min(math.lcm(*(s.denominator for s in shares)), MAX_PERIOD)
    quota = [int(s * period) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: quota[k] - shares[k] * period)
    for k in by_remainder[: period - sum(quota)]:
        quota[k] += 1
    if min(quota) == 0:
        raise UsageError(f"data.train: weight {min(weights)} is below 1/{MAX_PERIOD} of the total: raise or drop it")
    return quota

"""Which masks an estimator of the NELBO looks at, and what each weighs.

A row has L maskable tokens; S(M) is the sum of the cross-entropies, nats, of the positions in the mask set M. Every
estimator spends K forward passes a row in two independent replicates of D = K/2 passes, each of which is unbiased on
its own (`quadrature`: but for its rule), so that half their difference gives the Monte-Carlo variance.

    exact        l stratified over 1..L, a uniform subset of size l, weight L/l (LLaDA, arXiv 2502.09992, eq. 14)
    pairs        the same in mirrored pairs: a uniform subset of size l and all positions but l-1 of it, which are a
                 uniform subset of size L+1-l. A pair predicts every token once, and one of them twice. D/2 strata of
                 half of 1..L, narrow where few tokens are masked and a draw varies most, each weighted by its width.
    quadrature   the nodes m of Gauss and Legendre's rule with D nodes, two mirrored ones a pair, l = m L + 1/2 rounded
                 at random to a neighbour: no error from the choice of l, and the rule's own bias

(A set and its very complement would do for pairs with l uniform on 0..L and weights (L+1)/n, 0 for n = 0. With l on
1..L and weights L/l, L/(L-l) they are biased below the bound: the full set never comes as a complement.)

Masks are functions of (seed, row index, draw) alone: Philox(seed; row low, high, column, EVAL + 256 * draw), a mirror's
draw being that of the pass before; the offset of a replicate has no column (2**32 - 1) and the replicate for the draw.

Legend: B rows of a batch, L positions, D passes of a replicate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dlm_scale.diffusion.corruption import (
    Corrupted,
    assemble,
    clean_rows,
    exact_count,
    replace,
    row_words,
    smallest_words,
)
from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform53
from dlm_scale.diffusion.segments import row_bounds
from dlm_scale.diffusion.timestep import wrap_time

NUM_REPLICATES = 2
_NO_COLUMN = 0xFFFFFFFF


@dataclass(frozen=True)
class Estimator:
    """plan(offset_B, length_B, D) -> for each pass of a replicate (count_B, weight_B): how many positions are masked,
    and the weight of their sum, the replicate being the mean over its D passes. `unit`: D is a multiple of it; where it
    is 2 every second pass is the mirror of the one before."""

    plan: Callable[[np.ndarray, np.ndarray, int], Iterator[tuple[np.ndarray, np.ndarray]]]
    unit: int = 1


def _exact(offset_B, length_B, num_passes):
    for stratum in range(num_passes):
        count_B = exact_count(wrap_time(offset_B + stratum / num_passes), length_B)
        yield count_B, length_B / np.maximum(count_B, 1)


def _pairs(offset_B, length_B, num_passes):
    """l = floor(L s) + 1 with s below 1/2; s and 1-s mean one pair. A draw's variance goes with width^2 / l, which
    bounds that grow with the square keep level over the strata."""
    bound = 0.5 * (np.arange(num_passes // 2 + 1) / (num_passes // 2)) ** 2
    for low, high in zip(bound, bound[1:]):
        count_B = np.minimum(np.floor(length_B * (low + (high - low) * offset_B)).astype(np.int64) + 1, length_B)
        yield from _mirrored(count_B, length_B, num_passes * (high - low))


def _quadrature(offset_B, length_B, num_passes):
    nodes, shares = np.polynomial.legendre.leggauss(num_passes)
    for number in range(num_passes // 2):
        place_B = (nodes[number] + 1) / 2 * length_B + 0.5 + (offset_B + number / num_passes) % 1.0
        count_B = np.clip(np.floor(place_B).astype(np.int64), np.minimum(1, length_B), length_B)
        yield from _mirrored(count_B, length_B, num_passes * shares[number] / 2)


def _mirrored(count_B, length_B, share):
    for masked_B in (count_B, np.where(length_B > 0, length_B + 1 - count_B, 0)):
        yield masked_B, share * length_B / np.maximum(masked_B, 1)


ESTIMATORS = {
    "pairs": Estimator(_pairs, unit=2),
    "exact": Estimator(_exact),
    "quadrature": Estimator(_quadrature, unit=2),
}


def default_estimator(num_draws: int) -> str:
    """`pairs`, the one of least variance, where the number of draws allows it; else `exact`."""
    return "exact" if num_draws % (NUM_REPLICATES * ESTIMATORS["pairs"].unit) else "pairs"


def check_draws(estimator: str, num_draws: int) -> None:
    """Raises ValueError unless the estimator exists and num_draws is two replicates of whole units."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose one of: {', '.join(ESTIMATORS)}")
    multiple = NUM_REPLICATES * ESTIMATORS[estimator].unit
    if num_draws < multiple or num_draws % multiple:
        raise ValueError(f"num_draws must be a multiple of {multiple} for the estimator {estimator!r} (two independent "
                         f"replicates give the standard error), got {num_draws}")


def row_offsets(seed: int, row_index_B: np.ndarray, replicate: int = 0) -> np.ndarray:
    """float64 [B] in [0, 1): the one uniform from which a row's draws of a replicate are stratified."""
    w0_B, w1_B, _, _ = philox(seed, *counter_of(row_index_B), _NO_COLUMN, Stream.EVAL + 256 * replicate)
    return uniform53(w0_B, w1_B)


def evaluation_draws(
    x0_BL, row_index_B: np.ndarray, *, seed: int, num_draws: int, mask_id: int, maskable_BL=None, estimator="exact"
) -> Iterator[Corrupted]:
    """One `Corrupted` a pass, with the estimator's weights and denominator 1; the first half is replicate 0.

    row_index_B: indices in the whole data set. Raises ValueError where the arguments do not fit.
    """
    check_draws(estimator, num_draws)
    x0_BL, row_index_B, maskable_BL = clean_rows(x0_BL, row_index_B, maskable_BL, mask_id)
    chosen, length_B, num_passes = ESTIMATORS[estimator], maskable_BL.sum(1), num_draws // NUM_REPLICATES
    for replicate in range(NUM_REPLICATES):
        offset_B = row_offsets(seed, row_index_B, replicate)
        for i, (count_B, weight_B) in enumerate(chosen.plan(offset_B, length_B, num_passes)):
            is_mirror, draw = i % chosen.unit, replicate * num_passes + i
            word_BL = row_words(seed, row_index_B, x0_BL.shape[1], Stream.EVAL + 256 * (draw - is_mirror))
            # The mirror of the l smallest words: all but the l-1 smallest of the same words.
            smallest_BL = smallest_words(word_BL, maskable_BL, length_B - count_B if is_mirror else count_B)
            is_masked_BL = maskable_BL & ~smallest_BL if is_mirror else smallest_BL
            m_B, weight_S = count_B / np.maximum(length_B, 1), torch.from_numpy(weight_B)
            masked = replace(x0_BL, is_masked_BL, row_bounds(*x0_BL.shape), mask_id)
            yield assemble(masked, weight_S=weight_S, elbo_weight_S=weight_S, m_S=m_B, t_S=m_B.copy(),
                           num_maskable_S=length_B, denominator=1.0)  # fmt: skip

"""NELBO of held-out rows by the stratified exact-count estimator, with its standard errors.

For a row of L maskable tokens and l uniform on 1..L, mask a uniform subset of size l: (L/l) times the sum of the
masked cross-entropies has the row's NELBO (an upper bound of -log p(row), nats) as its mean (LLaDA, arXiv 2502.09992,
eq. 14; any-order view: 2110.02037). A row gets two independent replicates, each K/2 draws with l stratified over 1..L,
so that half their difference gives the Monte-Carlo variance without bias. Masks are a function of (seed, row index,
draw) alone: two checkpoints are compared on the same masks, and no split of the rows changes a number.

Legend: R rows of the data set, B rows of a batch, K draws (the first K/2 are replicate 0), N masked positions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
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

NUM_BINS = 10
_NO_COLUMN = 0xFFFFFFFF


@dataclass(frozen=True)
class RowSums:
    """What the estimate needs of each row; numpy arrays, so that they can be gathered over ranks.

    row_index_R int64; weighted_ce_RK float64: (L/l) * sum of the masked cross-entropies of each draw, nats;
    num_masked_RK int64: l; num_maskable_R int64: L.
    """

    row_index_R: np.ndarray
    weighted_ce_RK: np.ndarray
    num_masked_RK: np.ndarray
    num_maskable_R: np.ndarray


@dataclass(frozen=True)
class NelboEstimate:
    """nelbo in nats per token, with two standard errors.

    nelbo_se: the rows as the sampling unit (it contains the Monte-Carlo part; NaN for one row). nelbo_se_mc: the
    Monte-Carlo part alone, for these very rows. ce_by_mask_ratio: mean cross-entropy of a masked token, nats, in ten
    bins (0, .1] ... (.9, 1] of l/L (None if empty); num_by_mask_ratio: masked tokens seen in each.
    """

    nelbo: float
    nelbo_se: float
    nelbo_se_mc: float
    tokens: int
    rows: int
    ce_by_mask_ratio: tuple[float | None, ...]
    num_by_mask_ratio: tuple[int, ...]


def evaluation_draws(
    x0_BL, row_index_B: np.ndarray, *, seed: int, num_draws: int, mask_id: int, maskable_BL=None
) -> Iterator[Corrupted]:
    """One `Corrupted` a draw, with weights L/l and denominator 1. row_index_B: indices in the whole data set.

    Random words: Philox(seed; row low, high, column, EVAL + 256 * draw); the offset of a replicate's strata has no
    column (2**32 - 1) and the replicate in place of the draw. Raises ValueError unless num_draws is even and >= 2.
    """
    if num_draws < 2 or num_draws % 2:
        raise ValueError(f"num_draws must be even and at least 2, got {num_draws}")
    rows = clean_rows(x0_BL, row_index_B, maskable_BL, mask_id)
    for draw in range(num_draws):
        yield _evaluation_draw(*rows, seed, draw, num_draws // 2, mask_id)


def _evaluation_draw(x0_BL, row_index_B, maskable_BL, seed, draw, draws_per_replicate, mask_id) -> Corrupted:
    replicate, stratum = divmod(draw, draws_per_replicate)
    w0_B, w1_B, _, _ = philox(seed, *counter_of(row_index_B), _NO_COLUMN, Stream.EVAL + 256 * replicate)
    t_B = wrap_time(uniform53(w0_B, w1_B) + stratum / draws_per_replicate)
    word_BL = row_words(seed, row_index_B, x0_BL.shape[1], Stream.EVAL + 256 * draw)
    length_B = maskable_BL.sum(1)
    count_B = exact_count(t_B, length_B)
    is_masked_BL = smallest_words(word_BL, maskable_BL, count_B)
    weight_B, m_B = length_B / np.maximum(count_B, 1), count_B / np.maximum(length_B, 1)
    weight_B = torch.from_numpy(weight_B)
    return assemble(
        replace(x0_BL, is_masked_BL, row_bounds(*x0_BL.shape), mask_id), weight_S=weight_B, elbo_weight_S=weight_B,
        m_S=m_B, t_S=t_B, num_maskable_S=length_B, denominator=1.0,
    )  # fmt: skip


def row_sums(
    ce_fn: Callable[[Corrupted], torch.Tensor],
    x0_BL,
    row_index_B: np.ndarray,
    *,
    seed: int,
    num_draws: int,
    mask_id: int,
    maskable_BL=None,
) -> RowSums:
    """Runs `ce_fn(corrupted) -> ce_N` (nats, on any device) over all draws of one batch of rows."""
    row_index_B, sums_KB, masked_KB = np.asarray(row_index_B), [], []
    options = dict(seed=seed, num_draws=num_draws, mask_id=mask_id, maskable_BL=maskable_BL)
    for corrupted in evaluation_draws(x0_BL, row_index_B, **options):
        weighted_N = corrupted.weight_N.double() * ce_fn(corrupted).detach().double().cpu()
        row_of_N = (corrupted.rows_N // corrupted.xt_BL.shape[1]).numpy()
        sums_KB.append(np.bincount(row_of_N, weights=weighted_N.numpy(), minlength=row_index_B.size))
        masked_KB.append(np.bincount(row_of_N, minlength=row_index_B.size))
    return RowSums(row_index_B, np.stack(sums_KB, 1), np.stack(masked_KB, 1), corrupted.num_maskable_B.numpy())


def summarise(parts: Iterable[RowSums]) -> NelboEstimate:
    """The estimate from the rows' sums, the same to the last bit however the rows were split and in whatever order.

    Rows of negative index are fillers that keep ranks in step, and are dropped. Raises ValueError for a row given
    twice and for no maskable token at all.
    """
    rows = _merge(list(parts))
    tokens, num_rows = int(rows.num_maskable_R.sum()), rows.row_index_R.size
    if tokens == 0:
        raise ValueError("no row has a maskable token: nothing to estimate")
    half = rows.weighted_ce_RK.shape[1] // 2
    a_R, b_R = rows.weighted_ce_RK[:, :half].mean(1), rows.weighted_ce_RK[:, half:].mean(1)
    nelbo = float((a_R + b_R).sum() / 2 / tokens)
    residual_R = (a_R + b_R) / 2 - nelbo * rows.num_maskable_R
    variance_rows = num_rows / (num_rows - 1) * float((residual_R**2).sum()) if num_rows > 1 else math.nan
    variance_mc = float(((a_R - b_R) ** 2).sum()) / 4
    ce_bins, num_bins = _ce_curve(rows)
    return NelboEstimate(
        nelbo, math.sqrt(variance_rows) / tokens, math.sqrt(variance_mc) / tokens, tokens, num_rows, ce_bins, num_bins
    )


def _merge(parts: list[RowSums]) -> RowSums:
    index_R = np.concatenate([p.row_index_R for p in parts])
    order = np.argsort(index_R, kind="stable")
    order = order[index_R[order] >= 0]
    if np.any(np.diff(index_R[order]) == 0):
        raise ValueError("a row was evaluated twice")
    columns = ("row_index_R", "weighted_ce_RK", "num_masked_RK", "num_maskable_R")
    return RowSums(*(np.concatenate([getattr(p, c) for p in parts])[order] for c in columns))


def _ce_curve(rows: RowSums) -> tuple[tuple[float | None, ...], tuple[int, ...]]:
    masked_RK, length_R1 = rows.num_masked_RK, np.maximum(rows.num_maskable_R, 1)[:, None]
    bin_RK = np.maximum(NUM_BINS * masked_RK - 1, 0) // length_R1
    ce_RK = rows.weighted_ce_RK * masked_RK / length_R1
    num = np.bincount(bin_RK.ravel(), weights=masked_RK.ravel(), minlength=NUM_BINS)
    total = np.bincount(bin_RK.ravel(), weights=ce_RK.ravel(), minlength=NUM_BINS)
    return tuple(float(t / n) if n else None for t, n in zip(total, num)), tuple(int(n) for n in num)


def estimate_nelbo(
    ce_fn: Callable[[Corrupted], torch.Tensor], batches: Iterable, *, seed: int, num_draws: int, mask_id: int
) -> NelboEstimate:
    """NELBO over `batches` of (x0_BL, row_index_B, maskable_BL or None) in one process."""
    options = dict(seed=seed, num_draws=num_draws, mask_id=mask_id)
    return summarise(row_sums(ce_fn, x0, index, maskable_BL=maskable, **options) for x0, index, maskable in batches)


def bits_per_byte(nelbo: float, tokens: int, num_bytes: int) -> float:
    """Bits per byte of text from nats per token; also bits per character, given the number of characters."""
    return nelbo * tokens / (math.log(2) * num_bytes)


def perplexity(nelbo: float) -> float:
    """exp(nats per token), infinite where float64 overflows. An upper bound, as the NELBO is."""
    return math.exp(nelbo) if nelbo < 709 else math.inf

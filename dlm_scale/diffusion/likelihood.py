"""Likelihood of held-out rows: the NELBO with its standard errors, differences of two models, and exact likelihoods.

The NELBO bounds -log p(row) from above, in nats. A row gets K masked looks (draws.py says which and with what weights),
in two independent replicates whose half difference gives the Monte-Carlo variance without bias. Masks are a function
of (seed, row index, draw) alone: two checkpoints are compared on the same masks, and no split of the rows changes a
number.
Samplers whose order of positions is a function of the state have a likelihood that needs no bound: `ordered_nll`,
`duel_nll`, `left_to_right_nll`.

Legend: R rows of the data set, B rows of a batch, L positions, K draws (the first K/2 are replicate 0), N masked
positions of the flattened batch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.draws import evaluation_draws

NUM_BINS = 10


@dataclass(frozen=True)
class RowSums:
    """What an estimate needs of each row; numpy arrays, so that they can be gathered over ranks.

    row_index_R int64; weighted_ce_RK float64: weight * sum of the masked cross-entropies of each draw, nats, whose mean
    over a replicate's draws is the row's estimate; ce_RK float64: the sums without weights; num_masked_RK int64;
    num_maskable_R int64: L.
    """

    row_index_R: np.ndarray
    weighted_ce_RK: np.ndarray
    ce_RK: np.ndarray
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


def row_sums(
    ce_fn: Callable[[Corrupted], Tensor],
    x0_BL,
    row_index_B: np.ndarray,
    *,
    seed: int,
    num_draws: int,
    mask_id: int,
    maskable_BL=None,
    estimator: str = "exact",
) -> RowSums:
    """Runs `ce_fn(corrupted) -> ce_N` (nats, on any device) over all draws of one batch of rows."""
    row_index_B = np.asarray(row_index_B)
    options = dict(seed=seed, num_draws=num_draws, mask_id=mask_id, maskable_BL=maskable_BL, estimator=estimator)
    draws = evaluation_draws(x0_BL, row_index_B, **options)
    return sums_of_draws(ce_fn, row_index_B, draws)


def sums_of_draws(ce_fn: Callable[[Corrupted], Tensor], row_index_B: np.ndarray, draws: Iterable[Corrupted]) -> RowSums:
    """The sums of rows that `draws` look at, one `Corrupted` a draw."""
    weighted_KB, ce_KB, masked_KB = [], [], []
    for corrupted in draws:
        ce_N = ce_fn(corrupted).detach().double().cpu()
        row_N = (corrupted.rows_N // corrupted.xt_BL.shape[1]).numpy()
        totals = [np.bincount(row_N, values_N.numpy(), row_index_B.size)
                  for values_N in (corrupted.weight_N.double() * ce_N, ce_N, torch.ones_like(ce_N))]
        for kept, total_B in zip((weighted_KB, ce_KB, masked_KB), totals):
            kept.append(total_B)
    return RowSums(row_index_B, np.stack(weighted_KB, 1), np.stack(ce_KB, 1), np.stack(masked_KB, 1).astype(np.int64),
                   corrupted.num_maskable_B.numpy())  # fmt: skip


def exact_sums(row_index_B: np.ndarray, nll_B: np.ndarray, num_maskable_B: np.ndarray) -> RowSums:
    """Sums of rows whose negative log-likelihood, nats, is known: both replicates are it."""
    nothing_B2 = np.zeros((row_index_B.size, 2))
    twice_B2 = np.repeat(np.asarray(nll_B, np.float64)[:, None], 2, axis=1)
    return RowSums(row_index_B, twice_B2, nothing_B2, nothing_B2.astype(np.int64), num_maskable_B)


def summarise(parts: Iterable[RowSums]) -> NelboEstimate:
    """The estimate from the rows' sums, the same to the last bit however the rows were split and in whatever order.

    Rows of negative index are fillers that keep ranks in step, and are dropped. Raises ValueError for a row given
    twice and for no maskable token at all.
    """
    rows = _merge(list(parts))
    tokens, num_rows = int(rows.num_maskable_R.sum()), rows.row_index_R.size
    if tokens == 0:
        raise ValueError("no row has a maskable token: nothing to estimate")
    a_R, b_R = _replicates(rows).weighted_ce_RK.T
    nelbo = float((a_R + b_R).sum() / 2 / tokens)
    residual_R = (a_R + b_R) / 2 - nelbo * rows.num_maskable_R
    variance_rows = num_rows / (num_rows - 1) * float((residual_R**2).sum()) if num_rows > 1 else math.nan
    variance_mc = float(((a_R - b_R) ** 2).sum()) / 4
    ce_bins, num_bins = _ce_curve(rows)
    return NelboEstimate(
        nelbo, math.sqrt(variance_rows) / tokens, math.sqrt(variance_mc) / tokens, tokens, num_rows, ce_bins, num_bins
    )


def difference(parts: Iterable[RowSums], other_parts: Iterable[RowSums]) -> NelboEstimate:
    """The first model's estimate minus the second's, with the standard errors of the difference: the rows (and, with
    one seed, the masks) are the same, so what is common to both models cancels.

    Raises ValueError unless both looked at the same rows.
    """
    one, other = (_replicates(_merge(list(side))) for side in (parts, other_parts))
    if not all(np.array_equal(getattr(one, c), getattr(other, c)) for c in ("row_index_R", "num_maskable_R")):
        raise ValueError("a difference needs the same rows on both sides")
    return summarise([replace(one, weighted_ce_RK=one.weighted_ce_RK - other.weighted_ce_RK)])


def _replicates(rows: RowSums) -> RowSums:
    """The two replicates' estimates in place of their draws; without a curve over the mask ratio."""
    two_R2 = np.stack([half_RK.mean(1) for half_RK in np.split(rows.weighted_ce_RK, 2, axis=1)], axis=1)
    return replace(rows, weighted_ce_RK=two_R2, ce_RK=0 * two_R2, num_masked_RK=np.zeros(two_R2.shape, np.int64))


def _merge(parts: list[RowSums]) -> RowSums:
    index_R = np.concatenate([p.row_index_R for p in parts])
    order = np.argsort(index_R, kind="stable")
    order = order[index_R[order] >= 0]
    if np.any(np.diff(index_R[order]) == 0):
        raise ValueError("a row was evaluated twice")
    columns = ("row_index_R", "weighted_ce_RK", "ce_RK", "num_masked_RK", "num_maskable_R")
    return RowSums(*(np.concatenate([getattr(p, c) for p in parts])[order] for c in columns))


def _ce_curve(rows: RowSums) -> tuple[tuple[float | None, ...], tuple[int, ...]]:
    masked_RK, length_R1 = rows.num_masked_RK, np.maximum(rows.num_maskable_R, 1)[:, None]
    bin_RK = np.maximum(NUM_BINS * masked_RK - 1, 0) // length_R1
    num = np.bincount(bin_RK.ravel(), weights=masked_RK.ravel(), minlength=NUM_BINS)
    total = np.bincount(bin_RK.ravel(), weights=rows.ce_RK.ravel(), minlength=NUM_BINS)
    return tuple(float(t / n) if n else None for t, n in zip(total, num)), tuple(int(n) for n in num)


def estimate_nelbo(
    ce_fn: Callable[[Corrupted], Tensor], batches: Iterable, *, seed: int, num_draws: int, mask_id: int,
    estimator: str = "exact",
) -> NelboEstimate:
    """NELBO over `batches` of (x0_BL, row_index_B, maskable_BL or None) in one process."""
    options = dict(seed=seed, num_draws=num_draws, mask_id=mask_id, estimator=estimator)
    return summarise(row_sums(ce_fn, x0, index, maskable_BL=maskable, **options) for x0, index, maskable in batches)


def bits_per_byte(nelbo: float, tokens: int, num_bytes: int) -> float:
    """Bits per byte of text from nats per token; also bits per character, given the number of characters."""
    return nelbo * tokens / (math.log(2) * num_bytes)


def perplexity(nelbo: float) -> float:
    """exp(nats per token), infinite where float64 overflows. An upper bound, as the NELBO is."""
    return math.exp(nelbo) if nelbo < 709 else math.inf


def ordered_nll(predict: Callable, x0_BL: Tensor, rank_BL: Tensor, *, mask_id: int, tokens_per_step: int = 1) -> Tensor:
    """float64 [B] nats: exact -log p of the sampler that fills positions in a given order, `tokens_per_step` a pass.

    predict(x_BL, rows_N) -> log_probs_NV of flat positions. rank_BL int64: in each row the places 0, 1, ... of its open
    positions in the order, -1 where the clean id is given (a prompt). The passes are teacher-forced.
    """
    step_BL = torch.where(rank_BL < 0, -1, rank_BL // tokens_per_step)
    nll_B = torch.zeros(len(x0_BL), dtype=torch.float64, device=x0_BL.device)
    for step in range(int(step_BL.max()) + 1):
        now_BL = step_BL == step
        nll_B += _cost(predict, x0_BL, step_BL >= step, now_BL, mask_id, lambda log_probs_NV, now: now)[0]
    return nll_B


def left_to_right_nll(predict: Callable, x0_BL: Tensor, *, mask_id: int, maskable_BL: Tensor | None = None) -> Tensor:
    """float64 [B] nats: exact -log p of filling one position a pass from the left; one pass a maskable position."""
    maskable_BL = torch.ones_like(x0_BL, dtype=torch.bool) if maskable_BL is None else maskable_BL
    rank_BL = torch.where(maskable_BL, maskable_BL.cumsum(1) - 1, -1)
    return ordered_nll(predict, x0_BL, rank_BL, mask_id=mask_id)


def duel_nll(
    predict: Callable,
    x0_BL: Tensor,
    *,
    score: Callable[[Tensor], Tensor],
    mask_id: int,
    tokens_per_step: int = 1,
    extent: Callable[[Tensor], Tensor] | None = None,
    maskable_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(nll_B float64 nats, nfe_B passes): exact -log p of the sampler whose order is a function of the state alone.

    Each pass reveals the `tokens_per_step` masked positions of largest score(log_probs_NV) -> [N], ties to the left;
    extent(sorted scores [B, L], -inf beyond) -> [B] may ask for more. The order never sees a drawn token, so p(x) is
    the product over the passes of the revealed tokens' probabilities, given x itself so far (DUEL, arXiv 2603.01367).
    """
    masked_BL = torch.ones_like(x0_BL, dtype=torch.bool) if maskable_BL is None else maskable_BL.clone()
    nll_B = torch.zeros(len(x0_BL), dtype=torch.float64, device=x0_BL.device)
    nfe_B = torch.zeros_like(x0_BL[:, 0])

    def choose(log_probs_NV: Tensor, ask_BL: Tensor) -> Tensor:
        scores_N = score(log_probs_NV).double()
        score_BL = torch.full(ask_BL.shape, -torch.inf, dtype=torch.float64, device=ask_BL.device)
        sorted_BL, order_BL = score_BL.masked_scatter(ask_BL, scores_N).sort(dim=1, descending=True, stable=True)
        count_B = torch.full_like(nfe_B, tokens_per_step)
        if extent is not None:
            count_B = torch.maximum(count_B, extent(sorted_BL))
        is_best_BL = torch.arange(order_BL.shape[1], device=order_BL.device) < count_B[:, None]
        return torch.zeros_like(ask_BL).scatter(1, order_BL, is_best_BL) & ask_BL

    while bool(masked_BL.any()):
        nfe_B += masked_BL.any(1)
        cost_B, chosen_BL = _cost(predict, x0_BL, masked_BL, masked_BL, mask_id, choose)
        nll_B += cost_B
        masked_BL &= ~chosen_BL
    return nll_B, nfe_B


def _cost(predict, x0_BL, masked_BL, ask_BL, mask_id, choose) -> tuple[Tensor, Tensor]:
    """One teacher-forced pass over all rows: (nats of what is chosen among `ask_BL` [B], what is chosen [B, L])."""
    flat_N = ask_BL.flatten().nonzero()[:, 0]
    log_probs_NV = predict(torch.where(masked_BL, mask_id, x0_BL), flat_N)
    chosen_BL = choose(log_probs_NV, ask_BL)
    ce_N = -log_probs_NV.gather(1, x0_BL.flatten()[flat_N, None])[:, 0].double()
    ce_BL = torch.zeros(x0_BL.shape, dtype=torch.float64, device=x0_BL.device).masked_scatter(ask_BL, ce_N)
    return torch.where(chosen_BL, ce_BL, 0.0).sum(1), chosen_BL

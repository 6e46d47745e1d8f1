"""Clean text some of whose tokens are replaced: what classifiers of tokens and scorers of texts learn from."""

import dataclasses
from typing import Any

import numpy as np
import torch

from dlm_scale.diffusion.corruption import (
    KIND_SUBSTITUTED,
    KIND_VISIBLE,
    Corrupted,
    Masked,
    assemble,
    checked_times,
    clean_rows,
    count_in,
)
from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform24
from dlm_scale.diffusion.schedule import Schedule
from dlm_scale.diffusion.segments import check_bounds, row_bounds


def replaceable_ids(num_ids: int, excluded: tuple[int, ...]) -> np.ndarray:
    """int64, ascending: the ids that may take another's place."""
    return np.setdiff1d(np.arange(num_ids), np.asarray(excluded, np.int64))


def substitute(
    x0_BL,
    sample_index_B: np.ndarray,
    t_S: np.ndarray,
    *,
    seed: int,
    schedule: Schedule,
    ids_K: np.ndarray,
    mask_id: int,
    denominator: float | None,
    maskable_BL=None,
    attention: Any = None,
    stream: int = Stream.REPLACEMENT,
) -> Corrupted:
    """Each maskable position replaced on its own with probability m(t), by an id uniform on `ids_K` (ascending, two at
    least) but never its own.

    A `Corrupted` whose `rows_N` are ALL positions, `target_N` the clean ids, `weight_N` 1 where maskable and else 0,
    and `is_masked_BL` and KIND_SUBSTITUTED say which were replaced; no weight estimates a NELBO. Randomness: words 0
    and 1 of Philox(seed; sample, column, stream). Raises ValueError as `corrupt` does.
    """
    x0_BL, sample_index_B, maskable_BL = clean_rows(x0_BL, sample_index_B, maskable_BL, mask_id)
    bounds_S1 = row_bounds(*x0_BL.shape) if attention is None else np.asarray(attention.cu_seqlens)
    check_bounds(bounds_S1, *x0_BL.shape)
    t_S = checked_times(t_S, bounds_S1.size - 1)
    m_S = schedule.mask_ratio(torch.from_numpy(t_S)).numpy()
    low_B, high_B = counter_of(sample_index_B)
    w0_BL, w1_BL, _, _ = philox(seed, low_B[:, None], high_B[:, None], np.arange(x0_BL.shape[1]), stream)
    threshold_BL = np.repeat(np.ceil(m_S * 2**24).astype(np.int32), np.diff(bounds_S1)).reshape(x0_BL.shape)
    is_replaced_BL = (uniform24(w0_BL) < threshold_BL) & maskable_BL
    xt_BL = np.where(is_replaced_BL, other_ids(x0_BL, w1_BL, ids_K), x0_BL)
    of_batch = torch.from_numpy(np.diff(bounds_S1).astype(np.int64))
    text = Masked(torch.from_numpy(xt_BL), torch.from_numpy(is_replaced_BL), of_batch,
                  torch.arange(x0_BL.size), torch.from_numpy(x0_BL.reshape(-1).copy()))  # fmt: skip
    nothing_S = torch.zeros(len(t_S), dtype=torch.float64)
    length_S = count_in(maskable_BL, bounds_S1)
    made = assemble(text, weight_S=nothing_S, elbo_weight_S=nothing_S, m_S=m_S, t_S=t_S, num_maskable_S=length_S,
                    denominator=denominator, attention=attention)  # fmt: skip
    kind_N = np.where(is_replaced_BL, KIND_SUBSTITUTED, KIND_VISIBLE).astype(np.uint8).reshape(-1)
    weight_N = torch.from_numpy(maskable_BL.reshape(-1).astype(np.float32))
    return dataclasses.replace(made, kind_N=torch.from_numpy(kind_N), weight_N=weight_N)


def other_ids(x0_BL: np.ndarray, word_BL: np.ndarray, ids_K: np.ndarray) -> np.ndarray:
    """int64, shaped as x0: a uniform id of `ids_K` that is not the one there; of K, or of K - 1 where that is among them."""
    place_BL = np.minimum(np.searchsorted(ids_K, x0_BL), len(ids_K) - 1)
    is_own_BL = ids_K[place_BL] == x0_BL
    count_BL = (len(ids_K) - is_own_BL).astype(np.uint64)
    number_BL = (word_BL.astype(np.uint64) * count_BL >> np.uint64(32)).astype(np.int64)
    return ids_K[number_BL + (is_own_BL & (number_BL >= place_BL))]

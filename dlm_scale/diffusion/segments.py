"""Rows made of segments: documents packed side by side, each with a time of its own, and rows of random length.

Legend: B rows, L positions, S segments. A segment is what shares one time; where nothing is packed, a row. Bounds are
int32 [S+1], ascending, of the segments in the flattened batch [B*L], every row's own bounds among them (`cu_seqlens`).
"""

from typing import NamedTuple

import numpy as np

from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform24, uniform53
from dlm_scale.diffusion.timestep import wrap_time


class Rows(NamedTuple):
    """Clean rows, as numpy arrays, that are more than ids.

    ids_BL int64. maskable_BL bool: the rest (padding, prompts) is never masked and carries no loss. bounds_S1: the
    packed documents, between which no attention passes; padding is a segment too. None: the rows themselves.
    """

    ids_BL: np.ndarray
    maskable_BL: np.ndarray
    bounds_S1: np.ndarray | None = None


def row_bounds(num_rows: int, length: int) -> np.ndarray:
    """int32 [B+1]: every row one segment."""
    return np.arange(num_rows + 1, dtype=np.int32) * np.int32(length)


def check_bounds(bounds_S1: np.ndarray, num_rows: int, length: int) -> None:
    """Raises ValueError unless these are the bounds of segments that fill the rows and cross none."""
    ends = row_bounds(num_rows, length)
    is_int = bounds_S1.ndim == 1 and bounds_S1.dtype == np.int32
    if not is_int or np.any(np.diff(bounds_S1) <= 0) or not np.isin(ends, bounds_S1).all() or bounds_S1[-1] != ends[-1]:
        raise ValueError(f"segment bounds must be int32, ascending from 0 to {num_rows * length}, with every multiple "
                         f"of the row length {length} among them, got {bounds_S1.dtype} {bounds_S1}")


def segment_times(
    seed: int, sample_index_B: np.ndarray, t_B: np.ndarray, bounds_S1: np.ndarray, length: int
) -> np.ndarray:
    """float64 [S] times in (0, 1] of the segments of rows whose own times are t_B.

    Segment j of the J of a row has t = (t_row + (j + u_j)/J) mod 1, so a row's segments are stratified over time as
    the rows of a batch are. u_0 = 0: a row's first segment, hence a row that is one, has the row's time. The other u_j
    are words 0, 1 of Philox(seed; sample low, high, first column of the segment, SEGMENT_TIME).
    """
    row_S, column_S = np.divmod(bounds_S1[:-1].astype(np.int64), length)
    number_S = np.arange(row_S.size) - np.searchsorted(row_S, row_S)
    w0_S, w1_S, _, _ = philox(seed, *counter_of(np.asarray(sample_index_B)[row_S]), column_S, Stream.SEGMENT_TIME)
    shift_S = np.where(number_S > 0, number_S + uniform53(w0_S, w1_S), 0.0)
    return wrap_time(np.asarray(t_B)[row_S] + shift_S / np.bincount(row_S, minlength=1)[row_S])


def row_lengths(seed: int, sample_index_B: np.ndarray, length: int, share: float) -> np.ndarray:
    """int64 [B]: a `share` of all samples has a length uniform on 1..L, the rest L (LLaDA, arXiv 2502.09992).

    Words 0 (whether) and 1 (how long) of Philox(seed; sample low, high, 0, LENGTH).
    """
    w0_B, w1_B, _, _ = philox(seed, *counter_of(sample_index_B), 0, Stream.LENGTH)
    cut_B = 1 + (w1_B.astype(np.int64) * length >> 32)
    return np.where(uniform24(w0_B) < np.ceil(share * 2**24), cut_B, length)


def cut_rows(rows: Rows, length_B: np.ndarray) -> Rows:
    """The rows cut to these lengths: what lies beyond is not maskable, and makes segments of its own."""
    num_rows, length = rows.ids_BL.shape
    maskable_BL = rows.maskable_BL & (np.arange(length) < length_B[:, None])
    if np.all(length_B == length):
        return rows._replace(maskable_BL=maskable_BL)
    bounds_S1 = row_bounds(num_rows, length) if rows.bounds_S1 is None else rows.bounds_S1
    cuts_B = (np.arange(num_rows) * length + length_B).astype(np.int32)
    return rows._replace(maskable_BL=maskable_BL, bounds_S1=np.union1d(bounds_S1, cuts_B))


def drop_prompts(rows: Rows, seed: int, sample_index_B: np.ndarray, share: float, mask_id: int) -> Rows:
    """The rows, a `share` of all segments with the mask id in place of their prompt, so that one network learns both
    laws that classifier-free guidance needs (Ho and Salimans, arXiv 2207.12598).

    A prompt is what is not maskable in a segment that has maskable positions. Word 0 of Philox(seed; sample low, high,
    first column of the segment, PART).
    """
    num_rows, length = rows.ids_BL.shape
    bounds_S1 = row_bounds(num_rows, length) if rows.bounds_S1 is None else rows.bounds_S1
    row_S, column_S = np.divmod(bounds_S1[:-1].astype(np.int64), length)
    word_S = philox(seed, *counter_of(np.asarray(sample_index_B)[row_S]), column_S, Stream.PART)[0]
    has_text_S = np.add.reduceat(rows.maskable_BL.reshape(-1), bounds_S1[:-1], dtype=np.int64) > 0
    is_dropped_S = (uniform24(word_S) < np.ceil(share * 2**24)) & has_text_S
    is_dropped_BL = np.repeat(is_dropped_S, np.diff(bounds_S1)).reshape(num_rows, length)
    return rows._replace(ids_BL=np.where(is_dropped_BL & ~rows.maskable_BL, mask_id, rows.ids_BL))

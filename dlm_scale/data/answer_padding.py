"""How far an answer goes on with end tokens, so that a model learns where answers end whatever the canvas it fills.

A row of conversations holds one answer with its past. Where the answer's segment ends with its end token, the end of
what is masked says how long the answer is; where end tokens follow it that carry loss like the answer itself, only the
prompt does. They repeat the token that ends the answer, so that one stop token ends a text.

B rows, L positions of a row, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from dlm_scale.diffusion.rng import Stream, counter_of, philox
from dlm_scale.diffusion.segments import Rows, row_bounds

ANSWER_WORD = 2  # of the LENGTH stream; words 0 and 1 cut rows to a random length


def _full(seed: int, sample_B: np.ndarray, room_B: np.ndarray) -> np.ndarray:
    return room_B


def _random(seed: int, sample_B: np.ndarray, room_B: np.ndarray) -> np.ndarray:
    word_B = philox(seed, *counter_of(sample_B), 0, Stream.LENGTH)[ANSWER_WORD]
    return word_B.astype(np.int64) * (room_B + 1) >> 32


# policy -> (seed, global sample indices, room_B = what is left of each row) -> int64 [B] end tokens after the answer
POLICIES: dict[str, Callable[[int, np.ndarray, np.ndarray], np.ndarray]] = {"random": _random, "full": _full}


def continued(rows: Rows, policy: str, seed: int, sample_B: np.ndarray, end_ids: Collection[int]) -> Rows:
    """The rows, each of one segment and what is left, with the segment continued by the token that it ends with.

    `random`: by a number of them uniform on 0 ... what is left of the row, a function of (seed, global sample) alone;
    `full`: to the end of the row (LLaDA, arXiv 2502.09992). They are maskable. A segment that does not end with one of
    `end_ids`, an answer that was cut short, stays as it is.
    """
    num_rows, length = rows.ids_BL.shape
    used_B = used_of(rows)
    last_B = rows.ids_BL[np.arange(num_rows), used_B - 1]
    room_B = np.where(np.isin(last_B, list(end_ids)), length - used_B, 0)
    stop_B = used_B + POLICIES[policy](seed, np.asarray(sample_B), room_B)
    column_L = np.arange(length)
    is_added_BL = (column_L >= used_B[:, None]) & (column_L < stop_B[:, None])
    stops_B = (np.arange(num_rows) * length + stop_B).astype(np.int32)
    return Rows(
        np.where(is_added_BL, last_B[:, None], rows.ids_BL),
        rows.maskable_BL | is_added_BL,
        np.union1d(row_bounds(num_rows, length), stops_B),
    )


def used_of(rows: Rows) -> np.ndarray:
    """int64 [B]: the length of each row's first segment."""
    length = rows.ids_BL.shape[1]
    row_S, column_S = np.divmod(rows.bounds_S1[:-1].astype(np.int64), length)
    used_B = np.full(len(rows.ids_BL), length, dtype=np.int64)
    used_B[row_S[column_S > 0]] = column_S[column_S > 0]
    return used_B

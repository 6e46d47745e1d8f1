"""Rows of one dataset by their number: windows cut across documents, or documents packed side by side.

B rows, L positions of a row, W windows of a file, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from dlm_scale.data.packing import PackingPlan, ranges
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.diffusion.segments import Rows
from dlm_scale.errors import UsageError


def refuse_id(path: str, offset: int, token: int, vocabulary: Vocabulary) -> NoReturn:
    what = "the mask" if token == vocabulary.mask_id else f"not a token of text (vocab_size {vocabulary.size})"
    raise UsageError(f"{path}: token {offset} is id {token}, {what}. The file is damaged: copy or prepare it again")


def windows_of(bin_path: str, tokens: np.ndarray, seq_len: int, vocabulary: Vocabulary) -> Windows:
    """Window w holds the tokens w*L to (w+1)*L - 1, cut across documents; the tail that fills no window is left out."""
    num_windows = len(tokens) // seq_len
    return Windows(bin_path, tokens[: num_windows * seq_len].reshape(num_windows, seq_len), vocabulary)


@dataclass(frozen=True)
class Windows:
    """The windows of one split, a [W, L] view of its file, and what its ids must be."""

    bin_path: str
    ids_WL: np.ndarray
    vocabulary: Vocabulary

    @property
    def num_rows(self) -> int:
        return len(self.ids_WL)

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """int64 [B, L]. Raises UsageError on an id that clean text cannot hold: file, token offset, id."""
        ids_BL = self.ids_WL[row_B]
        bad = self.vocabulary.first_invalid(ids_BL)
        if bad is not None:
            row, column = divmod(bad, ids_BL.shape[1])
            offset = int(row_B[row]) * ids_BL.shape[1] + column
            refuse_id(self.bin_path, offset, int(ids_BL[row, column]), self.vocabulary)
        return ids_BL.astype(np.int64)

    def take(self, row_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """(ids_BL,), for `assemble`."""
        return (self.rows(row_B),)


@dataclass(frozen=True)
class PackedDocuments:
    """The rows of a packing plan over the tokens of one split. What a row has left is padding: `pad_id`, not maskable,
    and a segment of its own. So is not maskable what `past` says of each document: (token at which it begins, how many
    of its tokens are the past of an answer), ascending, of all documents; each must lie in one piece."""

    bin_path: str
    tokens: np.ndarray
    plan: PackingPlan
    vocabulary: Vocabulary
    pad_id: int
    past: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def num_rows(self) -> int:
        return self.plan.num_rows

    def take(self, row_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """(ids_BL int64, maskable_BL bool, is_start_BL bool: a segment begins here), for `assemble`.

        Raises UsageError on an id that clean text cannot hold: file, token offset, id.
        """
        shape = len(row_B), self.plan.seq_len
        start_S, length_S, count_B = self.plan.pieces(row_B)
        offset_T = ranges(start_S, length_S)
        ids_T = self.tokens[offset_T]
        bad = self.vocabulary.first_invalid(ids_T)
        if bad is not None:
            refuse_id(self.bin_path, int(offset_T[bad]), int(ids_T[bad]), self.vocabulary)
        used_B = np.add.reduceat(length_S, np.cumsum(count_B) - count_B)
        is_used_BL = np.arange(shape[1]) < used_B[:, None]
        ids_BL, is_start_BL = np.full(shape, self.pad_id, dtype=np.int64), np.zeros(shape, dtype=bool)
        ids_BL[is_used_BL] = ids_T
        is_start_BL[is_used_BL] = _starts(length_S)
        maskable_BL = is_used_BL
        if self.past is not None:
            maskable_BL = is_used_BL.copy()
            maskable_BL[is_used_BL] = self._is_answer(start_S, length_S)
        is_padded_B = used_B < shape[1]
        is_start_BL[is_padded_B, used_B[is_padded_B]] = True
        return ids_BL, maskable_BL, is_start_BL


    def _is_answer(self, start_S: np.ndarray, length_S: np.ndarray) -> np.ndarray:
        """bool [T] over the tokens of these documents: whether they are beyond its past."""
        start_D, past_D = self.past
        past_S = past_D[np.searchsorted(start_D, start_S)]
        return ranges(np.zeros_like(length_S), length_S) >= np.repeat(past_S, length_S)


def _starts(length_S: np.ndarray) -> np.ndarray:
    """bool [T]: where the segments of these lengths begin."""
    is_start_T = np.zeros(length_S.sum(), dtype=bool)
    is_start_T[np.cumsum(length_S) - length_S] = True
    return is_start_T


def pad_id_of(eos_id: int | None, vocabulary: Vocabulary) -> int:
    """The separator, or else the lowest id that text can hold."""
    if eos_id is not None:
        return eos_id
    return next(i for i in range(vocabulary.size) if i != vocabulary.mask_id and i not in vocabulary.suppressed_ids)


def merge(parts: Sequence[tuple[np.ndarray, tuple[np.ndarray, ...]]]) -> tuple[np.ndarray, ...]:
    """Of (places in the batch, what `take` gave for them) the whole batch."""
    if len(parts) == 1:
        return parts[0][1]
    num_rows, first = sum(len(at) for at, _ in parts), parts[0][1]
    whole = tuple(np.empty((num_rows, *array.shape[1:]), array.dtype) for array in first)
    for at, part in parts:
        for out, array in zip(whole, part, strict=True):
            out[at] = array
    return whole


def assemble(taken: tuple[np.ndarray, ...]) -> np.ndarray | Rows:
    """What `data.rows` gives, of what `take` gave."""
    if len(taken) == 1:
        return taken[0]
    ids_BL, maskable_BL, is_start_BL = taken
    bounds_S1 = np.append(np.flatnonzero(is_start_BL), is_start_BL.size).astype(np.int32)
    return Rows(ids_BL, maskable_BL, bounds_S1)

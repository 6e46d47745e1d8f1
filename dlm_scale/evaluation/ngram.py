"""A judge that needs no model: an interpolated Witten-Bell n-gram over token ids (Witten and Bell, 1991).

    p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)),   at the end p(w) = (c(w) + T / V) / (c + T)

c counts in the training rows, T(h) is how many different tokens followed h, h' is h without its oldest token, V the
number of ids: every id has a positive probability, and they add up to 1. A history never seen hands on to the shorter.

N-grams are numbered level by level: the key of one is (number of its first n-1 tokens) * V + its last token, and its
number the place of that key among the sorted keys of its level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Level:
    """N-grams of one length: keys and counts [G], and of the histories before the last token [H] c(h) and T(h)."""

    keys: np.ndarray
    counts: np.ndarray
    total_H: np.ndarray
    kinds_H: np.ndarray


class NgramJudge:
    """Counts `rows` of ids; `order` 5 means four tokens of history, never across rows.

    Raises ValueError for no training token and for ids outside the vocabulary.
    """

    def __init__(self, rows: Iterable[Sequence[int]], vocab_size: int, order: int = 5):
        rows = [np.asarray(row, np.int64) for row in rows]
        ids = np.concatenate([*rows, np.empty(0, np.int64)])
        if not ids.size:
            raise ValueError("an n-gram judge needs at least one training token")
        if not (0 <= ids.min() and ids.max() < vocab_size):
            raise ValueError(f"training tokens {ids.min()} to {ids.max()} lie outside the {vocab_size} ids")
        self.vocab_size, self.order, self._levels = vocab_size, order, []
        row_of_id = np.repeat(np.arange(len(rows)), [row.size for row in rows])
        number, num_histories = np.zeros(ids.size, np.int64), 1
        for n in range(1, order + 1):
            inside = row_of_id[: ids.size - n + 1] == row_of_id[n - 1 :]
            keys = (number[: inside.size] * vocab_size + ids[n - 1 :])[inside]
            unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
            histories = unique // vocab_size
            total_H = np.bincount(histories, counts, num_histories)
            self._levels.append(_Level(unique, counts, total_H, np.bincount(histories, minlength=num_histories)))
            number = np.zeros(inside.size, np.int64)
            number[inside] = inverse
            num_histories = unique.size

    def nll(self, row: Sequence[int]) -> np.ndarray:
        """float64 [L] nats of each token given those before it in the row."""
        ids = np.asarray(row, np.int64)
        p_L = np.full(ids.size, 1.0 / self.vocab_size)
        number = np.zeros(ids.size, np.int64)  # of the history that starts at each position; -1: never seen
        for length, level in enumerate(self._levels[: ids.size]):
            history = number[: ids.size - length]
            keys = history * self.vocab_size + ids[length:]
            place = np.minimum(np.searchsorted(level.keys, keys), level.keys.size - 1)
            is_seen = (history >= 0) & (level.keys[place] == keys) if level.keys.size else np.zeros(keys.size, bool)
            total, kinds = (np.where(history >= 0, table[history], 0) for table in (level.total_H, level.kinds_H))
            count = np.where(is_seen, level.counts[place], 0) if level.keys.size else 0
            mixed = (count + kinds * p_L[length:]) / np.maximum(total + kinds, 1)
            p_L[length:] = np.where(total > 0, mixed, p_L[length:])
            number = np.where(is_seen, place, -1)
        return -np.log(p_L)

"""Which samples a worker makes, and in which batches: pure functions of the index.

A sample is a number: request * num_samples + sample. Batches hold canvases of one length and one number of steps, so
no canvas is padded for its neighbours' sake.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

_SHARE_BLOCK = 32


def share(
    lengths: np.ndarray, steps: np.ndarray, num_open: np.ndarray, num_samples: int, worker: int, num_workers: int
) -> np.ndarray:
    """The samples [n] of a worker, longest canvases first, equal ones together.

    Blocks of equal canvases go, the costliest first, to the worker that has least so far. Depends on nothing but the
    index and the number of workers: all of them come to the same answer alone.
    """
    order = np.lexsort((np.arange(len(lengths)), steps, -lengths))
    cost = lengths * np.minimum(steps, num_open) + 1.0
    block = max(1, min(_SHARE_BLOCK, len(lengths) * num_samples // (4 * num_workers)))
    load, mine = [(0.0, w) for w in range(num_workers)], []
    for requests in _groups(order, lengths, steps):
        samples = (requests[:, None] * num_samples + np.arange(num_samples)).reshape(-1)
        if num_workers == 1:
            mine.append(samples)
            continue
        for start in range(0, len(samples), block):
            part = samples[start : start + block]
            least, owner = heapq.heappop(load)
            heapq.heappush(load, (least + cost[part // num_samples].sum(), owner))
            if owner == worker:
                mine.append(part)
    return np.concatenate(mine) if mine else np.zeros(0, dtype=np.int64)


def batches(samples: np.ndarray, lengths: np.ndarray, steps: np.ndarray, num_samples: int, size: int) -> Iterator:
    """`samples` in order, cut into arrays of at most `size` whose canvases have one length and one number of steps."""
    for group in _groups(samples, np.repeat(lengths, num_samples), np.repeat(steps, num_samples)):
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _groups(items: np.ndarray, lengths: np.ndarray, steps: np.ndarray) -> list[np.ndarray]:
    if not len(items):
        return []
    is_new = (np.diff(lengths[items]) != 0) | (np.diff(steps[items]) != 0)
    return np.split(items, np.flatnonzero(is_new) + 1)


def batch_size_for(free_bytes: int, length: int, num_outputs: int, share_looked_at: float) -> int:
    """Canvases at once in half of the free memory: what a row needs most are its log-probabilities.

    share_looked_at: the part of its positions that a pass looks at. Six float32 tables of them live at a time at most
    (log-probabilities, the same again as blocks are joined, probabilities, two for sorting, one for entropies).
    """
    row_bytes = 6 * 4 * num_outputs * max(1.0, length * share_looked_at) + 64 * length
    return int(max(1, min(256, free_bytes // 2 // row_bytes)))

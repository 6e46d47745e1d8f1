"""The order of the data: a keyed permutation of the windows for each epoch, with no state but (seed, sample index).

A Feistel network over the smallest even number of bits that covers n, with cycle walking: any position of any epoch is
found in O(1) time and memory. B samples of a batch.
"""

from __future__ import annotations

import numpy as np

from dlm_scale.diffusion.rng import Stream, philox

ROUNDS = 8


def order_key(seed: int, epoch: int, member: int = 0) -> np.ndarray:
    """Round keys, uint64 [ROUNDS], of one epoch of one member of a mixture; stream ORDER of the counter table."""
    column = member * (ROUNDS // 2) + np.arange(ROUNDS // 2)
    words = [w.astype(np.uint64) for w in philox(seed, epoch & 0xFFFFFFFF, epoch >> 32, column, int(Stream.ORDER))]
    return np.concatenate([words[0] << np.uint64(32) | words[1], words[2] << np.uint64(32) | words[3]])


def permute(index_B: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The keyed bijection of [0, n), 1 <= n <= 2^40, at `index_B` (each in [0, n)); int64 [B]."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    value_B = _feistel(np.asarray(index_B, dtype=np.int64).astype(np.uint64), half, key)
    outside = np.flatnonzero(value_B >= n)
    while outside.size:
        value_B[outside] = _feistel(value_B[outside], half, key)
        outside = outside[value_B[outside] >= n]
    return value_B.astype(np.int64)


def locate(sample_B: np.ndarray, n: int, seed: int, member: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, window), int64 [B] each, of global samples: epoch i // n, window = permutation of i % n of that epoch."""
    epoch_B, within_B = np.divmod(np.asarray(sample_B, dtype=np.int64), n)
    window_B = np.empty_like(within_B)
    for epoch in np.unique(epoch_B):
        at = epoch_B == epoch
        window_B[at] = permute(within_B[at], n, order_key(seed, int(epoch), member))
    return epoch_B, window_B


def _feistel(value: np.ndarray, half: int, key: np.ndarray) -> np.ndarray:
    low = np.uint64((1 << half) - 1)
    left, right = value >> np.uint64(half), value & low
    for round_key in key:
        left, right = right, left ^ (_mix(right ^ round_key) & low)
    return left << np.uint64(half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

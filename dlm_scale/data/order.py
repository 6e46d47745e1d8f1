"""The order of the data: a keyed permutation of the rows for each epoch, with no state but (seed, sample index).

A Feistel network over the smallest number of bits that covers n, with cycle walking: any position of any epoch is found
in O(1) time and memory. B samples of a batch.
"""

from __future__ import annotations

import functools

import numpy as np

from dlm_scale.diffusion.rng import Stream, philox

ROUNDS = 8
MAX_MEMBERS = 256  # of a mixture that has shards; they may be 2^22
MIN_BITS = 6  # on fewer, eight rounds do not reach all permutations evenly
BLOCK = 1 << 12  # samples whose places are found together: 32 in one call cost 90 us, 4096 cost 300


@functools.lru_cache(maxsize=256)  # every batch of an epoch asks for the same key
def order_key(seed: int, epoch: int, member: int = 0, shard: int = 0) -> np.ndarray:
    """Round keys, uint64 [ROUNDS], of one epoch of one member of a mixture, or of a shard of it; stream ORDER of the
    counter table."""
    column = (shard * MAX_MEMBERS + member) * (ROUNDS // 2) + np.arange(ROUNDS // 2)
    words = [w.astype(np.uint64) for w in philox(seed, epoch & 0xFFFFFFFF, epoch >> 32, column, int(Stream.ORDER))]
    return np.concatenate([words[0] << np.uint64(32) | words[1], words[2] << np.uint64(32) | words[3]])


def permute(index_B: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The keyed bijection of [0, n), 1 <= n <= 2^40, at `index_B` (each in [0, n)); int64 [B]."""
    bits = max(MIN_BITS, (n - 1).bit_length())
    value_B = _feistel(np.asarray(index_B, dtype=np.int64).astype(np.uint64), bits, key)
    outside = np.flatnonzero(value_B >= n)
    while outside.size:
        value_B[outside] = _feistel(value_B[outside], bits, key)
        outside = outside[value_B[outside] >= n]
    return value_B.astype(np.int64)


def locate(sample_B: np.ndarray, n: int, seed: int, member: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, row), int64 [B] each, of global samples: epoch i // n, row = permutation of i % n of that epoch."""
    epoch_B, within_B = np.divmod(np.asarray(sample_B, dtype=np.int64), n)
    row_B = np.empty_like(within_B)
    for epoch in np.unique(epoch_B):
        at = epoch_B == epoch
        row_B[at] = permute(within_B[at], n, order_key(seed, int(epoch), member))
    return epoch_B, row_B


def row_of(sample_B: np.ndarray, n: int, seed: int, member: int = 0) -> np.ndarray:
    """The rows of `locate`, int64 [B], quickly where the samples of successive calls lie close together."""
    sample_B = np.asarray(sample_B, dtype=np.int64)
    block_B = sample_B // BLOCK
    first = int(block_B[0])
    if n < BLOCK or (block_B != first).any():
        return locate(sample_B, n, seed, member)[1]
    return _block(first, n, seed, member)[sample_B - first * BLOCK]


@functools.lru_cache(maxsize=32)
def _block(number: int, n: int, seed: int, member: int) -> np.ndarray:
    return locate(np.arange(number * BLOCK, (number + 1) * BLOCK), n, seed, member)[1]


def _feistel(value: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of [0, 2^bits): each half in turn is changed by a hash of the other."""
    width = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    high, low = value >> width, value & low_mask
    for i in range(0, ROUNDS, 2):
        high = high ^ (_hash(low ^ key[i]) & high_mask)
        low = low ^ (_hash(high ^ key[i + 1]) & low_mask)
    return high << width | low


def _hash(x: np.ndarray) -> np.ndarray:
    """32 mixed bits of each word: two multiplications by the constants of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)

"""Counter-based randomness: Philox4x32-10 in numpy, bit for bit what `tl.philox` gives in a Triton kernel.

Every random number of a run is a pure function of (key, counter). No generator has a state, so nothing random depends
on the number of ranks, the micro-batch or a restart. The counter table stands in docs/design.md.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import hashlib
from enum import IntEnum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_BLOCK = 8192  # counters a pass: its working set stays in the second-level cache


class Stream(IntEnum):
    """Last word of the counter: what the random number is for."""

    MASK = 0
    REPLACEMENT = 1
    SEGMENT_TIME = 2
    LENGTH = 3
    EDIT = 4
    CRITIC = 5
    PART = 6
    TIME = 7
    ORDER = 8
    INIT = 9
    EVAL = 10
    SAMPLE = 11
    SYNTHETIC = 12
    GAUSS = 13


def philox(key: int, c0, c1, c2, c3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four uint32 arrays of random words for a 64-bit `key` and a 128-bit counter (c0 lowest).

    The counter words are integers or integer arrays that broadcast together; only their low 32 bits count.
    Raises ValueError for a key outside [0, 2**64) and TypeError for counter words that are not integers.
    """
    if not 0 <= key < 2**64:
        raise ValueError(f"a Philox key is an integer in [0, 2**64), got {key}")
    words = np.broadcast_arrays(*(_low_word(c) for c in (c0, c1, c2, c3)))
    shape, flat = words[0].shape, [w.reshape(-1) for w in words]
    out = np.empty((4, flat[0].size), np.uint32)
    for start in range(0, flat[0].size, _BLOCK):
        out[:, start : start + _BLOCK] = _ten_rounds(key, *(w[start : start + _BLOCK].copy() for w in flat))
    return tuple(out.reshape(4, *shape))


def _low_word(c) -> np.ndarray:
    return np.asarray(c).astype(np.int64, casting="same_kind").view(np.uint64) & _LOW


def _ten_rounds(key: int, c0, c1, c2, c3):
    """Works in place on uint64 arrays that hold 32-bit values."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(10):
        np.multiply(c0, _MULTIPLIERS[0], out=p0)
        np.multiply(c2, _MULTIPLIERS[1], out=p1)
        np.right_shift(p1, _SHIFT, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.bitwise_and(p1, _LOW, out=c1)
        np.right_shift(p0, _SHIFT, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(p0, _LOW, out=c3)
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def counter_of(index) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) counter words, uint32, of a 64-bit index such as the global sample index."""
    wide = np.asarray(index).astype(np.int64, casting="same_kind").view(np.uint64)
    return (wide & _LOW).astype(np.uint32), (wide >> _SHIFT).astype(np.uint32)


def tensor_key(seed: int, name: str) -> int:
    """64-bit Philox key from the run's seed and a tensor's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def uniform24(words: np.ndarray) -> np.ndarray:
    """Random words to int32 in [0, 2**24): `uniform24(w) < ceil(p * 2**24)` is exact at p = 0 and at p = 1."""
    return (words >> np.uint32(8)).astype(np.int32)


def uniform53(w0: np.ndarray, w1: np.ndarray) -> np.ndarray:
    """Two random words to float64 in [0, 1), a multiple of 2**-53."""
    high, low = np.asarray(w0) >> np.uint32(5), np.asarray(w1) >> np.uint32(6)
    return (high * 67108864.0 + low) / 9007199254740992.0


def standard_normal(key: int, first_index: int, count: int, stream: int) -> np.ndarray:
    """float32 [count]: values first_index ... first_index + count - 1 of the endless normal sequence of (key, stream).

    Value i depends on (key, stream, i) alone, however the sequence is cut into calls, so any slice of a tensor can be
    made where it is needed. Four values a Philox call (Box-Muller in float64). Raises ValueError for a negative
    index or count.
    """
    if first_index < 0 or count < 0:
        raise ValueError(f"first_index and count must not be negative, got {first_index} and {count}")
    out, done = np.empty(count, np.float32), 0
    while done < count:
        block, lane = divmod(first_index + done, 4)
        normals = _normal_blocks(key, block, min(_BLOCK, (lane + count - done + 3) // 4), stream)
        piece = normals[lane : lane + count - done]
        out[done : done + piece.size] = piece
        done += piece.size
    return out


def _normal_blocks(key: int, first_block: int, num_blocks: int, stream: int) -> np.ndarray:
    low, high = counter_of(first_block + np.arange(num_blocks, dtype=np.int64))
    return box_muller(np.stack(philox(key, low, high, 0, stream)))


def box_muller(words: np.ndarray) -> np.ndarray:
    """float32 [4 n] normals from uint32 words [4, n]; the half keeps the logarithm's argument inside (0, 1)."""
    radius = np.sqrt(-2.0 * np.log((words[0::2] + 0.5) * 2.0**-32))
    angle = words[1::2] * (2.0 * np.pi * 2.0**-32)
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    return normals.transpose(2, 1, 0).reshape(-1).astype(np.float32)

"""Times of a training step, stratified over the GLOBAL batch.

One random offset a step, equally spaced strata, one row in each (MD4, arXiv 2406.04329): the batch covers (0, 1]
evenly, which takes most of the variance of t out of the loss. A time is a function of (seed, step, row) alone, hence
the same under every split of the batch over ranks and micro-batches.
"""

import math

import numpy as np

from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform53


def wrap_time(x: np.ndarray) -> np.ndarray:
    """x modulo 1 as a time in (0, 1]: t = 0 would mask nothing and have infinite weight, so 0 becomes 1."""
    t = np.mod(x, 1.0)
    return np.where(t == 0.0, 1.0, t)


def times_on_grid(t: np.ndarray, num_steps: int) -> np.ndarray:
    """Times in (0, 1] rounded up to k/num_steps, k = 1..num_steps: uniform times become uniform steps."""
    return np.ceil(t * num_steps) / num_steps


def stratified_times(seed: int, step: int, global_batch_size: int, rows=None) -> np.ndarray:
    """float64 times in (0, 1] of the given `rows` (indices within the global batch; default: all of them).

    t_g = (u + k(g)/B) mod 1 with one u a step and k(g) = a g mod B, a coprime to B and new at each step, so that time
    is not tied to a row's place in the batch. Raises ValueError for a row outside the batch.
    """
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}")
    rows_G = np.arange(global_batch_size) if rows is None else np.asarray(rows, dtype=np.int64)
    if rows_G.size and not (rows_G.min() >= 0 and rows_G.max() < global_batch_size):
        raise ValueError(f"rows must lie in [0, {global_batch_size}), got {rows_G.min()} to {rows_G.max()}")
    w0, w1, w2, _ = philox(seed, *counter_of(step), 0, Stream.TIME)
    stratum_G = _coprime(int(w2), global_batch_size) * rows_G % global_batch_size
    return wrap_time(uniform53(w0, w1) + stratum_G / global_batch_size)


def _coprime(word: int, size: int) -> int:
    """The first number from word mod size on that is coprime to `size`, modulo `size`."""
    a = word % size
    while math.gcd(a, size) != 1:
        a += 1
    return a % size

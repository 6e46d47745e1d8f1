"""The random numbers of sampling: a pure function of (seed; request, sample, step, position)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlm_scale.diffusion.rng import Stream, philox, uniform53


@dataclass(frozen=True)
class Noise:
    """The uniforms of a batch: key from (seed, SAMPLE), counter = (request hash, sample, step, position)."""

    key: int
    request_hash_B: np.ndarray
    sample_B: np.ndarray

    def uniforms(self, row_N: Tensor, step_N: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Two independent float64 uniforms in [0, 1) for each place: one for the token, one for times and orders."""
        row, step, position = (index.cpu().numpy() for index in (row_N, step_N, position_N))
        words = philox(self.key, self.request_hash_B[row], self.sample_B[row], step, position)
        pairs = uniform53(words[0], words[1]), uniform53(words[2], words[3])
        return tuple(torch.from_numpy(uniform).to(row_N.device) for uniform in pairs)


def make_noise(seed: int, request_hashes: Sequence[int], sample_indices: Sequence[int]) -> Noise:
    """The random numbers of a batch of (request, sample) pairs under one 64-bit sampling seed."""
    low, high, _, _ = philox(seed, 0, 0, 0, int(Stream.SAMPLE))
    hashes, samples = (np.asarray(column, dtype=np.int64) for column in (request_hashes, sample_indices))
    return Noise(int(low) | int(high) << 32, hashes, samples)

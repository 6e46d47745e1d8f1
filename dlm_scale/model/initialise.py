"""Initial weights as a pure function of (seed, tensor name, logical index).

A rank makes exactly the slice that it holds, so a seed alone gives the same model at every parallel layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dlm_scale.diffusion.rng import Stream, standard_normal, tensor_key
from dlm_scale.model.parameters import ParameterSpec
from dlm_scale.model.sharding import Box, contiguous_runs

CHUNK_ELEMENTS = 1 << 22


def initial_values(spec: ParameterSpec, seed: int, box: Box, flat_start: int, numel: int) -> np.ndarray:
    """Elements [flat_start, flat_start + numel) of the flattened box, float32."""
    if spec.init_std == 0.0:
        return np.full(numel, spec.init_value, dtype=np.float32)
    values = np.empty(numel, dtype=np.float32)
    key, done = tensor_key(seed, spec.name), 0
    for first, count in _clipped_runs(spec.view, box, flat_start, numel):
        values[done : done + count] = standard_normal(key, first, count, Stream.INIT)
        done += count
    values *= np.float32(spec.init_std)
    return values


def _clipped_runs(view, box, flat_start: int, numel: int) -> Iterator[tuple[int, int]]:
    """The runs of a flat range of the box, cut into chunks that bound the memory of the generator."""
    offset, stop = 0, flat_start + numel
    for first, length in contiguous_runs(view, box):
        low, high = max(flat_start, offset), min(stop, offset + length)
        for start in range(low, high, CHUNK_ELEMENTS):
            yield first + start - offset, min(CHUNK_ELEMENTS, high - start)
        offset += length
        if offset >= stop:
            return

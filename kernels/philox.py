"""Philox4x32-10 in torch, bit for bit what `tl.philox` gives in a kernel; and the streams that kernels draw from.

The counter is (global sample index low, high, column, stream), the key is the run's seed: noise is a function of where
a token stands in the data, never of ranks, batches or devices.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch

MASK_STREAM = 0
REPLACEMENT_STREAM = 1  # reserved: ids that the edit stage substitutes
EDIT_STREAM = 4  # reserved: what the edit stage does at a position

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def signed_key(seed: int) -> int:
    """The 64-bit key as a signed integer, which is how a kernel takes it. Raises ValueError outside [0, 2**64)."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"a Philox key is an integer in [0, 2**64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def philox_ref(seed: int, c0, c1, c2, c3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four int64 tensors that hold the 32-bit words of (key `seed`; counter c0, c1, c2, c3), which broadcast."""
    words = [torch.as_tensor(c, dtype=torch.int64) & _LOW for c in (c0, c1, c2, c3)]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        (high0, low0), (high2, low2) = _multiply(_MULTIPLIERS[0], c0), _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0, c1, c2, c3


def _multiply(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32-bit product; in two halves, because int64 cannot hold it."""
    low = (x & 0xFFFF) * a
    middle = (x >> 16) * a + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF

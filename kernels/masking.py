"""The forward process on the device: clean ids and mask ratios to noised ids, the list of masked positions, weights.

Shapes: B rows, L positions, S segments, N masked positions of the flattened batch. A segment is what shares one mask
ratio: a row, or a document packed into one. The decision is an integer compare of 24 random bits with
ceil(m * 2**24), exact at m = 0 and m = 1, so every implementation draws the same masks on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .philox import MASK_STREAM, philox_ref


class Noise(NamedTuple):
    """What is drawn, and what a masked token weighs.

    mask_ratio_S float64 in [0, 1]; rate_S float32, the weight of each masked token of a segment, or None for
    (number of maskable + 1) / (number of masked), the weighting by realised count; seed: the 64-bit key.
    """

    mask_ratio_S: torch.Tensor
    rate_S: torch.Tensor | None
    seed: int
    stream: int = MASK_STREAM


class Masked(NamedTuple):
    """A noised batch. xt_BL int64; is_masked_BL bool; num_masked_S and num_maskable_S int32. Ascending lists of the
    masked positions: rows_N int64 flat indices, target_N int64 clean ids, weight_N float32."""

    xt_BL: torch.Tensor
    is_masked_BL: torch.Tensor
    num_masked_S: torch.Tensor
    num_maskable_S: torch.Tensor
    rows_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor


def threshold_S(mask_ratio_S: torch.Tensor) -> torch.Tensor:
    """int32: a position is masked where its 24 random bits are below this."""
    return torch.ceil(mask_ratio_S.double() * 2**24).to(torch.int32)


def row_bounds(num_rows: int, length: int, device) -> torch.Tensor:
    """int32 [B+1]: the segment bounds where every row is one segment."""
    return torch.arange(num_rows + 1, dtype=torch.int32, device=device) * length


def check_masking(x0_BL, sample_index_B, noise: Noise, cu_seqlens, maskable_BL) -> None:
    """Raises ValueError for shapes or types that do not fit; reads no values, so it never waits for the device."""
    num_segments = x0_BL.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if x0_BL.dtype != torch.int64 or x0_BL.ndim != 2 or x0_BL.numel() >= 2**31:
        raise ValueError(f"clean ids must be int64 [B, L] with B * L < 2**31, got {x0_BL.dtype} {tuple(x0_BL.shape)}")
    if sample_index_B.dtype != torch.int64 or sample_index_B.shape != x0_BL.shape[:1]:
        raise ValueError(f"sample indices must be int64 [B], got {sample_index_B.dtype} {tuple(sample_index_B.shape)}")
    for name, values in (("mask ratio", noise.mask_ratio_S), ("rate", noise.rate_S)):
        if values is not None and values.shape != (num_segments,):
            raise ValueError(f"each of {num_segments} segments needs one {name}, got {tuple(values.shape)}")
    if maskable_BL is not None and (maskable_BL.shape != x0_BL.shape or maskable_BL.dtype != torch.bool):
        raise ValueError(f"maskable_BL must be bool [B, L], got {maskable_BL.dtype} {tuple(maskable_BL.shape)}")


def mask_tokens_ref(
    x0_BL, sample_index_B, noise: Noise, *, mask_id: int, cu_seqlens=None, maskable_BL=None
) -> Masked:
    """Mask each maskable position of x0_BL on its own, with its segment's probability.

    sample_index_B int64: global sample indices. cu_seqlens int32 [S+1]: bounds of the segments in the flattened
    batch, every row boundary among them; None: the rows. maskable_BL: bool; the rest (padding of a shorter row,
    prompts) is never masked. Raises ValueError for shapes or types that do not fit.
    """
    check_masking(x0_BL, sample_index_B, noise, cu_seqlens, maskable_BL)
    cu_seqlens = row_bounds(*x0_BL.shape, x0_BL.device) if cu_seqlens is None else cu_seqlens
    flat_BL = torch.arange(x0_BL.numel(), device=x0_BL.device, dtype=torch.int32).view(x0_BL.shape)
    segment_BL = torch.bucketize(flat_BL, cu_seqlens[1:], right=True)
    low_B1, high_B1 = sample_index_B[:, None], sample_index_B[:, None] >> 32
    column_L = torch.arange(x0_BL.shape[1], device=x0_BL.device)
    word_BL = philox_ref(noise.seed, low_B1, high_B1, column_L, noise.stream)[0]
    is_masked_BL = (word_BL >> 8) < threshold_S(noise.mask_ratio_S)[segment_BL]
    maskable_BL = torch.ones_like(is_masked_BL) if maskable_BL is None else maskable_BL
    is_masked_BL &= maskable_BL
    masked_S, maskable_S = (_count(segment_BL[x], cu_seqlens.numel() - 1) for x in (is_masked_BL, maskable_BL))
    rate_S = (maskable_S + 1) / masked_S if noise.rate_S is None else noise.rate_S
    rows_N = is_masked_BL.flatten().nonzero()[:, 0]
    return Masked(
        xt_BL=torch.where(is_masked_BL, mask_id, x0_BL),
        is_masked_BL=is_masked_BL,
        num_masked_S=masked_S,
        num_maskable_S=maskable_S,
        rows_N=rows_N,
        target_N=x0_BL.flatten()[rows_N],
        weight_N=rate_S.float()[segment_BL.flatten()[rows_N]],
    )


def _count(segment_N: torch.Tensor, num_segments: int) -> torch.Tensor:
    return torch.bincount(segment_N, minlength=num_segments).to(torch.int32)

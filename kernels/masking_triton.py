"""`mask_tokens_ref` as one Triton launch.

One program a segment: draw and count, publish the count, wait for the counts of the segments before it, write the
segment's part of the ascending lists. A program takes its segment by ticket, so the ones it waits for have started:
they publish before they wait, whatever order the device runs programs in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .masking import Masked, Noise, check_masking, mask_tokens_ref, row_bounds, threshold_S
from .philox import signed_key

BLOCK = 1024
WAIT_BLOCK = 128


@triton.jit
def _counts_before(published, segment, BLOCK: tl.constexpr):
    """Masked positions of all segments before this one; a slot holds 0 until its program has published."""
    before = 0
    for first in range(0, segment, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        count = tl.load(published + slot, mask=slot < segment, other=1, volatile=True)
        while tl.min(count, 0) == 0:
            count = tl.load(published + slot, mask=slot < segment, other=1, volatile=True)
        before += tl.sum(count - 1, 0)
    return before


@triton.jit(do_not_specialize=["mask_id", "seed", "stream"])
def mask_kernel(
    x0, maskable, sample_index, threshold, rate, cu_seqlens, scratch,
    xt, is_masked, num_masked, num_maskable, rows, target, weight,
    length, mask_id, seed, stream,
    HAS_MASKABLE: tl.constexpr, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr, WAIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """All tensors as in mask_tokens_ref, flat; scratch int32 [1 + S], zero: the ticket, then the published counts."""
    segment = tl.atomic_add(scratch, 1)
    start = tl.load(cu_seqlens + segment)
    stop = tl.load(cu_seqlens + segment + 1)
    sample = tl.load(sample_index + start // length)
    row_start = start // length * length
    bound = tl.load(threshold + segment)
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    masked, possible = 0, 0
    for first in range(start, stop, BLOCK):
        flat = first + tl.arange(0, BLOCK)
        inside = flat < stop
        column = (flat - row_start).to(tl.uint32)
        zero = column * 0
        word, _, _, _ = tl.philox(seed, zero + low, zero + high, column, zero + stream.to(tl.uint32))
        may = inside
        if HAS_MASKABLE:
            may = may & (tl.load(maskable + flat, mask=inside, other=0) != 0)
        hit = ((word >> 8).to(tl.int32) < bound) & may
        clean = tl.load(x0 + flat, mask=inside, other=0)
        tl.store(xt + flat, tl.where(hit, mask_id, clean), mask=inside)
        tl.store(is_masked + flat, hit.to(tl.int8), mask=inside)
        masked += tl.sum(hit.to(tl.int32), 0)
        possible += tl.sum(may.to(tl.int32), 0)
    tl.atomic_xchg(scratch + 1 + segment, masked + 1)
    tl.store(num_masked + segment, masked)
    tl.store(num_maskable + segment, possible)
    place = _counts_before(scratch + 1, segment, WAIT_BLOCK)
    if BY_COUNT:
        share = tl.div_rn((possible + 1).to(tl.float32), tl.maximum(masked, 1).to(tl.float32))
    else:
        share = tl.load(rate + segment)
    tl.debug_barrier()  # is_masked was written by other threads of this program
    for first in range(start, stop, BLOCK):
        flat = first + tl.arange(0, BLOCK)
        hit = tl.load(is_masked + flat, mask=flat < stop, other=0).to(tl.int32)
        slot = place + tl.cumsum(hit, 0) - hit
        tl.store(rows + slot, flat.to(tl.int64), mask=hit != 0)
        tl.store(target + slot, tl.load(x0 + flat, mask=hit != 0, other=0), mask=hit != 0)
        tl.store(weight + slot, tl.zeros_like(hit).to(tl.float32) + share, mask=hit != 0)
        place += tl.sum(hit, 0)


def mask_tokens(
    x0_BL, sample_index_B, noise: Noise, *, mask_id: int, cu_seqlens=None, maskable_BL=None, num_rows: int | None = None
) -> Masked:
    """`mask_tokens_ref`, the same bits. With `num_rows` (the number of masked positions, known from the host's own
    draw, or any bound above it) nothing waits for the device; entries past the last are row 0 with weight 0."""
    check_masking(x0_BL, sample_index_B, noise, cu_seqlens, maskable_BL)
    device, num_segments = x0_BL.device, noise.mask_ratio_S.numel()
    x0_BL = x0_BL.contiguous()
    out = Masked(
        xt_BL=torch.empty_like(x0_BL),
        is_masked_BL=torch.empty(x0_BL.shape, dtype=torch.bool, device=device),
        num_masked_S=torch.empty(num_segments, dtype=torch.int32, device=device),
        num_maskable_S=torch.empty(num_segments, dtype=torch.int32, device=device),
        rows_N=torch.zeros(x0_BL.numel(), dtype=torch.int64, device=device),
        target_N=torch.zeros(x0_BL.numel(), dtype=torch.int64, device=device),
        weight_N=torch.zeros(x0_BL.numel(), dtype=torch.float32, device=device),
    )
    bound_S = threshold_S(noise.mask_ratio_S).to(device)
    has_maskable, by_count = maskable_BL is not None, noise.rate_S is None
    mask_kernel[(num_segments,)](
        x0_BL,
        maskable_BL.contiguous().view(torch.int8) if has_maskable else out.is_masked_BL.view(torch.int8),
        sample_index_B.to(device),
        bound_S,
        bound_S if by_count else noise.rate_S.to(device),
        row_bounds(*x0_BL.shape, device) if cu_seqlens is None else cu_seqlens.to(device),
        torch.zeros(1 + num_segments, dtype=torch.int32, device=device),
        out.xt_BL,
        out.is_masked_BL.view(torch.int8),
        *out[2:],
        x0_BL.shape[1],
        mask_id,
        signed_key(noise.seed),
        noise.stream,
        HAS_MASKABLE=has_maskable,
        BY_COUNT=by_count,
        BLOCK=BLOCK,
        WAIT_BLOCK=WAIT_BLOCK,
    )
    num_rows = int(out.num_masked_S.sum()) if num_rows is None else num_rows
    return out._replace(**{name: getattr(out, name)[:num_rows] for name in ("rows_N", "target_N", "weight_N")})


def self_check(device: str) -> float:
    """0.0 if a small case gives the reference's bits, else 1.0."""
    x0_BL = torch.arange(3 * 1500, device=device).view(3, 1500)
    noise = Noise(torch.tensor([0.0, 0.3, 1.0], device=device), None, seed=2**63 + 1)
    index_B = torch.tensor([0, 7, 2**33], device=device)
    found, wanted = (fn(x0_BL, index_B, noise, mask_id=-1) for fn in (mask_tokens, mask_tokens_ref))
    return float(not all(torch.equal(a, b) for a, b in zip(found, wanted)))

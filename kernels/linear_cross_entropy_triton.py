"""Triton implementations for kernels/linear_cross_entropy.py, which specifies them.

Training: the matmuls stay torch's (cuBLAS); one kernel turns a chunk of logits into its gradients in place, reading it
from memory once where no process group has to be asked in between. Scoring: one kernel is the matmul and its
reduction, so that no logits exist at all.

Legend as there; T tiles of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .linear_cross_entropy import (
    LOWEST,
    CrossEntropy,
    Job,
    LossTerms,
    Scores,
    Statistics,
    join_scores,
    linear_cross_entropy_by,
    linear_cross_entropy_ref,
    linear_scores_ref,
    reduce_statistics,
)

ROW_BLOCK = 4096  # columns a program holds at a time
ROW_OPTIONS = {"num_warps": 8}
TILE = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "GROUP": 8}
TILE_OPTIONS = {"num_warps": 8, "num_stages": 3}
FLOAT32_TILE = {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "GROUP": 8}
INTERPRETED_TILE = {"BLOCK_N": 16, "BLOCK_V": 64, "BLOCK_D": 16, "GROUP": 2}
JOIN_ROWS = 128
IS_INTERPRETED = triton.knobs.runtime.interpret  # bfloat16 is then multiplied as integers, so tl.dot needs float32


@triton.jit
def _tanh(x):
    """No libdevice, so that the interpreter has it too; the exponent is never positive, so nothing overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def _capped(x, softcap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        return softcap * _tanh(x / softcap)
    return x


@triton.jit
def _logits(pointer, bias, column, inside, softcap, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(capped logits before the bias, logits); -inf outside the row."""
    capped = _capped(tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32), softcap, HAS_CAP)
    z = capped
    if HAS_BIAS:
        z = z + tl.load(bias + column, mask=inside, other=0.0)
    return capped, tl.where(inside, z, float("-inf"))


@triton.jit
def chunk_kernel(
    logits, bias, target, weight, statistics,
    num_rows, num_columns, stride, softcap, z_loss, smoothing, share, lowest,
    REDUCE: tl.constexpr, GRADIENT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row. statistics float32 [4, num_rows]: REDUCE writes (best, sum of exp(z - best), picked, total);
    GRADIENT without REDUCE reads the log-sum-exp from its first row. GRADIENT overwrites the logits."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    column_of_target = tl.load(target + row)
    if REDUCE:
        best, exp_sum, total = lowest, 0.0, 0.0
        for first in range(0, num_columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            _, z = _logits(logits, bias, column, column < num_columns, softcap, HAS_CAP, HAS_BIAS)
            new_best = tl.maximum(best, tl.max(z, 0))
            exp_sum = exp_sum * tl.exp(best - new_best) + tl.sum(tl.exp(z - new_best), 0)
            best = new_best
            if HAS_SHARE:
                total += tl.sum(tl.where(z == float("-inf"), 0.0, z), 0)
        is_here = (column_of_target >= 0) & (column_of_target < num_columns)
        _, picked = _logits(logits, bias, tl.where(is_here, column_of_target, 0), is_here, softcap, HAS_CAP, HAS_BIAS)
        tl.store(statistics + row, best)
        tl.store(statistics + num_rows + row, exp_sum)
        tl.store(statistics + 2 * num_rows + row, tl.where(is_here, picked, 0.0))
        tl.store(statistics + 3 * num_rows + row, total)
        lse = best + tl.log(exp_sum)
    else:
        lse = tl.load(statistics + row)
    if GRADIENT:
        tl.debug_barrier()  # the target's logit has been read by every thread before one overwrites it
        row_weight = tl.load(weight + row)
        pull = tl.where(row_weight == 0.0, 0.0, 2.0 * z_loss * lse)
        for first in range(0, num_columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < num_columns
            capped, z = _logits(logits, bias, column, inside, softcap, HAS_CAP, HAS_BIAS)
            probability = tl.exp(z - lse)
            gradient = probability - tl.where(column == column_of_target, 1.0 - smoothing, 0.0)
            if HAS_SHARE:
                gradient -= tl.where(z == float("-inf"), 0.0, share)
            gradient = gradient * row_weight + probability * pull
            if HAS_CAP:
                gradient *= 1.0 - (capped / softcap) * (capped / softcap)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)


def chunk_triton(logits_CV: torch.Tensor, target_C: torch.Tensor, weight_C: torch.Tensor, job: Job) -> Statistics:
    """`chunk_ref` by kernels."""
    num_rows, num_columns = logits_CV.shape
    statistics_4C = torch.empty(4, num_rows, dtype=torch.float32, device=logits_CV.device)
    softcap, z_loss, smoothing = job.terms

    def launch(reduce: bool, gradient: bool) -> None:
        chunk_kernel[(num_rows,)](
            logits_CV, weight_C if job.bias_V is None else job.bias_V, target_C, weight_C, statistics_4C,
            num_rows, num_columns, logits_CV.stride(0), softcap or 0.0, z_loss, smoothing, job.share, LOWEST,
            REDUCE=reduce, GRADIENT=gradient, HAS_CAP=softcap is not None, HAS_BIAS=job.bias_V is not None,
            HAS_SHARE=job.share != 0, BLOCK=min(ROW_BLOCK, triton.next_power_of_2(num_columns)), **ROW_OPTIONS,
        )  # fmt: skip

    if job.group is None:
        launch(reduce=True, gradient=job.needs_grad)
        return reduce_statistics(*statistics_4C, None)
    launch(reduce=True, gradient=False)
    found = reduce_statistics(*statistics_4C, job.group)
    if job.needs_grad:
        statistics_4C[0] = found.lse_C
        launch(reduce=False, gradient=True)
    return found


def linear_cross_entropy(
    hidden_ND, weight_VD, target_N, weight_N, bias_V=None, vocab_start=0, group=None, terms: LossTerms = LossTerms()
) -> CrossEntropy:
    """`linear_cross_entropy_ref` by kernels; hidden and weight in float32, bfloat16 or float16."""
    return linear_cross_entropy_by(
        chunk_triton, hidden_ND, weight_VD, target_N, weight_N, bias_V, vocab_start, group, terms
    )


@triton.jit
def scores_kernel(
    hidden, table, bias, picked_column, tile_best, tile_sum, tile_column, picked,
    num_rows, num_columns, width, hidden_stride, table_stride, softcap,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, AS_FLOAT32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK_N rows x BLOCK_V columns: tile_* [T, num_rows] get its best logit, sum of
    exp(z - best) and best column; picked [num_rows] the wanted logit if it lies in the tile."""
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_N), tl.cdiv(num_columns, BLOCK_V)
    group_first = program // (GROUP * column_tiles) * GROUP  # GROUP row tiles go together: the table's tile is reused
    group_size = tl.minimum(row_tiles - group_first, GROUP)
    row_tile = group_first + program % (GROUP * column_tiles) % group_size
    column_tile = program % (GROUP * column_tiles) // group_size
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    left = hidden + row[:, None].to(tl.int64) * hidden_stride + d[None, :]
    right = table + column[None, :].to(tl.int64) * table_stride + d[:, None]
    for first in range(0, width, BLOCK_D):
        a = tl.load(left, mask=(row[:, None] < num_rows) & (first + d[None, :] < width), other=0.0)
        b = tl.load(right, mask=(column[None, :] < num_columns) & (first + d[:, None] < width), other=0.0)
        if AS_FLOAT32:
            z = tl.dot(a.to(tl.float32), b.to(tl.float32), z, input_precision="ieee")
        else:
            z = tl.dot(a, b, z)
        left += BLOCK_D
        right += BLOCK_D
    z = _capped(z, softcap, HAS_CAP)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=column < num_columns, other=0.0)[None, :]
    z = tl.where(column[None, :] < num_columns, z, float("-inf"))
    best = tl.max(z, 1)
    shift = tl.where(best == float("-inf"), 0.0, best)
    first_best = tl.min(tl.where(z == best[:, None], column[None, :], num_columns), 1)
    slot = column_tile.to(tl.int64) * num_rows + row
    tl.store(tile_best + slot, best, mask=row < num_rows)
    tl.store(tile_sum + slot, tl.sum(tl.exp(z - shift[:, None]), 1), mask=row < num_rows)
    tl.store(tile_column + slot, first_best, mask=row < num_rows)
    wanted = tl.load(picked_column + row, mask=row < num_rows, other=-1)
    is_here = (wanted >= column_tile * BLOCK_V) & (wanted < tl.minimum(num_columns, (column_tile + 1) * BLOCK_V))
    value = tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
    tl.store(picked + row, value, mask=(row < num_rows) & is_here)


@triton.jit
def join_kernel(
    tile_best, tile_sum, tile_column, best_out, sum_out, column_out, num_rows, num_tiles, lowest, BLOCK: tl.constexpr
):
    """Join the tiles of BLOCK rows, in their order: the first of equal logits wins."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    best = tl.full((BLOCK,), lowest, tl.float32)
    exp_sum = tl.zeros((BLOCK,), tl.float32)
    column = tl.zeros((BLOCK,), tl.int32)
    slot = row.to(tl.int64)
    for _ in range(0, num_tiles):
        other = tl.load(tile_best + slot, mask=inside, other=0.0)
        column = tl.where(other > best, tl.load(tile_column + slot, mask=inside, other=0), column)
        new_best = tl.maximum(best, other)
        other_sum = tl.load(tile_sum + slot, mask=inside, other=0.0)
        exp_sum = exp_sum * tl.exp(best - new_best) + other_sum * tl.exp(other - new_best)
        best = new_best
        slot += num_rows
    tl.store(best_out + row, best, mask=inside)
    tl.store(sum_out + row, exp_sum, mask=inside)
    tl.store(column_out + row, column.to(tl.int64), mask=inside)


def tile_of(is_float32: bool) -> dict[str, int]:
    """The tile of scores_kernel; without matrix instructions the large one would not fit into the registers."""
    return INTERPRETED_TILE if IS_INTERPRETED else FLOAT32_TILE if is_float32 else TILE


@torch.no_grad()
def linear_scores(
    hidden_ND, weight_VD, picked_id_N, bias_V=None, vocab_start=0, group=None, softcap: float | None = None
) -> Scores:
    """`linear_scores_ref` by kernels: beside the outputs, 12 bytes a row and tile of 128 columns."""
    hidden_ND, table_VD = hidden_ND.contiguous(), weight_VD.to(hidden_ND.dtype).contiguous()
    num_rows, num_columns = len(hidden_ND), len(table_VD)
    tile = tile_of(hidden_ND.dtype == torch.float32)
    num_tiles = triton.cdiv(num_columns, tile["BLOCK_V"])
    tiles = [
        torch.empty(num_tiles, num_rows, dtype=dtype, device=hidden_ND.device)
        for dtype in (torch.float32, torch.float32, torch.int32)
    ]
    picked_N, best_N, sum_N = torch.zeros(3, num_rows, dtype=torch.float32, device=hidden_ND.device)
    column_N = torch.zeros(num_rows, dtype=torch.int64, device=hidden_ND.device)
    if num_rows:
        scores_kernel[(triton.cdiv(num_rows, tile["BLOCK_N"]) * num_tiles,)](
            hidden_ND, table_VD, picked_N if bias_V is None else bias_V, picked_id_N - vocab_start, *tiles, picked_N,
            num_rows, num_columns, hidden_ND.shape[1], hidden_ND.stride(0), table_VD.stride(0), softcap or 0.0,
            HAS_CAP=softcap is not None, HAS_BIAS=bias_V is not None,
            AS_FLOAT32=IS_INTERPRETED or hidden_ND.dtype == torch.float32, **tile, **TILE_OPTIONS,
        )  # fmt: skip
        join_kernel[(triton.cdiv(num_rows, JOIN_ROWS),)](
            *tiles, best_N, sum_N, column_N, num_rows, num_tiles, LOWEST, BLOCK=JOIN_ROWS
        )
    return join_scores(best_N, sum_N, column_N + vocab_start, picked_N, group)


def self_check(device: str) -> float:
    """Largest difference from the reference, relative, on a small case: loss, gradients and scores in float32."""
    generator = torch.Generator(device).manual_seed(0)
    hidden_ND = torch.randn(50, 32, device=device, generator=generator, requires_grad=True)
    weight_VD = torch.randn(1003, 32, device=device, generator=generator, requires_grad=True)
    target_N = torch.randint(0, 1000, (50,), device=device, generator=generator)
    weight_N = torch.rand(50, device=device, generator=generator)
    bias_V = torch.zeros(1003, device=device)
    bias_V[1000:] = -torch.inf
    results = []
    for loss_fn, scores_fn in ((linear_cross_entropy, linear_scores), (linear_cross_entropy_ref, linear_scores_ref)):
        out = loss_fn(hidden_ND, weight_VD, target_N, weight_N, bias_V, terms=LossTerms(30.0, 1e-4, 0.1))
        scores = scores_fn(hidden_ND, weight_VD, target_N, bias_V, softcap=30.0)
        gradients = torch.autograd.grad(out.loss_sum, (hidden_ND, weight_VD))
        results.append([out.loss_sum, out.lse_N, *gradients, scores.lse_N, scores.best_N, scores.picked_N])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results))

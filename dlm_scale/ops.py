"""The one choice point per op: which implementation runs, and why.

Shapes: B rows, L positions, H heads, G key/value heads, E head width; N selected rows, D width, V local vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F


@dataclass(frozen=True)
class Full:
    """Every position sees every position."""


@dataclass(frozen=True)
class Causal:
    """Position i sees positions 0..i (the autoregressive twin, annealing)."""


@dataclass(frozen=True)
class Segments:
    """Documents packed into the rows; a position sees its own document only, and positions restart in each.

    `cu_seqlens` int32 [S+1]: ascending bounds of the segments in the flattened batch, from 0 to B*L; every row
    boundary is one of them.
    """

    cu_seqlens: torch.Tensor

    def ids_BL(self, num_rows: int, length: int) -> torch.Tensor:
        """Number of the segment that each position belongs to, int64."""
        flat = torch.arange(num_rows * length, device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.bucketize(flat, self.cu_seqlens[1:], right=True).view(num_rows, length)


@dataclass(frozen=True)
class Blocks:
    """Block-causal: a position sees its own block of `size` positions and all earlier blocks."""

    size: int


AttentionMask = Full | Causal | Segments | Blocks


def allowed_BLL(mask: AttentionMask, num_rows: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Boolean [B or 1, L, L], True where query (dim 1) may see key (dim 2); None stands for all."""
    if isinstance(mask, Full):
        return None
    if isinstance(mask, Segments):
        ids_BL = mask.ids_BL(num_rows, length)
        return ids_BL[:, :, None] == ids_BL[:, None, :]
    position = torch.arange(length, device=device)
    block = position if isinstance(mask, Causal) else position // mask.size
    return (block[:, None] >= block[None, :])[None]


def attention(q_BLHE: torch.Tensor, k_BLGE: torch.Tensor, v_BLGE: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """Softmax attention [B,L,H,E] by torch's scaled_dot_product_attention; G divides H (grouped queries)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BLGE, v_BLGE))
    allowed = None if isinstance(mask, Causal) else allowed_BLL(mask, q.shape[0], q.shape[2], q.device)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if allowed is None else allowed[:, None],
        is_causal=isinstance(mask, Causal),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def positions_BL(mask: AttentionMask, num_rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Position ids [1 or B, L] int64; they restart at each packed document."""
    position_L = torch.arange(length, device=device)
    if not isinstance(mask, Segments):
        return position_L[None]
    flat_BL = torch.arange(num_rows * length, device=device).view(num_rows, length)
    return flat_BL - mask.cu_seqlens[mask.ids_BL(num_rows, length)].long()


CHUNK_BYTES = 32 << 20  # of float32 logits at a time on CPU: they stay in the last-level cache's reach
GPU_CHUNK_ROWS = 8192


def _chunk_rows(num_columns: int, device: torch.device) -> int:
    return GPU_CHUNK_ROWS if device.type == "cuda" else max(16, CHUNK_BYTES // (4 * num_columns))


def _chunk_statistics(logits_NV, target_N, vocab_start: int, group):
    """Log-sum-exp, target logit and best column over the whole (possibly sharded) vocabulary, each [N]."""
    local_N = target_N - vocab_start
    inside_N = (local_N >= 0) & (local_N < logits_NV.shape[1])
    picked_N = logits_NV.gather(1, local_N.clamp(0, logits_NV.shape[1] - 1)[:, None])[:, 0]
    picked_N = torch.where(inside_N, picked_N, 0.0)
    best_N = logits_NV.amax(dim=1)
    if group is None:
        return torch.logsumexp(logits_NV, dim=1), picked_N, best_N
    top_N = best_N.clone()
    dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(logits_NV - top_N[:, None]).exp().sum(dim=1), picked_N])
    dist.all_reduce(sums, group=group)
    return top_N + sums[0].log(), sums[1], top_N


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, so that no [N,V] tensor outlives its chunk."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, weight_N, bias_V, vocab_start, group):
        num_rows = hidden_ND.shape[0]
        ce_N = hidden_ND.new_empty(num_rows, dtype=torch.float32)
        correct_N = torch.empty(num_rows, dtype=torch.bool, device=hidden_ND.device)
        needs_grad = any(ctx.needs_input_grad[:2])
        dhidden_ND = torch.empty_like(hidden_ND) if needs_grad else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        for start in range(0, num_rows, chunk := _chunk_rows(weight_VD.shape[0], hidden_ND.device)):
            rows = slice(start, start + chunk)
            logits_NV = F.linear(hidden_ND[rows], weight_VD).float()
            if bias_V is not None:
                logits_NV += bias_V
            lse_N, picked_N, best_N = _chunk_statistics(logits_NV, target_N[rows], vocab_start, group)
            ce_N[rows] = lse_N - picked_N
            correct_N[rows] = picked_N >= best_N
            if needs_grad:
                dlogits_NV = _logit_gradient(logits_NV, lse_N, target_N[rows], weight_N[rows], vocab_start)
                dlogits_NV = dlogits_NV.to(hidden_ND.dtype)
                dhidden_ND[rows] = dlogits_NV @ weight_VD
                dweight_VD += (dlogits_NV.t() @ hidden_ND[rows]).float()
        if needs_grad and group is not None:
            dist.all_reduce(dhidden_ND, group=group)
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(ce_N, correct_N)
        return (ce_N * weight_N).sum(), ce_N, correct_N

    @staticmethod
    def backward(ctx, dloss, _dce, _dcorrect):
        dhidden_ND, dweight_VD = ctx.saved_tensors
        return (dhidden_ND * dloss).to(dhidden_ND.dtype), (dweight_VD * dloss).to(ctx.weight_dtype), *[None] * 5


def _logit_gradient(logits_NV, lse_N, target_N, weight_N, vocab_start):
    """weight * (softmax - onehot), written over the logits."""
    grad_NV = logits_NV.sub_(lse_N[:, None]).exp_()
    local_N = target_N - vocab_start
    inside_N = ((local_N >= 0) & (local_N < grad_NV.shape[1])).float()
    column_N1 = local_N.clamp(0, grad_NV.shape[1] - 1)[:, None]
    grad_NV.scatter_add_(1, column_N1, -inside_N[:, None])
    return grad_NV.mul_(weight_N[:, None])


def linear_cross_entropy(hidden_ND, weight_VD, target_N, weight_N, bias_V=None, vocab_start=0, group=None):
    """Weighted cross-entropy of the vocabulary projection, on selected rows only.

    hidden [N,D], weight [V,D] (this rank's rows of the table, from `vocab_start`), target [N] int64 ids, weight_N [N]
    float32, bias [V] float32 added to the logits (-inf suppresses an id). `group` shards the vocabulary.

    Returns (sum of weight*ce, float32 scalar connected to the graph also at N = 0; ce [N] float32, detached;
    is_correct [N] bool).
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N, weight_N, bias_V, vocab_start, group)


def linear_logits(hidden_ND, weight_VD, bias_V=None, group=None) -> torch.Tensor:
    """Float32 logits [N, V of the whole table] of selected rows, gathered over `group`."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    if group is None:
        return logits_NV
    parts = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits_NV.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def chosen_backends() -> dict[str, str]:
    """What each op runs here, and why: for `dlm doctor`."""
    where = "CUDA" if torch.cuda.is_available() else "CPU"
    return {
        "attention": f"sdpa: torch.nn.functional.scaled_dot_product_attention on {where}",
        "linear_cross_entropy": f"reference: chunked torch on {where}, masked rows only, gradients in the forward pass",
        "masking": "numpy Philox on the host",
    }

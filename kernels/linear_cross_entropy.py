"""Weighted cross-entropy of a vocabulary projection, on selected rows only: the specification, in torch.

Legend: N selected rows, C rows of a chunk, D width, V this rank's columns of the vocabulary, K allowed ids of the whole
one. No [N, V] tensor exists: logits are made chunk by chunk, and the gradients of hidden states and table are made from
a chunk while it is there, in the forward pass. Autograd holds only [N, D] and [V, D].

With z the logits (softcap * tanh(x / softcap), then the bias), a row's loss is its weight times

    (1 - label_smoothing) (lse - z_target) + label_smoothing (lse - mean of the allowed z)

and each row of a weight that is not 0 adds z_loss lse**2, whatever the weight: it holds the logits in place and is no
part of the likelihood, so the weights of time, which may be large, do not act on it.

Sources: z-loss: PaLM (arXiv 2204.02311); softcap: Gemma 2 (2408.00118); vocabulary-parallel: Megatron-LM (1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

CHUNK_BYTES = 64 << 20  # of logits at a time on a CPU: the table is read, and its gradient added to, once a chunk
BLOCK_BYTES = 1 << 20  # of float32 logits at a time on a CPU: all passes over them stay in the second-level cache
WIDE_ROWS = 2048  # of the table, whose gradients are made in float32 at a time from 16-bit numbers
GPU_CHUNK_ROWS = 8192
NEGLIGIBLE = 1e-8  # a wrong id of a smaller share is not counted in the largest entropy that there could be
LOWEST = -1e30  # below every logit; finite, so that a shard with no allowed id adds exp(-inf) = 0 and not NaN


class LossTerms(NamedTuple):
    """What is added to plain cross-entropy; see the module's formula."""

    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0


class CrossEntropy(NamedTuple):
    """loss_sum: weighted sum, a scalar in the graph. Side outputs, detached, float32: ce_N = lse - z_target, without
    weights; is_correct_N bool; lse_N, the log-sum-exp of the allowed logits."""

    loss_sum: torch.Tensor
    ce_N: torch.Tensor
    is_correct_N: torch.Tensor
    lse_N: torch.Tensor


class Scores(NamedTuple):
    """Of each row, float32: lse_N; best_N the largest logit, best_id_N int64 its id (the smallest where tied);
    picked_N the logit of a given id. Log-probabilities are best_N - lse_N and picked_N - lse_N."""

    lse_N: torch.Tensor
    best_N: torch.Tensor
    best_id_N: torch.Tensor
    picked_N: torch.Tensor


class Statistics(NamedTuple):
    """Of each row over the whole vocabulary: total is the sum of the allowed logits (label smoothing only, else 0)."""

    lse_C: torch.Tensor
    picked_C: torch.Tensor
    best_C: torch.Tensor
    total_C: torch.Tensor


class Job(NamedTuple):
    """What all chunks of one call share. share: label_smoothing / K."""

    bias_V: torch.Tensor | None
    group: dist.ProcessGroup | None
    terms: LossTerms
    share: float
    needs_grad: bool


ChunkFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Job], Statistics]


def reduce_statistics(best_C, sum_C, picked_C, total_C, group) -> Statistics:
    """Join the shards' statistics; sum_C = sum of exp(z - best_C). Two all-reduces."""
    if group is None:
        return Statistics(best_C + sum_C.log(), picked_C, best_C, total_C)
    top_C = best_C.clone()
    dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([sum_C * (best_C - top_C).exp(), picked_C, total_C])
    dist.all_reduce(sums, group=group)
    return Statistics(top_C + sums[0].log(), sums[1], top_C, sums[2])


def chunk_ref(logits_CV: torch.Tensor, column_C: torch.Tensor, weight_C: torch.Tensor, job: Job) -> Statistics:
    """Statistics of a chunk; its logits are overwritten, if gradients are needed by those of the loss.

    column_C: the target's column in this shard, outside [0, V) if another rank holds it. A chunk of one rank goes by
    blocks that fit the cache; over a group it goes as a whole, so that the all-reduces are few.
    """
    rows = len(logits_CV) if job.group is not None else max(1, BLOCK_BYTES // (4 * logits_CV.shape[1]))
    parts = zip(logits_CV.split(rows), column_C.split(rows), weight_C.split(rows))
    return Statistics(*map(torch.cat, zip(*(_block_ref(*part, job) for part in parts))))


def _block_ref(logits_CV, column_C, weight_C, job: Job) -> Statistics:
    z_CV = logits_CV.to(weight_C.dtype)  # the same memory if it is that already
    slope_CV = _softcap_(z_CV, job.terms.softcap)
    if job.bias_V is not None:
        z_CV += job.bias_V
    is_here_C = (column_C >= 0) & (column_C < z_CV.shape[1])
    column_C1 = column_C.clamp(0, z_CV.shape[1] - 1)[:, None]
    picked_C = torch.where(is_here_C, z_CV.gather(1, column_C1)[:, 0], 0.0)
    total_C = z_CV.masked_fill(z_CV.isneginf(), 0.0).sum(1) if job.share else torch.zeros_like(picked_C)
    best_C = z_CV.amax(1).clamp_(min=LOWEST)
    allowed_CV = ~z_CV.isneginf() if job.share and job.needs_grad else None
    exp_CV = z_CV.sub_(best_C[:, None]).exp_()
    found = reduce_statistics(best_C, exp_CV.sum(1), picked_C, total_C, job.group)
    if job.needs_grad:
        pull_C = 2 * job.terms.z_loss * found.lse_C * (weight_C != 0)
        scale_C = (weight_C + pull_C) * (best_C - found.lse_C).exp()
        grad_CV = exp_CV.mul_(scale_C[:, None])
        if allowed_CV is not None:
            grad_CV -= allowed_CV * (weight_C * job.share)[:, None]
        target_C = weight_C * (job.terms.label_smoothing - 1) * is_here_C
        grad_CV.scatter_add_(1, column_C1, target_C[:, None])
        if slope_CV is not None:
            grad_CV *= slope_CV
        if grad_CV.dtype != logits_CV.dtype:
            logits_CV.copy_(grad_CV)
    return found


def _softcap_(z_CV: torch.Tensor, softcap: float | None) -> torch.Tensor | None:
    """Cap the logits in place; returns the derivative, None for 1 everywhere."""
    if softcap is None:
        return None
    tanh_CV = torch.tanh(z_CV / softcap)
    torch.mul(tanh_CV, softcap, out=z_CV)
    return 1 - tanh_CV.square_()


def _chunk_rows(num_rows: int, logits_row_bytes: int, device: torch.device) -> int:
    """Rows of a chunk: chunks of equal size, so that none is left too small for a good matmul."""
    most = GPU_CHUNK_ROWS if device.type == "cuda" else max(16, CHUNK_BYTES // logits_row_bytes)
    num_chunks = -(-num_rows // most)
    return -(-num_rows // max(1, num_chunks))


def _add_product(total_VD, dlogits_CV, hidden_CD, is_only_chunk: bool):
    """total (None: 0) + dlogits^T hidden; where chunks add up, in float32 at least."""
    left_VC = dlogits_CV.t()
    if hidden_CD.dtype.itemsize > 2 or is_only_chunk:
        return left_VC @ hidden_CD if total_VD is None else total_VD.addmm_(left_VC, hidden_CD)
    if hidden_CD.is_cuda and total_VD is None:
        return torch.mm(left_VC, hidden_CD, out_dtype=torch.float32)
    if hidden_CD.is_cuda:
        return torch.addmm(total_VD, left_VC, hidden_CD, out_dtype=torch.float32, out=total_VD)
    wide_CD = hidden_CD.float()  # a CPU's matmul would round each chunk's product to 16 bits
    total_VD = wide_CD.new_zeros(len(left_VC), wide_CD.shape[1]) if total_VD is None else total_VD
    for total, left in zip(total_VD.split(WIDE_ROWS), left_VC.split(WIDE_ROWS)):
        total.addmm_(left.float(), wide_CD)
    return total_VD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, weight_N, vocab_start: int, chunk_fn: ChunkFn, job: Job):
        num_rows, width = hidden_ND.shape
        job = job._replace(needs_grad=any(ctx.needs_input_grad[:2]))
        table_VD, weight_N = weight_VD.to(hidden_ND.dtype), weight_N.to(_wide(hidden_ND))
        rows = _chunk_rows(num_rows, len(table_VD) * hidden_ND.dtype.itemsize, hidden_ND.device)
        logits_CV = hidden_ND.new_empty(rows, len(table_VD))
        dhidden_ND = torch.empty_like(hidden_ND) if job.needs_grad else None
        dweight_VD, found = None, []
        for start in range(0, num_rows, max(1, rows)):
            part = slice(start, min(start + rows, num_rows))
            chunk_CV = torch.mm(hidden_ND[part], table_VD.t(), out=logits_CV[: part.stop - start])
            found.append(chunk_fn(chunk_CV, target_N[part] - vocab_start, weight_N[part], job))
            if job.needs_grad:
                torch.mm(chunk_CV, table_VD, out=dhidden_ND[part])
                dweight_VD = _add_product(dweight_VD, chunk_CV, hidden_ND[part], rows == num_rows)
        if job.needs_grad:
            dweight_VD = torch.zeros_like(table_VD) if dweight_VD is None else dweight_VD
            if job.group is not None:
                dist.all_reduce(dhidden_ND, group=job.group)
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        out = _outputs(Statistics(*map(torch.cat, zip(*found))) if found else None, weight_N, job)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, dloss, *_):
        gradients = ctx.saved_tensors
        if _graph_is_kept():
            dhidden_ND, dweight_VD = (g * dloss.to(g.dtype) for g in gradients)
        else:
            dhidden_ND, dweight_VD = (g.mul_(dloss.to(g.dtype)) for g in gradients)
        return dhidden_ND, dweight_VD.to(ctx.weight_dtype), *[None] * 5


def _graph_is_kept() -> bool:
    """Whether this backward pass may be followed by another: then the gradients must not be scaled in place."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _outputs(found: Statistics | None, weight_N: torch.Tensor, job: Job) -> CrossEntropy:
    if found is None:
        empty = torch.zeros_like(weight_N)
        return CrossEntropy(empty.sum(), empty, torch.zeros_like(empty, dtype=torch.bool), empty.clone())
    lse_N, picked_N, best_N, total_N = found
    smoothing, ce_N = job.terms.label_smoothing, lse_N - picked_N
    loss_N = ce_N
    if smoothing:
        loss_N = (1 - smoothing) * ce_N + smoothing * lse_N - job.share * total_N
    loss_sum = (loss_N * weight_N).sum()
    if job.terms.z_loss:
        loss_sum = loss_sum + job.terms.z_loss * (lse_N.square() * (weight_N != 0)).sum()
    return CrossEntropy(loss_sum, ce_N, picked_N >= best_N, lse_N)


def _smoothing_share(weight_VD, bias_V, group, terms: LossTerms) -> float:
    """label_smoothing / K."""
    if not terms.label_smoothing:
        return 0.0
    allowed = torch.ones(len(weight_VD), device=weight_VD.device) if bias_V is None else ~bias_V.isneginf()
    count = allowed.sum().double()
    if group is not None:
        dist.all_reduce(count, group=group)
    return terms.label_smoothing / count.item()


def linear_cross_entropy_by(
    chunk_fn: ChunkFn, hidden_ND, weight_VD, target_N, weight_N, bias_V=None, vocab_start=0, group=None,
    terms: LossTerms = LossTerms(),
) -> CrossEntropy:  # fmt: skip
    """`linear_cross_entropy_ref` with another implementation of its chunk."""
    share = _smoothing_share(weight_VD, bias_V, group, terms)
    job = Job(bias_V, group, terms, share, needs_grad=True)
    return CrossEntropy(
        *_LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N, weight_N, vocab_start, chunk_fn, job)
    )


def linear_cross_entropy_ref(
    hidden_ND, weight_VD, target_N, weight_N, bias_V=None, vocab_start=0, group=None, terms: LossTerms = LossTerms()
) -> CrossEntropy:
    """Weighted cross-entropy of `hidden weight^T`, with its side outputs.

    hidden [N, D] and weight [V, D] of one floating type (float64 is computed in float64, all others in float32 but for
    the matmuls); target int64 [N], ids of the whole vocabulary; weight_N float32 [N]. bias [V] float32 is added to the
    logits: -inf forbids an id. `group` shards the vocabulary: this rank's ids begin at vocab_start, and all ranks call
    with the same rows. N = 0 gives a zero that backpropagates. Deterministic.
    """
    return linear_cross_entropy_by(
        chunk_ref, hidden_ND, weight_VD, target_N, weight_N, bias_V, vocab_start, group, terms
    )


def join_scores(best_N, sum_N, best_id_N, picked_N, group) -> Scores:
    """Join the shards' scores; sum_N = sum of exp(z - best_N)."""
    found = reduce_statistics(best_N, sum_N, picked_N, torch.zeros_like(picked_N), group)
    if group is not None:
        best_id_N = torch.where(best_N == found.best_C, best_id_N, torch.iinfo(torch.int64).max)
        dist.all_reduce(best_id_N, op=dist.ReduceOp.MIN, group=group)
    return Scores(found.lse_C, found.best_C, best_id_N, found.picked_C)


@torch.no_grad()
def linear_scores_ref(
    hidden_ND, weight_VD, picked_id_N, bias_V=None, vocab_start=0, group=None, softcap: float | None = None
) -> Scores:
    """What evaluation and sampling ask of the logits of `hidden weight^T`, without an [N, V] tensor and without
    gradients. picked_id int64 [N]: the ids whose logits are wanted; the rest as in linear_cross_entropy_ref."""
    rows = _chunk_rows(len(hidden_ND), len(weight_VD) * 4, hidden_ND.device)
    parts = [
        _chunk_scores(hidden_CD, weight_VD, picked_id_C - vocab_start, bias_V, softcap)
        for hidden_CD, picked_id_C in zip(hidden_ND.split(max(1, rows)), picked_id_N.split(max(1, rows)))
    ]
    best_N, sum_N, best_column_N, picked_N = map(torch.cat, zip(*parts))
    return join_scores(best_N, sum_N, best_column_N + vocab_start, picked_N, group)


def _chunk_scores(hidden_CD, weight_VD, column_C, bias_V, softcap):
    z_CV = (hidden_CD @ weight_VD.to(hidden_CD.dtype).t()).to(_wide(hidden_CD))
    _softcap_(z_CV, softcap)
    if bias_V is not None:
        z_CV += bias_V
    is_here_C = (column_C >= 0) & (column_C < z_CV.shape[1])
    picked_C = z_CV.gather(1, column_C.clamp(0, z_CV.shape[1] - 1)[:, None])[:, 0]
    best_C, best_column_C = z_CV.max(1)
    best_C = best_C.clamp(min=LOWEST)
    sum_C = z_CV.sub_(best_C[:, None]).exp_().sum(1)
    return best_C, sum_C, best_column_C, torch.where(is_here_C, picked_C, 0.0)


@torch.no_grad()
def wrong_entropy_ref(
    hidden_ND, weight_VD, target_N, bias_V=None, vocab_start=0, group=None, softcap: float | None = None
) -> torch.Tensor:
    """Entropy [N] of the wrong ids by the share of its largest value, in [0, 1]; no gradients, no [N, V] tensor.

    With q the softmax over all allowed ids but the target: -sum q ln q / ln(number of q above NEGLIGIBLE), 0 where at
    most one is. The target is left out before the exponentials, so nothing cancels where its probability is near 1.
    The rest as in linear_cross_entropy_ref.
    """
    wide = _wide(hidden_ND)
    rows = max(16, CHUNK_BYTES // (len(weight_VD) * wide.itemsize))
    parts = [
        _chunk_wrong_entropy(hidden_CD, weight_VD, target_C - vocab_start, bias_V, group, softcap)
        for hidden_CD, target_C in zip(hidden_ND.split(rows), target_N.split(rows))
    ]
    return torch.cat(parts) if parts else hidden_ND.new_empty(0, dtype=wide)


def _chunk_wrong_entropy(hidden_CD, weight_VD, column_C, bias_V, group, softcap) -> torch.Tensor:
    z_CV = (hidden_CD @ weight_VD.to(hidden_CD.dtype).t()).to(_wide(hidden_CD))
    _softcap_(z_CV, softcap)
    if bias_V is not None:
        z_CV += bias_V
    is_here_C1 = ((column_C >= 0) & (column_C < z_CV.shape[1]))[:, None]
    column_C1 = column_C.clamp(0, z_CV.shape[1] - 1)[:, None]
    z_CV.scatter_(1, column_C1, z_CV.gather(1, column_C1).masked_fill(is_here_C1, -torch.inf))
    top_C = z_CV.amax(1).clamp_(min=LOWEST)
    if group is not None:
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
    below_CV = z_CV.sub_(top_C[:, None]).clamp_(min=-1e4)  # of a forbidden id: finite, and its exponential is 0
    exp_CV = below_CV.exp()
    sums = torch.stack([exp_CV.sum(1), below_CV.mul_(exp_CV).sum(1)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    count_C = (exp_CV > NEGLIGIBLE * sums[0][:, None]).sum(1)
    if group is not None:
        dist.all_reduce(count_C, group=group)
    entropy_C = sums[0].log() - sums[1] / sums[0]
    share_C = (entropy_C / count_C.clamp(min=2).to(entropy_C.dtype).log()).clamp(0, 1)
    return torch.where(count_C > 1, share_C, 0.0)

"""The four collectives of tensor and sequence parallelism, each with its adjoint; on CPU and GPU alike.

Over the `group` of a tensor-parallel layer: x is the same on all ranks ("whole"), a summand of it ("partial"), or its
part along dimension 1, the positions ("sharded").
"""

from __future__ import annotations

import torch
import torch.distributed as dist

SEQUENCE_DIM = 1


def _all_reduce(x: torch.Tensor, group) -> torch.Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _all_gather(x: torch.Tensor, group) -> torch.Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=SEQUENCE_DIM)


def _reduce_scatter(x: torch.Tensor, group) -> torch.Tensor:
    parts = torch.stack(x.chunk(dist.get_world_size(group), dim=SEQUENCE_DIM))
    out = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=group)
    return out


def _collective(forward, backward):
    """An autograd function (x, group) -> y with the given pair of transforms."""

    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return forward(x, group)

        @staticmethod
        def backward(ctx, gradient):
            return backward(gradient, ctx.group), None

    return Collective.apply


def _identity(x: torch.Tensor, _group) -> torch.Tensor:
    return x.view_as(x)


sum_gradient = _collective(_identity, _all_reduce)  # whole -> whole, whose gradients are partial
sum_partial = _collective(_all_reduce, _identity)  # partial -> whole
gather_sequence = _collective(_all_gather, _reduce_scatter)  # sharded -> whole, whose gradients are partial
scatter_sequence = _collective(_reduce_scatter, _all_gather)  # partial -> sharded


class _SelectRows(torch.autograd.Function):
    """Selected rows of hidden states that are sharded over the positions; only those rows travel."""

    @staticmethod
    def forward(ctx, hidden_BLD, rows_N, group):
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        local_length = hidden_BLD.shape[1]
        column_N = rows_N % (local_length * size)
        owner_N = column_N // local_length
        flat_N = rows_N // (local_length * size) * local_length + column_N % local_length
        most = int(torch.bincount(owner_N, minlength=size).max()) if rows_N.numel() else 0
        mine = hidden_BLD.flatten(0, 1).index_select(0, flat_N[owner_N == rank])
        padded = mine.new_zeros(most, mine.shape[1])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        out = mine.new_empty(len(rows_N), mine.shape[1])
        for owner, part in enumerate(parts):
            here = owner_N == owner
            out[here] = part[: int(here.sum())]
        ctx.save_for_backward(flat_N[owner_N == rank], owner_N == rank)
        ctx.shape = hidden_BLD.shape
        return out

    @staticmethod
    def backward(ctx, gradient_ND):
        """The head gives every rank the whole gradient; each keeps its own rows. One may be selected twice (shifted
        logits read the first position of a text for two)."""
        flat_N, is_mine_N = ctx.saved_tensors
        gradient = gradient_ND.new_zeros(ctx.shape)
        gradient.view(-1, ctx.shape[-1]).index_add_(0, flat_N, gradient_ND[is_mine_N])
        return gradient, None, None


def select_sharded_rows(hidden_BLD: torch.Tensor, rows_N: torch.Tensor, group) -> torch.Tensor:
    """[N, D] whole, from hidden [B, L/tp, D] sharded over the positions; rows are flat indices into [B, L]."""
    return _SelectRows.apply(hidden_BLD, rows_N, group)


class _SumTailRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, num_rows, group):
        ctx.num_rows, ctx.group = num_rows, group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # what autograd hands in is not ours to change
        dist.all_reduce(gradient[-ctx.num_rows :], group=ctx.group)
        return gradient, None, None


def sum_gradient_of_tail(weight: torch.Tensor, num_rows: int, group) -> torch.Tensor:
    """The weight itself; the gradient of its last rows, which the ranks of `group` all hold, is summed over them."""
    return _SumTailRows.apply(weight, num_rows, group)

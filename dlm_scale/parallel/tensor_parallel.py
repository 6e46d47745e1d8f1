"""Tensor-parallel layers over megatron-core, with our collectives around them.

Of megatron-core come the sharded Column, Row and VocabParallel layers over an explicit group (their weights, marks and,
without sequence parallelism, the column layer's overlapped backward pass). Its own sequence-parallel mappings need
CUDA; ours (collectives.py) run everywhere.

With `sequence_parallel` the hidden states between the matmuls are sharded over the positions: [B, L/tp, D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from dlm_scale.parallel import collectives
from dlm_scale.parallel.layers import identity, padded_rows, select_rows


def _mark(weight: torch.Tensor, dim: int) -> None:
    """DeepSpeed and megatron-core tell sharded from replicated parameters by these attributes alone."""
    set_tensor_model_parallel_attributes(weight, True, dim, 1)


class Column(ColumnParallelLinear):
    """Outputs split. `shared_rows` last rows of the weight are held by all ranks of `shared_group` (keys and values
    where there are fewer heads than ranks): their gradients are summed."""

    def __init__(self, num_in: int, num_out: int, config, group, sequence_group=None, shared=(0, None)):
        super().__init__(num_in, num_out, config=config, init_method=None, bias=False, gather_output=False,
                         tp_group=group, disable_grad_reduce=sequence_group is not None)
        _mark(self.weight, 0)
        self.sequence_group, self.shared = sequence_group, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sequence_group is not None:
            x = collectives.gather_sequence(x, self.sequence_group)
        if self.shared[1] is None:
            return super().forward(x)[0]
        if self.sequence_group is None:
            x = collectives.sum_gradient(x, self.tp_group)
        return F.linear(x, collectives.sum_gradient_of_tail(self.weight, *self.shared))


class Row(RowParallelLinear):
    """Inputs split; outputs summed, or summed and scattered over the positions."""

    def __init__(self, num_in: int, num_out: int, config, group, sequence_parallel: bool):
        super().__init__(num_in, num_out, config=config, init_method=None, bias=False, input_is_parallel=True,
                         skip_bias_add=False, tp_group=group)
        _mark(self.weight, 1)
        self.join = collectives.scatter_sequence if sequence_parallel else collectives.sum_partial

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(F.linear(x, self.weight), self.tp_group)


class Table(VocabParallelEmbedding):
    """Rows of the vocabulary split."""

    def __init__(self, rows: int, width: int, config, group, sequence_parallel: bool):
        super().__init__(rows, width, init_method=None, config=config, tp_group=group)
        _mark(self.weight, 0)
        self.join = collectives.scatter_sequence if sequence_parallel else collectives.sum_partial

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.vocab_start_index
        inside = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(torch.where(inside, local, 0), self.weight)
        return self.join(rows * inside[..., None].to(rows.dtype), self.tp_group)


class TensorLayers:
    """The `Layers` of a tensor-parallel rank: what LocalLayers is for a whole one."""

    def __init__(self, mesh: Any, sequence_parallel: bool):
        self.size, self.rank, self.group = mesh.tensor_size, mesh.tensor_rank, mesh.tensor_group
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self._config = ModelParallelConfig(tensor_model_parallel_size=self.size, use_cpu_initialization=True,
                                           perform_initialization=False)
        self.over_heads = self._sum_gradient
        self.over_sequence = self._sum_gradient if sequence_parallel else identity
        self.select_rows = self._select_sharded if sequence_parallel else select_rows

    def _sum_gradient(self, x: torch.Tensor) -> torch.Tensor:
        return collectives.sum_gradient(x, self.group)

    def _select_sharded(self, hidden_BLD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        return collectives.select_sharded_rows(hidden_BLD, rows_N, self.group)

    def own_positions(self, x_BL: torch.Tensor) -> torch.Tensor:
        return x_BL.chunk(self.size, dim=1)[self.rank] if self.sequence_parallel else x_BL

    def column(self, num_in: int, num_out: int) -> Column:
        return Column(num_in, num_out, self._config, self.group, self.group if self.sequence_parallel else None)

    def qkv(self, width: int, kv_heads: int, queries: int, head_dim: int) -> tuple[Column, int]:
        """The fused projection, and the queries a key/value head has on this rank."""
        sequence_group = self.group if self.sequence_parallel else None
        if kv_heads % self.size == 0:
            rows = kv_heads * (queries + 2) * head_dim
            return Column(width, rows, self._config, self.group, sequence_group), queries
        share = queries * kv_heads // self.size
        shared = (2 * head_dim, self.mesh.subgroup(self.size // kv_heads))
        rows = self.size * (share + 2) * head_dim
        return Column(width, rows, self._config, self.group, sequence_group, shared), share

    def row(self, num_in: int, num_out: int) -> Row:
        return Row(num_in, num_out, self._config, self.group, self.sequence_parallel)

    def embedding(self, num_rows: int, width: int) -> Table:
        return Table(padded_rows(num_rows, self.size), width, self._config, self.group, self.sequence_parallel)

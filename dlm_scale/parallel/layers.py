"""The linear and embedding layers that the model is built from, and the value that makes them.

The model asks a `Layers` value for its layers and never learns whether they are sharded. `LocalLayers` gives whole
ones; the tensor-parallel twin has the same four methods.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PADDED_ROWS_MULTIPLE = 128  # vocabulary tables are padded so that GPU matmuls stay aligned


def padded_rows(rows: int, tensor_size: int) -> int:
    """Physical rows of a vocabulary table: the next multiple of 128 per tensor-parallel rank."""
    multiple = PADDED_ROWS_MULTIPLE * tensor_size
    return -(-rows // multiple) * multiple


class Linear(nn.Module):
    """y = x W^T, and a bias if asked for; the weights are left uninitialised, `initialise` fills them."""

    def __init__(self, num_in: int, num_out: int, has_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.bias = nn.Parameter(torch.empty(num_out)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of a table by id; padded rows are never read."""

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def select_rows(hidden_BLD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """[N, D]: the rows of the flattened batch at flat indices `rows_N`."""
    return hidden_BLD.flatten(0, 1).index_select(0, rows_N)


class LocalLayers:
    """Whole layers on one rank: tensor-parallel size 1.

    `over_heads` and `over_sequence` wrap replicated parameters of which a rank sees only its heads, or only its
    positions, so that their gradients become whole: nothing to do here. `own_positions` keeps of a [B, L] tensor the
    positions whose hidden states this rank has.
    """

    size, rank, group = 1, 0, None
    over_heads = over_sequence = staticmethod(identity)
    select_rows = staticmethod(select_rows)
    own_positions = staticmethod(identity)

    def column(self, num_in: int, num_out: int, has_bias: bool = False) -> nn.Module:
        """A linear layer whose outputs are split over the tensor-parallel ranks. Biases: on whole layers only."""
        return Linear(num_in, num_out, has_bias)

    def qkv(
        self, width: int, kv_heads: int, queries: int, head_dim: int, has_bias: bool = False
    ) -> tuple[nn.Module, int]:
        """The fused projection, grouped by key/value head; and the queries a key/value head has on this rank."""
        return Linear(width, kv_heads * (queries + 2) * head_dim, has_bias), queries

    def row(self, num_in: int, num_out: int, has_bias: bool = False) -> nn.Module:
        """A linear layer whose inputs are split; outputs are summed over the ranks."""
        return Linear(num_in, num_out, has_bias)

    def embedding(self, num_rows: int, width: int) -> nn.Module:
        """A table of `num_rows` logical rows, split by rows."""
        return Embedding(padded_rows(num_rows, self.size), width)


def layers_of(mesh: Any, sequence_parallel: bool) -> Any:
    """The layers of a rank of this mesh. At tensor-parallel size 1 nothing of megatron is imported."""
    if mesh.tensor_size == 1:
        return LocalLayers()
    # Megatron-core asks for Transformer Engine and Apex, which we do not use, and for a CUDA setting of its own.
    warnings.filterwarnings("ignore", module="megatron")
    from dlm_scale.parallel.tensor_parallel import TensorLayers

    return TensorLayers(mesh, sequence_parallel)

"""What is checked once at the start of a run, because nothing else would notice it going wrong.

Norm, clipping, initialisation and checkpoints take which rank holds what from the parameter table alone, not from
attributes on the parameters; so the table must describe the modules exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.engine.batch_hash import row_hashes
from dlm_scale.engine.state_access import local_shape
from dlm_scale.model.parameters import ParameterSpec
from dlm_scale.model.sharding import local_boxes
from dlm_scale.parallel.layers import padded_rows


def expected_shape(spec: ParameterSpec, rank: int, size: int) -> tuple[int, ...]:
    """The shape of a parameter on tensor-parallel rank `rank` of `size`, by the parameter table."""
    if spec.is_table:
        return (padded_rows(spec.shape[0], size) // size, *spec.shape[1:])
    numel = sum(item.numel for item in local_boxes(spec, rank, size, spec.shape[0]))
    if spec.shard_dim is not None and spec.shard_dim == len(spec.view) - 1:
        return (spec.shape[0], numel // spec.shape[0])
    return (numel // int(np.prod(spec.shape[1:])), *spec.shape[1:])


def check_against_table(model: torch.nn.Module, table: Mapping[str, ParameterSpec], mesh: Any) -> None:
    """The modules must hold the table's parameters, in its order, each in the shape of this rank's shard.

    Raises RuntimeError naming every parameter that does not.
    """
    built = {name: local_shape(parameter) for name, parameter in model.named_parameters()}
    if list(built) != list(table):
        raise RuntimeError(f"parameter table and modules disagree: {set(built) ^ set(table) or 'order'}")
    expected = {name: expected_shape(spec, mesh.tensor_rank, mesh.tensor_size) for name, spec in table.items()}
    wrong = [f"{n} is {built[n]}, the table says {expected[n]}" for n in table if built[n] != expected[n]]
    if wrong:
        raise RuntimeError(f"tensor-parallel rank {mesh.tensor_rank} of {mesh.tensor_size}: {'; '.join(wrong)}")


def check_precision(model: torch.nn.Module, precision: str) -> None:
    """The weights of the forward pass must have the type that train.precision names: DeepSpeed chooses it by several
    ways, one of which depends on the processor.

    Raises RuntimeError naming a parameter that has not.
    """
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    wrong = [f"{name} is {p.dtype}" for name, p in model.named_parameters() if p.dtype != wanted]
    if wrong:
        raise RuntimeError(f"train.precision={precision}, but {wrong[0]} ({len(wrong)} parameters of another type): "
                           "DeepSpeed has built the model in another precision than it was asked for")


def check_same_batch(batch: Sequence[Corrupted], mesh: Any, device: torch.device) -> None:
    """The ranks of a tensor-parallel group must train on the same rows, noised alike. Collective over that group.

    Raises RuntimeError on every rank of the group, naming the ranks that differ from its first one.
    """
    if mesh.tensor_size == 1:
        return
    mine = torch.from_numpy(np.concatenate([row_hashes(corrupted) for corrupted in batch])).to(device)
    everyone = [torch.empty_like(mine) for _ in range(mesh.tensor_size)]
    dist.all_gather(everyone, mine, group=mesh.tensor_group)
    different = [rank for rank, hashes in enumerate(everyone) if not torch.equal(hashes, everyone[0])]
    if different:
        raise RuntimeError(
            f"the first batch of tensor-parallel ranks {different} differs from rank 0's (data-parallel rank "
            f"{mesh.data_rank}): they must read the same data with the same seed; check that every node sees the same "
            "dataset files and config"
        )

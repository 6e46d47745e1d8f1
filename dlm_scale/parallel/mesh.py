"""The layout of the ranks: a value that is passed down, never looked up.

Ranks of a tensor-parallel group are neighbours (they share a node); data-parallel groups stride over them:
rank = data_rank * tensor_size + tensor_rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dlm_scale.errors import UsageError


@dataclass(frozen=True)
class Mesh:
    """Sizes and ranks of the data and tensor dimensions; groups are None where the size is 1."""

    data_size: int = 1
    tensor_size: int = 1
    data_rank: int = 0
    tensor_rank: int = 0
    data_group: Any = None
    tensor_group: Any = None

    def subgroup(self, size: int) -> Any:
        """The group of `size` neighbours within this rank's tensor-parallel group. Collective over the world."""
        groups = [list(range(start, start + size)) for start in range(0, self.world_size, size)]
        return _own_group(groups, self.rank)

    @property
    def rank(self) -> int:
        return self.data_rank * self.tensor_size + self.tensor_rank

    @property
    def world_size(self) -> int:
        return self.data_size * self.tensor_size


def check_layout(world_size: int, tensor_size: int, asked_by: str = "parallel.tensor_parallel_size") -> None:
    """Raises UsageError where the world does not divide into tensor-parallel groups. `asked_by`: the key or flag."""
    if world_size % tensor_size:
        valid = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UsageError(
            f"{asked_by}={tensor_size} does not divide the {world_size} processes of this job; "
            f"use one of {valid}, or start a multiple of {tensor_size} processes"
        )


def make_mesh(rank: int, world_size: int, tensor_size: int) -> Mesh:
    """Build the mesh and its process groups. Collective: every rank of the world calls it."""
    check_layout(world_size, tensor_size)
    data_size = world_size // tensor_size
    data_groups = [list(range(t, world_size, tensor_size)) for t in range(tensor_size)]
    tensor_groups = [list(range(d * tensor_size, (d + 1) * tensor_size)) for d in range(data_size)]
    return Mesh(
        data_size=data_size,
        tensor_size=tensor_size,
        data_rank=rank // tensor_size,
        tensor_rank=rank % tensor_size,
        data_group=_own_group(data_groups, rank) if world_size > 1 else None,
        tensor_group=_own_group(tensor_groups, rank) if tensor_size > 1 else None,
    )


def _own_group(groups: list[list[int]], rank: int) -> Any:
    """Create every group (torch demands that all ranks do) and return the one that holds `rank`."""
    import torch.distributed as dist

    if len(groups) == 1:
        return dist.group.WORLD
    made = [dist.new_group(members) for members in groups]
    return next(group for members, group in zip(groups, made) if rank in members)

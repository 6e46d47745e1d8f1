"""The true global gradient norm at every ZeRO stage, and clipping by it.

DeepSpeed reports no norm at ZeRO 0, counts a replicated parameter by marks that are easily lost, and clips after an
optimizer's own preprocessing; so norm and clipping are ours, before the update. Each element of each logical tensor
is counted once over all ranks: `StateAccess.counted_ranges` says which elements of a fragment this rank counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from dlm_scale.engine.build import Trainer


def gradient_fragments(engine: Any, stage: int) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(name, start, values): the reduced gradient of what this rank owns, between `backward` and `step`.

    `values` is 1-D: elements [start, start + n) of the flattened local gradient.
    """
    return FRAGMENTS[stage](engine)


def _replicated(engine: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            yield name, 0, parameter.grad.view(-1)


def _partitioned(engine: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    wrapper = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is not None:
            place = mapping.lp_fragment_address
            yield name, place.start, _partition_gradient(wrapper, parameter, mapping)


def _partition_gradient(wrapper: Any, parameter: torch.Tensor, mapping: Any) -> torch.Tensor:
    """ZeRO 1 and 2 keep it in one of three places: bf16 buffers, the offloaded partition, or a list of fragments."""
    inside, whole = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    if hasattr(wrapper, "fp32_groups_gradients"):
        return parameter._hp_grad.view(-1).narrow(0, whole.start, whole.numel)
    if wrapper.cpu_offload:
        flat = wrapper.single_partition_of_fp32_groups[mapping.param_group_index].grad
        return flat.narrow(0, inside.start, inside.numel)
    return mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)[: whole.numel]


def _sharded(engine: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    wrapper = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        values = wrapper.get_local_fp32_grad_for_param(parameter).view(-1)
        yield name, wrapper._get_param_partition_rank(parameter) * values.numel(), values


FRAGMENTS = {0: _replicated, 1: _partitioned, 2: _partitioned, 3: _sharded}


def global_norm(trainer: Trainer) -> torch.Tensor:
    """L2 norm of the whole model's gradient, a float64 scalar on the device, equal on all ranks. Collective."""
    access, total = trainer.state_access, torch.zeros((), dtype=torch.float64, device=trainer.runtime.device)
    for name, start, values in gradient_fragments(trainer.engine, trainer.stage):
        for low, high in access.counted_ranges(name, start, values.numel()):
            part = values[low - start : high - start]
            total += torch.linalg.vector_norm(part, dtype=torch.float32).double().square().to(total.device)
    if trainer.runtime.env.world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()


def clip_by_global_norm(trainer: Trainer, limit: float, divisor: torch.Tensor | None = None) -> torch.Tensor:
    """Tell the optimizer to divide this step's gradients by `divisor`, and to scale what comes of it so that its norm
    is at most `limit` (0: no limit).

    Returns the norm before clipping.
    """
    from dlm_scale.engine.state_access import inner_optimizer

    norm = global_norm(trainer) if divisor is None else global_norm(trainer) / divisor
    scale = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else None
    if divisor is not None:
        scale = 1 / divisor if scale is None else scale / divisor
    inner_optimizer(trainer.engine).gradient_scale = scale
    return norm

"""Muon (Jordan et al., 2024): each hidden matrix moves along the orthogonal factor of its momentum.

    b <- lerp(b, g, 1 - mu);  u = lerp(g, b, mu)  (Nesterov);  W <- W - lr (O(u) + wd W)
    O(u) = sqrt(max(1, rows/cols)) NS(u), for each of the matrices that are fused into one (Q, K, V; gate, up)

g is the gradient after clipping by the global norm. NS needs the whole matrix, of which a rank may hold a tensor-
parallel slice of a ZeRO part: the parts are summed onto one owner (exactly: each element comes from one rank), the owner
orthogonalises, all take their own part of the result. So the update is the same at every layout. The momentum is an
optimizer slot and stays sharded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from dlm_scale.checkpoint.layout import extents, rectangles, volume
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.gradients import gradient_fragments
from dlm_scale.engine.state_access import Fragment, fragments, inner_optimizer
from dlm_scale.model.parameters import ParameterSpec
from dlm_scale.model.sharding import Box, split_range

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Roughly U V^T of matrix = U S V^T: five quintic steps drive the singular values towards 1 (into about .7-1.2)."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    x = x.t() if is_tall else x
    for _ in range(NS_STEPS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.t() if is_tall else x).to(matrix.dtype)


def orthogonalised(matrix: torch.Tensor, spec: ParameterSpec) -> torch.Tensor:
    """O(u) of a whole logical matrix, its fused parts one by one (better than as one matrix: docs/LOG.md, 11)."""
    out = torch.empty_like(matrix)
    for source, target in zip(_fused_parts(matrix.view(spec.view), spec), _fused_parts(out.view(spec.view), spec)):
        rows = source.reshape(-1, matrix.shape[-1])
        scale = math.sqrt(max(1.0, rows.shape[0] / rows.shape[1]))
        target.copy_((scale * newton_schulz(rows)).view(source.shape))
    return out


def _fused_parts(view: torch.Tensor, spec: ParameterSpec) -> list[torch.Tensor]:
    """Views of the matrices that a parameter is made of: Q, K and V; gate and up; or the matrix itself."""
    if spec.is_grouped:  # key/value heads, each with its queries, its key, its value
        return [view[:, :-2], view[:, -2], view[:, -1]]
    return list(view.unbind(0)) if view.dim() == 3 else [view]


@torch.no_grad()
def muon_update(trainer: Trainer, rate: float) -> None:
    """Move all matrices that Muon owns. Call between `clip_by_global_norm` and the engine's step. Collective."""
    optimizer, world = inner_optimizer(trainer.engine), trainer.runtime.env.world_size
    gradients = {name: values for name, _, values in gradient_fragments(trainer.engine, trainer.stage)}
    held = {f.name: f for f in fragments(trainer.engine, trainer.stage)}
    names = [name for name, spec in trainer.table.items() if spec.is_hidden_matrix]
    for first in range(0, len(names), world):
        batch = names[first : first + world]  # one matrix an owner at a time bounds the memory
        wholes = [_gather(trainer, name, i, held.get(name), gradients.get(name), optimizer) for i, name in enumerate(batch)]
        if trainer.runtime.env.rank < len(batch):
            mine = wholes[trainer.runtime.env.rank]
            mine.copy_(orthogonalised(mine, trainer.table[batch[trainer.runtime.env.rank]]))
        for owner, (name, whole) in enumerate(zip(batch, wholes)):
            if world > 1:
                dist.broadcast(whole, src=owner)
            if name in held:
                _apply(trainer, held[name], whole, rate, optimizer.matrix_weight_decay)


def _gather(trainer: Trainer, name: str, owner: int, fragment: Fragment | None, gradient, optimizer) -> torch.Tensor:
    """The whole Nesterov momentum of one matrix on `owner`; elsewhere the buffer for its result."""
    spec = trainer.table[name]
    whole = torch.zeros(spec.shape, device=trainer.runtime.device)
    if fragment is not None:
        nesterov = _nesterov(fragment.slots["momentum"], gradient, optimizer)
        access = trainer.state_access
        for item, low, high, offset in access.counted(name, fragment.start, nesterov.numel()):
            _put(whole.view(spec.view), item.box, low, nesterov[offset : offset + high - low])
    if trainer.runtime.env.world_size > 1:
        dist.reduce(whole, dst=owner)
    return whole


def _nesterov(momentum: torch.Tensor, gradient: torch.Tensor, optimizer: Any) -> torch.Tensor:
    gradient = gradient[: momentum.numel()].float()
    if optimizer.gradient_scale is not None:
        gradient = gradient * optimizer.gradient_scale.float()
    momentum.lerp_(gradient, 1 - optimizer.momentum)
    return gradient.lerp(momentum, optimizer.momentum)


def _apply(trainer: Trainer, fragment: Fragment, whole: torch.Tensor, rate: float, weight_decay: float) -> None:
    """weights <- (1 - lr wd) weights - lr O, on the part that this rank owns."""
    spec, weights = trainer.table[fragment.name], fragment.slots["param"]
    weights.mul_(1 - rate * weight_decay)
    done = 0
    boxes = trainer.state_access.boxes(fragment.name)
    for item, low, high in split_range(boxes, fragment.start, fragment.start + weights.numel()):
        weights[done : done + high - low].sub_(_take(whole, spec, item.box, low, high), alpha=rate)
        done += high - low


def _put(whole_view: torch.Tensor, box: Box, low: int, values: torch.Tensor) -> None:
    """Elements [low, low + n) of the flattened box into the whole tensor (in its view)."""
    done = 0
    for part in rectangles(box, low, low + values.numel()):
        size = volume(part)
        whole_view[tuple(slice(*bounds) for bounds in part)] = values[done : done + size].view(extents(part))
        done += size


def _take(whole: torch.Tensor, spec: ParameterSpec, box: Box, low: int, high: int) -> torch.Tensor:
    """Elements [low, high) of the flattened box, 1-D."""
    view = whole.view(spec.view)
    parts = [view[tuple(slice(*bounds) for bounds in part)].reshape(-1) for part in rectangles(box, low, high)]
    return torch.cat(parts)

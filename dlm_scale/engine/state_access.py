"""Training state as named fragments, whatever the ZeRO stage: one adapter a stage, one way to read and to write.

A fragment is what this data-parallel rank owns of one parameter: elements [start, start + n) of its flattened local
tensor, in float32, with its optimizer slots beside it. `slots["param"]` is the master weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dlm_scale.checkpoint.layout import Piece
from dlm_scale.model.initialise import Box, box_numel, full_box
from dlm_scale.model.parameters import ParameterSpec


@dataclass(frozen=True)
class Fragment:
    """1-D views into the engine's own tensors; writing to them changes the training state."""

    name: str
    start: int
    slots: dict[str, torch.Tensor]


# values(spec, slot, box, flat_start, numel) -> float32 [numel]
Source = Callable[[ParameterSpec, str, Box, int, int], torch.Tensor]


def inner_optimizer(engine: Any) -> Any:
    """The torch optimizer inside DeepSpeed's wrapper, if there is a wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def fragments(engine: Any, stage: int) -> list[Fragment]:
    """What this rank owns of every parameter, in the order of `named_parameters`."""
    return list(FRAGMENTS[stage](engine))


def masters(engine: Any, stage: int) -> list[torch.Tensor]:
    """The float32 tensors that the torch optimizer updates on this rank: whole weights, or flat partitions."""
    wrapper = engine.optimizer
    if stage == 3:
        return list(wrapper.fp32_partitioned_groups_flat)
    if stage:
        return list(_flat_partitions(wrapper))
    return [parameter for group in inner_optimizer(engine).param_groups for parameter in group["params"]]


def _flat_partitions(wrapper: Any) -> list[torch.Tensor]:
    """ZeRO 1 and 2; DeepSpeed's bf16 wrapper of ZeRO 1 has another name for them."""
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return wrapper.single_partition_of_fp32_groups
    return wrapper.fp32_groups_flat_partition


def _slots(engine: Any, master: torch.Tensor, start: int, numel: int) -> dict[str, torch.Tensor]:
    optimizer = inner_optimizer(engine)
    tensors = {"param": master.data} | {slot: optimizer.state[master][slot] for slot in optimizer.slots()}
    return {slot: tensor.view(-1).narrow(0, start, numel) for slot, tensor in tensors.items()}


def _replicated(engine: Any) -> Iterator[Fragment]:
    """ZeRO 0: every rank has everything; in bf16 the wrapper keeps the float32 masters."""
    wrapper, of_weight = engine.optimizer, {}
    if hasattr(wrapper, "fp32_groups"):
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups):
            of_weight |= {id(a): b for a, b in zip(low, high)}
    for name, parameter in engine.module.named_parameters():
        yield Fragment(name, 0, _slots(engine, of_weight.get(id(parameter), parameter), 0, parameter.numel()))


def _partitioned(engine: Any) -> Iterator[Fragment]:
    """ZeRO 1 and 2: masters lie in one flat partition a parameter group; a rank may own none of a parameter."""
    flats = _flat_partitions(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is not None:
            place = mapping.get_hp_fragment_address()
            slots = _slots(engine, flats[mapping.param_group_index], place.start, place.numel)
            yield Fragment(name, mapping.lp_fragment_address.start, slots)


def _sharded(engine: Any) -> Iterator[Fragment]:
    """ZeRO 3: every parameter is cut into equal parts, the last one padded."""
    wrapper = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = wrapper._get_param_partition_rank(parameter) * length
        owned = max(0, min(length, parameter.ds_numel - start))
        if owned:
            yield Fragment(name, start, _slots(engine, wrapper.fp32_partitioned_groups_flat[group], offset, owned))


FRAGMENTS = {0: _replicated, 1: _partitioned, 2: _partitioned, 3: _sharded}


def local_box(spec: ParameterSpec, local_shape: tuple[int, ...], tensor_rank: int, tensor_size: int) -> Box:
    """The rectangle of the logical tensor (in its view) that a tensor-parallel rank holds, padding left out."""
    if spec.shard_dim is None or tensor_size == 1:
        return full_box(spec.view)
    size = spec.view[spec.shard_dim]
    is_table = spec.shard_dim == 0 and len(spec.view) == 2
    part = local_shape[0] if is_table else size // tensor_size
    bounds = (min(size, tensor_rank * part), min(size, (tensor_rank + 1) * part))
    return tuple(bounds if d == spec.shard_dim else (0, n) for d, n in enumerate(spec.view))


@dataclass(frozen=True)
class StateAccess:
    """Reads and writes the whole training state of an engine as logical tensors."""

    engine: Any
    stage: int
    table: dict[str, ParameterSpec]
    mesh: Any

    def boxes(self) -> dict[str, Box]:
        """The box of every parameter that this rank's tensor-parallel shard covers."""
        return {
            name: local_box(self.table[name], _local_shape(p), self.mesh.tensor_rank, self.mesh.tensor_size)
            for name, p in self.engine.module.named_parameters()
        }

    def fill(self, source: Source, step: int) -> None:
        """Write every slot of every parameter from `source`, `step` updates done; padding becomes zero."""
        inner_optimizer(self.engine).prepare(masters(self.engine, self.stage), step)
        boxes = self.boxes()
        for fragment in fragments(self.engine, self.stage):
            spec, box = self.table[fragment.name], boxes[fragment.name]
            for slot, tensor in fragment.slots.items():
                _fill_range(tensor, source, spec, slot, box, fragment.start)
        for name, parameter in self.engine.module.named_parameters():
            self._fill_module(parameter, source, self.table[name], boxes[name])

    def _fill_module(self, parameter, source: Source, spec: ParameterSpec, box: Box) -> None:
        """The weights that the forward pass reads: whole ones, or ZeRO-3's part and its resident copy."""
        if not hasattr(parameter, "ds_id"):
            _fill_range(parameter.data.view(-1), source, spec, "param", box, 0)
            return
        part = parameter.ds_tensor
        start = self.engine.optimizer._get_param_partition_rank(parameter) * part.numel()
        _fill_range(part.data.view(-1), source, spec, "param", box, start)
        if parameter.data.numel() == parameter.ds_numel:
            _fill_range(parameter.data.view(-1), source, spec, "param", box, 0)

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of a checkpoint: each element of each logical tensor once over all ranks."""
        boxes = self.boxes()
        for fragment in fragments(self.engine, self.stage):
            spec, box = self.table[fragment.name], boxes[fragment.name]
            start, stop = self._owned_range(fragment, spec, box)
            if start < stop:
                for slot, tensor in fragment.slots.items():
                    values = tensor[start - fragment.start : stop - fragment.start]
                    yield Piece(spec.name, slot, spec.shape, spec.view, box, start, values)

    def _owned_range(self, fragment: Fragment, spec: ParameterSpec, box: Box) -> tuple[int, int]:
        """Cut padding off; where ranks hold the same values (ZeRO 0, replicated under TP) share the writing out."""
        stop = min(fragment.start + fragment.slots["param"].numel(), box_numel(box))
        if spec.shard_dim is None and self.mesh.tensor_rank:
            return 0, 0
        if self.stage:
            return fragment.start, stop
        share = -(-stop // self.mesh.data_size)
        return min(stop, share * self.mesh.data_rank), min(stop, share * (self.mesh.data_rank + 1))


def _local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _fill_range(target: torch.Tensor, source: Source, spec, slot: str, box: Box, start: int) -> None:
    """target = elements [start, start + len) of the local tensor; what lies beyond the logical box is zero."""
    real = max(0, min(target.numel(), box_numel(box) - start))
    if real:
        target[:real].copy_(source(spec, slot, box, start, real))
    target[real:].zero_()


def zero_slot_source(initial: Callable[[ParameterSpec, Box, int, int], torch.Tensor]) -> Source:
    """A fresh start: weights and their average from `initial`, everything else zero."""

    def source(spec: ParameterSpec, slot: str, box: Box, start: int, numel: int) -> torch.Tensor:
        if slot in ("param", "ema"):
            return initial(spec, box, start, numel)
        return torch.zeros(numel)

    return source

"""Training state as named fragments, whatever the ZeRO stage: one adapter a stage, one way to read and to write.

A fragment is what this data-parallel rank owns of one parameter: elements [start, start + n) of its flattened local
tensor, in float32, with its optimizer slots beside it. `slots["param"]` is the master weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dlm_scale.checkpoint.layout import Piece
from dlm_scale.model.parameters import ParameterSpec
from dlm_scale.model.sharding import Box, LocalBox, local_boxes, split_range


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


def masters(engine: Any, stage: int) -> list[tuple[torch.Tensor, dict]]:
    """The float32 tensors that the optimizer updates on this rank (whole weights or flat parts), with their groups."""
    wrapper, groups = engine.optimizer, inner_optimizer(engine).param_groups
    if stage == 3:
        flats = wrapper.fp32_partitioned_groups_flat
        return [(flat, groups[wrapper.sub_group_to_group_id[i]]) for i, flat in enumerate(flats)]
    if stage:
        return list(zip(_flat_partitions(wrapper), groups, strict=True))
    return [(parameter, group) for group in groups for parameter in group["params"]]


def _flat_partitions(wrapper: Any) -> list[torch.Tensor]:
    """ZeRO 1 and 2; DeepSpeed's bf16 wrapper of ZeRO 1 has another name for them."""
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return wrapper.single_partition_of_fp32_groups
    return wrapper.fp32_groups_flat_partition


def _slots(engine: Any, master: torch.Tensor, start: int, numel: int) -> dict[str, torch.Tensor]:
    tensors = {"param": master.data} | inner_optimizer(engine).slots_of(master)
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


@dataclass(frozen=True)
class StateAccess:
    """Reads and writes the whole training state of an engine as logical tensors."""

    engine: Any
    stage: int
    table: dict[str, ParameterSpec]
    mesh: Any

    def boxes(self, name: str) -> list[LocalBox]:
        """What this rank's tensor-parallel shard of a parameter is made of."""
        rows = local_shape(self._parameters[name])[0]
        return local_boxes(self.table[name], self.mesh.tensor_rank, self.mesh.tensor_size, rows)

    @cached_property
    def _parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.engine.module.named_parameters())

    def fill(self, source: Source, step: int) -> None:
        """Write every slot of every parameter from `source`, `step` updates done; padding becomes zero."""
        inner_optimizer(self.engine).prepare(masters(self.engine, self.stage), step)
        for fragment in fragments(self.engine, self.stage):
            for slot, tensor in fragment.slots.items():
                self._fill(tensor, source, fragment.name, slot, fragment.start)
        for name, parameter in self._parameters.items():
            self._fill_module(name, parameter, source)

    def _fill_module(self, name: str, parameter: torch.Tensor, source: Source) -> None:
        """The weights that the forward pass reads: whole ones, or ZeRO-3's part and its resident copy."""
        if not hasattr(parameter, "ds_id"):
            self._fill(parameter.data.view(-1), source, name, "param", 0)
            return
        part = parameter.ds_tensor
        start = self.engine.optimizer._get_param_partition_rank(parameter) * part.numel()
        self._fill(part.data.view(-1), source, name, "param", start)
        if parameter.data.numel() == parameter.ds_numel:
            self._fill(parameter.data.view(-1), source, name, "param", 0)

    def _fill(self, target: torch.Tensor, source: Source, name: str, slot: str, start: int) -> None:
        """target = elements [start, start + len) of the local tensor."""
        done = 0
        for item, low, high in split_range(self.boxes(name), start, start + target.numel()):
            target[done : done + high - low].copy_(source(self.table[name], slot, item.box, low, high - low))
            done += high - low
        target[done:].zero_()

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of a checkpoint: each element of each logical tensor once over all ranks."""
        for fragment in fragments(self.engine, self.stage):
            spec, size = self.table[fragment.name], fragment.slots["param"].numel()
            for item, low, high, offset in self.counted(fragment.name, fragment.start, size):
                for slot, tensor in fragment.slots.items():
                    values = tensor[offset : offset + high - low]
                    yield Piece(spec.name, slot, spec.shape, spec.view, item.box, low, values)

    def counted_ranges(self, name: str, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Parts [low, high) of the local elements [start, start + size) that no other rank counts."""
        for _, low, high, offset in self.counted(name, start, size):
            yield start + offset, start + offset + high - low

    def counted(self, name: str, start: int, size: int) -> Iterator[tuple[LocalBox, int, int, int]]:
        """(box, low, high, offset in the fragment). At ZeRO 0 all data-parallel ranks hold the same values: they
        share the elements out."""
        own_start, stop = start, start + size
        if self.stage == 0:
            share = -(-size // self.mesh.data_size)
            own_start, stop = share * self.mesh.data_rank, min(stop, share * (self.mesh.data_rank + 1))
        offset = own_start - start
        for item, low, high in split_range(self.boxes(name), own_start, stop):
            if item.is_counted:
                yield item, low, high, offset
            offset += high - low


def local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the tensor-parallel shard; under ZeRO-3 it is spread over the data-parallel ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def zero_slot_source(initial: Callable[[ParameterSpec, Box, int, int], torch.Tensor]) -> Source:
    """A fresh start: weights and their average from `initial`, everything else zero."""

    def source(spec: ParameterSpec, slot: str, box: Box, start: int, numel: int) -> torch.Tensor:
        if slot in ("param", "ema"):
            return initial(spec, box, start, numel)
        return torch.zeros(numel)

    return source

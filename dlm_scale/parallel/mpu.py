"""The mesh in the words that DeepSpeed asks a model-parallel unit for."""

from __future__ import annotations

from typing import Any


class MeshUnit:
    """DeepSpeed's `mpu`: data-parallel and tensor-parallel groups of this rank.

    No `initialize_sequence_parallel` attribute: DeepSpeed would take its presence for its own sequence parallelism.
    """

    def __init__(self, mesh: Any):
        self._mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self._mesh.data_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data_size

    def get_model_parallel_group(self) -> Any:
        return self._mesh.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tensor_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def unit_of(mesh: Any) -> MeshUnit | None:
    """None at tensor-parallel size 1: DeepSpeed's own default is then right."""
    return MeshUnit(mesh) if mesh.tensor_size > 1 else None

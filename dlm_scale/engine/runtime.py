"""Start of a process: threads, device, process groups, DeepSpeed without its compiled ops."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass

import torch

from dlm_scale.errors import UsageError
from dlm_scale.parallel.dist_env import DistEnv, dist_env, export_environment, start_process_group
from dlm_scale.parallel.mesh import Mesh, make_mesh


@dataclass(frozen=True)
class Runtime:
    """Who this process is, where it computes, and its place in the mesh."""

    env: DistEnv
    device: torch.device
    mesh: Mesh

    @property
    def is_first(self) -> bool:
        return self.env.rank == 0


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` takes a GPU where there is one; `cuda` without one is an error, never a silent CPU run."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("train.device=cuda: torch sees no GPU here; use train.device=cpu, or check the driver")
    # With one visible device a rank (srun --gpus-per-task=1) the local index is 0 for everyone.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def set_threads(local_world_size: int) -> None:
    """Share the cores among the ranks of a node, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world_size))


def start_runtime(device: str, tensor_size: int, timeout_seconds: float = 1800.0) -> Runtime:
    """Join the world. Collective."""
    env = dist_env()
    export_environment(env)
    set_threads(env.local_world_size)
    place = pick_device(device, env.local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        # DeepSpeed picks its accelerator by what torch sees; a CPU run on a GPU machine must say so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    start_process_group(env, "nccl" if place.type == "cuda" else "gloo", timeout_seconds)
    return Runtime(env, place, make_mesh(env.rank, env.world_size, tensor_size))


def stop_runtime() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def import_deepspeed():
    """DeepSpeed, quiet, and without its CPU shared-memory op.

    On CPU `init_distributed` would compile that op (it needs g++ and ninja) and, under its launcher, leave 69 MB a
    rank behind in /dev/shm; gloo alone does the same work. The table of ops is set, not read: reading it makes
    DeepSpeed try its compilers.
    """
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed()
    return deepspeed

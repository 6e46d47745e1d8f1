"""One answer to "who am I" for every launcher: deepspeed, torchrun, srun, or a plain process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dlm_scale.errors import UsageError


@dataclass(frozen=True)
class DistEnv:
    """This process among its peers. `launcher` is `torch` (deepspeed and torchrun), `slurm` or `single`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str


def dist_env(environ: Mapping[str, str] | None = None) -> DistEnv:
    """Read the launcher's variables; the first that is complete wins: RANK, then an srun step, then one process.

    Raises:
        UsageError: a variable is missing, is not a number, or the rank lies outside the world.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ:
        return _from_torch(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return _from_slurm(environ)
    return DistEnv(0, 1, 0, 1, "127.0.0.1", 0, "single")


def _from_torch(environ: Mapping[str, str]) -> DistEnv:
    local = environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", "1"))
    return _checked(
        DistEnv(
            rank=_number(environ, "RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK"),
            local_world_size=int(local),
            master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_number(environ, "MASTER_PORT"),
            launcher="torch",
        )
    )


def _from_slurm(environ: Mapping[str, str]) -> DistEnv:
    """srun with one task a rank. The port is derived from the job id, so that two jobs on a node do not collide."""
    job = int(environ.get("SLURM_JOB_ID", "0"))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "localhost"))
    return _checked(
        DistEnv(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=int(environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]),
            master_addr=environ.get("MASTER_ADDR") or _first_host(nodes),
            master_port=int(environ.get("MASTER_PORT") or 20000 + job % 20000),
            launcher="slurm",
        )
    )


def _first_host(nodelist: str) -> str:
    if "[" not in nodelist:
        return nodelist.split(",")[0]
    listing = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    return listing.stdout.split()[0]


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not value.lstrip("-").isdigit():
        raise UsageError(
            f"environment variable {name}={value!r}: the launcher set RANK or SLURM_PROCID but not a number here; "
            "start through deepspeed, torchrun or srun, or unset RANK for a single process"
        )
    return int(value)


def _checked(env: DistEnv) -> DistEnv:
    if not 0 <= env.rank < env.world_size:
        raise UsageError(f"rank {env.rank} lies outside the world of {env.world_size} processes: check the launcher")
    return env


def is_first_rank() -> bool:
    """Whether this process is the one that talks; needs no valid environment."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def export_environment(env: DistEnv) -> None:
    """Set the variables that DeepSpeed and NCCL read, whatever the launcher left out."""
    os.environ.update(
        RANK=str(env.rank),
        WORLD_SIZE=str(env.world_size),
        LOCAL_RANK=str(env.local_rank),
        MASTER_ADDR=env.master_addr,
        MASTER_PORT=str(env.master_port),
    )


def start_process_group(env: DistEnv, backend: str, timeout_seconds: float = 1800.0) -> None:
    """Join the world's default process group. A single process needs no port: it meets itself in memory."""
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_seconds)
    if env.launcher == "single":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    address = f"tcp://{env.master_addr}:{env.master_port}"
    # torchrun's agent already serves the store at this address; env:// knows how to join it.
    method = "env://" if env.launcher == "torch" else address
    dist.init_process_group(backend, init_method=method, rank=env.rank, world_size=env.world_size, timeout=timeout)


def from_first(is_first: bool, first: int, group: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives on rank `first` of a group (None: of the world), on all its ranks; if it fails, all do."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return make()
    failure, made = None, [False, None]
    if is_first:
        try:
            made = [True, make()]
        except UsageError as error:
            failure = error
    dist.broadcast_object_list(made, first, group=group)
    if not made[0]:
        raise failure or UsageError(f"rank {first} stopped: see its message")
    return made[1]

"""`dlm doctor`: what is installed, which backend each operation takes and why, what to run to improve it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

REQUIRED = "torch deepspeed megatron-core numpy pydantic PyYAML safetensors xxhash tiktoken tokenizers datasets".split()
OPTIONAL = {
    "triton": "fused kernels on a GPU; comes with a CUDA build of torch",
    "flash-attn": 'faster attention on a GPU: pip install "dlm_scale[gpu]"; without it torch\'s own attention is used',
    "wandb": 'tracking by train.wandb=online: pip install "dlm_scale[log]"; metrics.jsonl is always written',
}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[tuple[str, str]]:
    for name in REQUIRED:
        yield name, _version(name) or f"MISSING: pip install {name} (make setup installs everything)"
    for name, reason in OPTIONAL.items():
        yield name, _version(name) or f"not installed, not needed ({reason})"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores usable"
    try:
        import torch
    except ImportError as error:
        yield "device", f"unknown: torch cannot be imported ({error})"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU (try nvidia-smi)"
        yield "device", f"cpu, gloo between processes: {reason}"
    else:
        yield "device", "cuda, NCCL between processes"


def _backends() -> Iterator[tuple[str, str]]:
    try:
        from dlm_scale.ops import chosen_backends
    except ImportError as error:
        yield "operations", f"unknown: {error}"
        return
    yield from chosen_backends().items()


def _tools() -> Iterator[tuple[str, str]]:
    compiler = shutil.which("g++") or shutil.which("c++")
    yield "compiler", compiler or "none: not needed (no operation is compiled by a C++ compiler at run time)"
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    yield "/dev/shm", f"{shm.free / 2**20:.0f} MiB free" if shm else "absent"


def report() -> list[tuple[str, str]]:
    """(name, one line) for everything that decides how runs go on this machine."""
    python = ("python", f"{platform.python_version()} on {platform.platform()}")
    return [python, *_packages(), *_devices(), *_backends(), *_tools()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`dlm doctor` takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report; nothing in it is a failure."""
    for name, line in report():
        print(f"{name:<22}{line}")
    return 0

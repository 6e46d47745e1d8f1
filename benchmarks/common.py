"""What the benchmarks share: timing in turns on CPU and GPU, the device's measured roofline, how results leave."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object, as the last line")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each implementation")
    return parser


def cpu_seconds(arms: dict[str, Callable[[int], None]], repeats: int) -> dict[str, list[float]]:
    """Process CPU seconds of each arm, called with the number of the repeat, in turns after one unmeasured turn."""
    found = {name: [] for name in arms}
    for repeat in range(-1, repeats):
        for name, arm in arms.items():
            start = time.process_time()
            arm(repeat)
            if repeat >= 0:
                found[name].append(time.process_time() - start)
    return found


def gpu_milliseconds(arms: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each arm between CUDA events, in turns after three unmeasured ones."""
    found = {name: [] for name in arms}
    for repeat in range(-3, repeats):
        for name, arm in arms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            arm()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 0:
                found[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in found.items()}


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the turns of slow / fast: what disturbs a turn disturbs both of its measurements."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def measured_roofline(device: str) -> dict[str, float]:
    """What this device reaches: matmul in TFLOP/s (bfloat16 on a GPU, float32 on a CPU), and copying in TB/s, where
    what is read and what is written count."""
    size, half, dtype = (8192, 1 << 29, torch.bfloat16) if device == "cuda" else (1024, 1 << 27, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    big = torch.zeros(2 * half, dtype=torch.uint8, device=device)
    arms = {"matmul": lambda *_: a @ a, "copy": lambda *_: big[:half].copy_(big[half:])}
    if device == "cuda":
        seconds = {name: ms / 1e3 for name, ms in gpu_milliseconds(arms, 20).items()}
    else:
        seconds = {name: statistics.median(times) for name, times in cpu_seconds(arms, 5).items()}
    return {"tflops": 2 * size**3 / seconds["matmul"] / 1e12, "tbytes_per_second": 2 * half / seconds["copy"] / 1e12}


def peak_bytes(command: list[str]) -> int:
    """What a child prints as its last line: by how many bytes its own resident memory grew."""
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(ran.stdout.splitlines()[-1])


def resident(name: str) -> int:
    """Resident memory of this process in bytes, now (`VmRSS`) or at its peak (`VmHWM`). Linux only: getrusage's peak
    would be the parent's where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) << 10


def forget_peak() -> None:
    """VmHWM restarts from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, object]:
    """What a figure is a figure of."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu_name(), "gpu": gpu,
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}  # fmt: skip


def _cpu_name() -> str:
    """The model, and what the CPU offers to matmuls."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    flags = {key.strip(): value for key, value in fields.items()}
    features = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags.get("flags", "")]
    return f"{flags.get('model name', platform.machine()).strip()} ({', '.join(features)})"


def report(results: dict, as_json: bool) -> None:
    """Rounded to what the measurement carries."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in results.items()}
    if as_json:
        print(json.dumps(rounded))
    else:
        for key, value in rounded.items():
            print(f"{key:<28}{value}")

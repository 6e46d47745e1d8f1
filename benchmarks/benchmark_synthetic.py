"""Speed and memory of training any config on synthetic tokens: tokens/s, MFU, peak memory, in about a minute.

    python benchmarks/benchmark_synthetic.py CONFIG [--seconds 60] [--profile] [section.key=value ...]
    torchrun --nproc-per-node 8 benchmarks/benchmark_synthetic.py CONFIG ...

Nothing is written; neither dataset nor tokenizer is needed (data.synthetic_vocab_size, 50258 unless given). Rank 0
prints what it measured and, as its last line, one JSON object. A step includes the noising of its batch, which runs
ahead in a thread as in training. MFU counts what is computed: the output head on the selected rows alone, and no
recomputation (dlm_scale.model.parameters.flops_per_token); it is null where the device's peak is not known.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

GPT2_WITH_MASK = 50258  # ids of the synthetic vocabulary unless the config says
MAX_STEPS = 10_000


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timed steps (default 60)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the clock starts (default 4)")
    parser.add_argument("--profile", action="store_true", help="also profile three steps: where the time goes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def synthetic_config(path: str, overrides: Sequence[str]) -> Any:
    """The config with its data replaced by random tokens and a run that does not end."""
    from dlm_scale.config import load_config

    vocabulary = load_config(path, overrides).data.synthetic_vocab_size or GPT2_WITH_MASK
    fixed = {"data.train": "synthetic", "data.validation": "null", "data.synthetic_vocab_size": vocabulary,
             "train.out": "unused", "train.target_param_data_ratio": "null", "train.num_steps": 10 * MAX_STEPS}
    return load_config(path, [*overrides, *(f"{key}={value}" for key, value in fixed.items())])


class Steps:
    """Training steps one after the other, the next batch made meanwhile."""

    def __init__(self, trainer: Any, data: Any, state: Any, ahead: ThreadPoolExecutor):
        from dlm_scale.engine.step import make_batch

        self.trainer, self.state = trainer, state
        self._make = lambda state: ahead.submit(make_batch, trainer, data, state)
        self._upcoming = self._make(state)
        self.selected = self.positions = 0
        self.loss: torch.Tensor | None = None

    def run(self, count: int) -> list[float]:
        """Seconds of each of `count` steps; the device is waited for after each."""
        from dlm_scale.engine.step import train_step

        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            batch = self._upcoming.result()
            following = self.state.advanced(self.trainer.config.train.global_batch_size)
            self._upcoming = self._make(following)
            self.loss = train_step(self.trainer, batch, self.state)["sums"][0]
            self.state = following
            synchronise(self.trainer.runtime.device)
            seconds.append(time.perf_counter() - started)
            self.selected += sum(len(corrupted.rows_N) for corrupted in batch)
            self.positions += sum(corrupted.xt_BL.numel() for corrupted in batch)
        return seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def agreed(value: float, operation: Any, device: torch.device) -> float:
    """The largest (or sum, ...) over the ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    return tensor.item()


def peak_bytes(device: torch.device) -> int:
    """Of the device's allocator; on CPU the process's resident memory, which includes torch itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def profile(steps: Steps) -> str:
    """Where three steps spend their time: the 25 costliest operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_gpu = steps.trainer.runtime.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch_profile(activities=activities) as recorded:
        steps.run(3)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """Train; the measurements on rank 0, None elsewhere."""
    from dlm_scale.data.loader import open_data
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime, stop_runtime
    from dlm_scale.engine.saving import start_fresh

    config = synthetic_config(options.config, options.overrides)
    runtime = start_runtime(config.train.device, config.parallel.tensor_parallel_size)
    data = open_data(f"synthetic:{config.data.synthetic_vocab_size}", config.model.seq_len, config.train.seed)
    trainer = build_trainer(config, runtime, data.vocabulary)
    with ThreadPoolExecutor(1) as ahead:
        steps = Steps(trainer, data, start_fresh(trainer), ahead)
        last = steps.run(max(1, options.warmup))[-1]
        last = agreed(last, dist.ReduceOp.MAX, runtime.device)
        seconds = steps.run(min(MAX_STEPS, max(3, round(options.seconds / last))))
        found = summary(trainer, steps, seconds)
        table = profile(steps) if options.profile else None
    stop_runtime()
    if table and runtime.is_first:
        print(table)
    return found if runtime.is_first else None


def summary(trainer: Any, steps: Steps, seconds: list[float]) -> dict[str, Any]:
    """Collective: the slowest rank's median step, the largest peak memory, the share of rows the head computes."""
    from dlm_scale.model.parameters import flops_per_token, peak_flops

    config, device, mesh = trainer.config, trainer.runtime.device, trainer.runtime.mesh
    tokens = config.train.global_batch_size * config.model.seq_len
    step = agreed(statistics.median(seconds), dist.ReduceOp.MAX, device)
    share = agreed(steps.selected, dist.ReduceOp.SUM, device) / agreed(steps.positions, dist.ReduceOp.SUM, device)
    flops = flops_per_token(config.model, trainer.vocabulary, config.model.seq_len, share)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name) if device.type == "cuda" else None
    return {
        "device": name,
        "ranks": mesh.world_size,
        "data": mesh.data_size,
        "tensor": mesh.tensor_size,
        "sequence_parallel": config.parallel.sequence_parallel,
        "zero": trainer.stage,
        "precision": config.train.precision,
        "compile": config.train.compile,
        "checkpoint_every": config.train.activation_checkpoint_every,
        "micro_batch_size": config.train.micro_batch_size,
        "accumulation": trainer.accumulation,
        "seq_len": config.model.seq_len,
        "parameters": sum(spec.numel for spec in trainer.table.values()),
        "steps": len(seconds),
        "step_ms": 1e3 * step,
        "step_ms_p90": 1e3 * statistics.quantiles(seconds, n=10)[-1],
        "tokens_per_second": tokens / step,
        "selected_share": share,
        "gflop_per_token": flops / 1e9,
        "mfu": tokens / step * flops / (peak * mesh.world_size) if peak else None,
        "peak_memory_gb": agreed(peak_bytes(device), dist.ReduceOp.MAX, device) / 1e9,
        "loss_per_token": agreed(float(steps.loss), dist.ReduceOp.SUM, device) / tokens / mesh.tensor_size,
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    found = measure(options)
    if found:
        found["command"] = ["benchmarks/benchmark_synthetic.py", *arguments]
        width = max(map(len, found))
        for key, value in found.items():
            print(f"{key:{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    from dlm_scale.errors import UsageError

    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"benchmark: error: {error}")

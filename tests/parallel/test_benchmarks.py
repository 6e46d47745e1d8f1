"""The benchmark programs run as they are documented, and say what they measured in their last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import free_port

ROOT = Path(__file__).parents[2]
SMALL = ["train.device=cpu", "train.precision=fp32", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4",
         "model.seq_len=16", "train.global_batch_size=8", "train.micro_batch_size=2", "data.synthetic_vocab_size=389"]


def run(*command: str) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, *SMALL], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_collectives_under_torchrun():
    """A first import of megatron-core under ZeRO 3, too: nothing is imported before."""
    found = run("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m",
                "benchmarks.benchmark_collectives", "configs/owt_124m.yaml", "deepspeed.zero_optimization.stage=3",
                "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
    assert {key: size for key, size in found["counted"].items() if not key.startswith("scalars")} == {
        key: size for key, size in found["formula"].items() if not key.startswith("scalars")}
    assert found["counted"]["reduce_scatter tensor"] > 0
    assert found["state"]["optimizer"] == 3 * found["state"]["weights"]


def test_synthetic_alone():
    found = run("benchmarks/benchmark_synthetic.py", "configs/owt_124m.yaml", "--seconds", "0.5", "--warmup", "1")
    assert found["ranks"] == 1 and found["device"] == "cpu" and found["mfu"] is None
    assert found["steps"] >= 3 and found["accumulation"] == 4
    assert found["tokens_per_second"] == pytest.approx(8 * 16 / found["step_ms"] * 1e3, rel=1e-6)
    assert 0.3 < found["selected_share"] < 0.7 and 4 < found["loss_per_token"] < 9
    assert 1e8 < 1e9 * found["peak_memory_gb"] < 2e9

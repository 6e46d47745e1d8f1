"""One cluster a session, a run folder a test, and the run that nothing disturbed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster, status, why_not

TINY = ("model.num_layers=2 model.hidden_size=32 model.num_heads=4 model.seq_len=16 data.train=synthetic "
        "data.synthetic_vocab_size=50 data.validation=null train.global_batch_size=8 train.micro_batch_size=4 "
        "train.precision=fp32 train.log_every=1 train.eval_every=0 train.save_every=4 train.keep_every=0 "
        "train.device=cpu parallel.tensor_parallel_size=2 deepspeed.zero_optimization.stage=3 optimizer.eps=1e-5 "
        "optimizer.warmup_steps=2").split()


@pytest.fixture(scope="session")
def cluster():
    """16 nodes of 8 pretended GPUs; jobs use two or three. Skips where Slurm cannot run."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(os.environ.get("DLM_TEST_CLUSTER") or tempfile.mkdtemp(prefix="dlm_slurm_", dir="/tmp"))
    running = Cluster(folder, nodes=16)
    yield running
    running.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """`undisturbed(steps)`: the weights' hash of a plain run of four processes (or `ranks`), without Slurm; of
    configs/owt_124m.yaml or another config, made tiny."""
    hashes = {}

    def of(steps: int, *overrides: str, ranks: int = 4, config: str = "owt_124m") -> str:
        key = (steps, overrides, ranks, config)
        if key not in hashes:
            out = tmp_path_factory.mktemp("plain") / "run"
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m",
                     "dlm_scale.train", f"configs/{config}.yaml", *TINY, f"train.num_steps={steps}", f"train.out={out}",
                     *overrides]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stderr[-3000:]
            hashes[key] = status(out)["weights_hash"]
        return hashes[key]

    return of

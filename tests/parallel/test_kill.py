"""A rank that is killed ends the job soon, under every launcher, and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.forked import free_port

ROOT = Path(__file__).parents[2]
TOKEN = "DLM_TEST_TOKEN"
CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_heads: 4, seq_len: 16}
data: {train: synthetic, synthetic_vocab_size: 50}
train: {global_batch_size: 8, micro_batch_size: 4, num_steps: 1000000, precision: fp32, log_every: 1, save_every: 0,
        device: cpu, out: run}
optimizer: {learning_rate: 1e-3}
deepspeed: {zero_optimization: {stage: 1}}
"""
LAUNCHERS = {  # what starts both ranks
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT", "-m"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module"],
}
NAMED = {  # where the rank is named
    "torchrun": r"rank +: RANK .*\n.*exitcode +: -9",
    "deepspeed": r"--local_rank=RANK.* exits with return code = -9",
    "srun": r"no answer from ranks \[RANK\]",
}
SECONDS = {"torchrun": 15.0, "srun": 15.0, "deepspeed": 32.0}


class Job:
    """The processes of one launch; those that inherit its token belong to it."""

    def __init__(self, folder: Path):
        self.folder, self.token, self.parents = folder, uuid.uuid4().hex, []
        (folder / "config.yaml").write_text(CONFIG)

    def start(self, *command: str, **environment: str) -> None:
        everything = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), TOKEN: self.token} | environment
        output = open(self.folder / f"output{len(self.parents)}.txt", "w")
        command = (sys.executable, *command, "dlm_scale.train", "config.yaml")
        self.parents.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, cwd=self.folder,
                                             stderr=subprocess.STDOUT, env=everything, start_new_session=True))

    def processes(self) -> dict[int, dict[str, str]]:
        """{pid: environment} of all that live."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                except OSError:
                    continue
                environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if environment.get(TOKEN) == self.token and state != "Z":
                    found[int(entry.name)] = environment
        return found

    def pid_of_rank(self, rank: int) -> int:
        for pid, environment in self.processes().items():
            if environment.get("RANK", environment.get("SLURM_PROCID")) == str(rank):
                return pid
        raise AssertionError(f"no process of rank {rank}: {self.output()}")

    def wait_for_steps(self, seconds: float = 90.0) -> None:
        deadline, metrics = time.monotonic() + seconds, self.folder / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"loss"') < 3:
            assert time.monotonic() < deadline and self.processes(), self.output()
            time.sleep(0.2)

    def wait_for_end(self, seconds: float) -> float:
        """Seconds until no process of the job lives (at most `seconds`, then those that do are killed)."""
        started = time.monotonic()
        while (alive := [p for p in self.parents if p.poll() is None]) or self.processes():
            if time.monotonic() > started + seconds:
                break
            time.sleep(0.1)
        took = time.monotonic() - started
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for parent in alive:
            parent.wait()
        return took

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("output*.txt")))


def launch(job: Job, launcher: str) -> None:
    port = str(free_port())
    if launcher != "srun":
        job.start(*(port if a == "PORT" else a for a in LAUNCHERS[launcher]))
        return
    for rank in ("0", "1"):
        job.start("-m", SLURM_PROCID=rank, SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID=rank, SLURM_JOB_ID="1",
                  SLURM_STEP_NODELIST="localhost", SLURM_STEP_TASKS_PER_NODE="2", MASTER_PORT=port)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("deepspeed", 1), ("srun", 1), ("srun", 0)])
def test_a_killed_rank_ends_the_job(launcher, rank, tmp_path):
    job = Job(tmp_path)
    launch(job, launcher)
    try:
        job.wait_for_steps()
        os.kill(job.pid_of_rank(rank), signal.SIGKILL)
        took = job.wait_for_end(SECONDS[launcher])
        print(f"{launcher}, rank {rank}: {took:.1f} s")
        assert took < SECONDS[launcher], job.output()[-3000:]
        assert all(parent.returncode for parent in job.parents)
        assert re.search(NAMED[launcher].replace("RANK", str(rank)), job.output()), job.output()[-3000:]
    finally:
        job.wait_for_end(0.0)

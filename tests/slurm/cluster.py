"""The test cluster as a value: jobs by real sbatch, waits with deadlines, processes to kill, logs for a failure."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
INJECTED = Path(__file__).with_name("injected")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--mem=2G", "--time=20",
         "--signal=B:USR1@60")


def why_not() -> str | None:
    """Why no cluster can run here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): `make test-slurm` installs it"
    if os.geteuid() != 0:
        return "the test cluster needs root, for the nodes' namespaces"
    probe = subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here ({probe.stderr.strip()})" if probe.returncode else None


class Cluster:
    """`cluster.sh` with a folder and ports of its own."""

    def __init__(self, folder: Path, nodes: int):
        self.folder = folder
        port = 27000 + os.getpid() % 500 * 20
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "DLM"))}
        self.environment |= {
            "DLM_TEST_CLUSTER": str(folder), "DLM_TEST_CLUSTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "SLURM_CONF": f"{folder}/slurm.conf", "DLM_PYTHON": sys.executable, "DLM_PREFLIGHT_SLOW": "0.02"}
        self.call("up", str(nodes), "8")

    def call(self, *words: str) -> None:
        done = subprocess.run([str(SCRIPT), *words], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess:
        """A command of Slurm's, or any other, as a user of this cluster."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, cwd=ROOT,
                              **options)

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: Any) -> Job:
        """`sbatch OPTIONS slurm/SCRIPT ARGUMENTS`; `environment`: variables of the job."""
        number = sum(1 for _ in self.folder.glob("job_*.log"))
        log = self.folder / f"job_{number}.log"
        log.touch()
        site = self.folder / f"site_{number}.sh"
        site.write_text("".join(f"export {key}={value}\n" for key, value in environment.items())
                        + f"export PYTHONPATH={INJECTED}:$PYTHONPATH\n")
        words = ["sbatch", "--parsable", f"--output={log}", *options, f"slurm/{script}", *arguments]
        self.environment["DLM_SITE"] = str(site)
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), log)

    def close(self) -> None:
        self.run("scancel", "--user=root")
        self.call("down")


class Job:
    """A submitted job, or a job array."""

    def __init__(self, cluster: Cluster, number: str, log: Path):
        self.cluster, self.number, self.log = cluster, number, log

    def state(self) -> str:
        """Slurm's word for it, of an array that of the first link that is not over; `GONE` once it is forgotten."""
        shown = self.cluster.run("scontrol", "show", "job", self.number).stdout
        states = re.findall(r"JobState=(\w+)", shown)
        waiting = [state for state in states if state in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED")]
        return next(iter(waiting or states), "GONE")

    def exit_code(self) -> int:
        return int(re.findall(r"ExitCode=(\d+):", self.cluster.run("scontrol", "show", "job", self.number).stdout)[0])

    def wait(self, seconds: float = 400) -> str:
        """The last state, once the job is over."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "GONE")
        return self.until(lambda: (state := self.state()) in over and state, "the end of the job", seconds)

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := holds()):
            assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{self.report()}"
            time.sleep(0.2)
        return value

    def until_step(self, run: Path, step: int, seconds: float = 240) -> None:
        """Until a checkpoint stands and metrics.jsonl has a line of `step`."""
        def has_come() -> bool:
            path = run / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            return any(f'{{"step": {step}, "tokens"' in line for line in lines)

        self.until(has_come, f"step {step} of {run}", seconds)
        self.until(lambda: any((run / "checkpoints").glob("step_????????")), f"checkpoint of {run}", seconds)

    def processes(self, name: str, rank: int | None = None) -> list[int]:
        """Process numbers of this job on this machine whose command line holds `name`; those of one rank."""
        return [pid for pid, words, env in _processes(self.cluster.environment["SLURM_CONF"])
                if env.get("SLURM_JOB_ID") == self.number and any(name in word for word in words)
                and (rank is None or env.get("SLURM_PROCID") == str(rank))]

    def kill(self, name: str, rank: int | None = None) -> None:
        """kill -9 of the processes that `name` and `rank` mean; there must be some."""
        found = self.until(lambda: self.processes(name, rank), f"process {name} of rank {rank}", 30)
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def kill_task(self, task: int, name: str) -> None:
        """kill -9 of the processes of one task of this array whose command line holds `name`."""
        found = [pid for pid, words, env in _processes(self.cluster.environment["SLURM_CONF"])
                 if env.get("SLURM_ARRAY_JOB_ID") == self.number and env.get("SLURM_ARRAY_TASK_ID") == str(task)
                 and any(name in word for word in words[:3])]
        assert found, self.report()
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def report(self) -> str:
        """What a failure needs: the job's log, its state, the controller's last words."""
        controller = (self.cluster.folder / "log" / "slurmctld.log").read_text().splitlines()[-25:]
        queue = self.cluster.run("squeue").stdout
        return "\n".join(["--- job", self.log.read_text()[-4000:], "--- queue", queue, "--- slurmctld", *controller])


def _processes(configuration: str) -> Iterator[tuple[int, list[str], dict[str, str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if env.get("SLURM_CONF") == configuration:
                yield int(folder.name), words, env


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def attempts(run: Path, event: str = "begin") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "slurm" / "attempts.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]

"""The launchers start the same program: same numbers, no compiler needed, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.test_training import lines, run, status
from tests.forked import free_port

ROOT = Path(__file__).parents[2]


def without_compilers(folder: Path) -> str:
    """A PATH with this interpreter's folder name and the few tools that the launchers call; no compiler on it."""
    folder.mkdir()
    for tool in ("python", "python3", "hostname", "bash", "sh", "which", "uname"):
        found = Path(sys.executable).parent / tool
        places = [found, Path("/usr/bin") / tool, Path("/bin") / tool]
        (folder / tool).symlink_to(next((p for p in places if p.exists()), found))
    return str(folder)


@pytest.fixture(scope="module")
def reference(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    assert run(config_file, out, "train.num_steps=4") == 0
    return lines(out)


LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT", "-m"],
    "plain": ["-m"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_trains(launcher, reference, config_file, tmp_path):
    before = set(os.listdir("/dev/shm"))
    arguments = [str(free_port()) if a == "PORT" else a for a in LAUNCHERS[launcher]]
    overrides = ["train.num_steps=4", f"--train.out={tmp_path}/run", "--train.device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CC", "CXX"))}
    environment |= {"PATH": without_compilers(tmp_path / "bin"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments, "dlm_scale.train", str(config_file), *overrides], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert status(tmp_path / "run")["status"] == "finished"
    for ours, theirs in zip(lines(tmp_path / "run"), reference, strict=True):
        assert ours.get("batch_hash") == theirs.get("batch_hash")
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), abs=1e-5)
    assert "ninja" not in done.stderr and "-laio" not in done.stderr
    assert set(os.listdir("/dev/shm")) <= before
    said = [line for line in done.stderr.splitlines() if "validation nelbo" in line]
    assert len(said) == 2  # step 0 and the end, by rank 0 alone


def test_under_a_launcher_a_config_error_is_said_once(config_file, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
               str(free_port()), "-m", "dlm_scale.train", str(config_file), "train.num_step=4"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert sum("dlm: error:" in line for line in done.stderr.splitlines()) == 1
    assert "did you mean train.num_steps" in done.stderr

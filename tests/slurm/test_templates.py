"""The scripts themselves: what render writes, what shellcheck and sbatch say. The last two skip without the tools."""

import shutil
import subprocess

import pytest

from dlm_scale import cli
from tests.slurm.cluster import ROOT

TEMPLATES = sorted((ROOT / "slurm").glob("[!_]*.sh"))
RENDERED = {
    "owt_124m": [],
    "llada_1b": ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true",
                 "deepspeed.zero_optimization.stage=3", "--nodes=4"],
    "llada_8b": ["parallel.tensor_parallel_size=8", "parallel.sequence_parallel=true", "--nodes=16"],
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_is_what_render_writes(name, capsys):
    assert cli.main(["slurm", "render", f"configs/{name}.yaml", *RENDERED[name]]) == 0
    assert capsys.readouterr().out == (ROOT / "slurm" / f"{name}.sh").read_text()


def test_render_writes_a_file_once(tmp_path, capsys):
    words = ["slurm", "render", "configs/shakespeare_char.yaml", "--gpus-per-node=0", "--partition=cpu", "--account=a",
             "--time=1:00:00", f"--out={tmp_path}/job.sh"]
    assert cli.main(words) == 0
    text = (tmp_path / "job.sh").read_text()
    assert {"#SBATCH --partition=cpu", "#SBATCH --account=a", "#SBATCH --time=1:00:00"} <= set(text.splitlines())
    assert "gpus-per-node" not in text and "--array" not in text
    assert cli.main(words) == 2 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["parallel.tensor_parallel_size=4", "--gpus_per_node=6"], "does not divide the 6"),
    (["parallel.tensor_parallel_size=4", "--nodes=2", "--gpus_per_node=6"], "of a"),
    (["--nodes=5"], "global_batch_size"),
    (["optimizer.learning_rat=1"], "did you mean"),
])
def test_render_refuses_what_does_not_fit(words, said, capsys):
    assert cli.main(["slurm", "render", "configs/owt_124m.yaml", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("path", [*TEMPLATES, ROOT / "slurm" / "_common.sh", ROOT / "tests/slurm/cluster.sh"],
                         ids=lambda p: p.name)
def test_shellcheck_is_content(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: `make test-slurm` installs it")
    done = subprocess.run(["shellcheck", "--external-sources", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_no_template_claims_what_was_not_measured(path):
    text = path.read_text()
    assert "not been measured" in text and "set -e" not in text.replace("set -euo", "")
    assert path.stat().st_mode & 0o111


@pytest.mark.slurm
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_sbatch_accepts_a_template_as_it_stands(path, cluster):
    done = cluster.run("sbatch", "--test-only", f"slurm/{path.name}")
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


@pytest.mark.slurm
def test_a_job_says_where_it_looked_for_the_repository(cluster, tmp_path):
    done = subprocess.run(["sbatch", "--parsable", f"--output={tmp_path}/log", "--gpus-per-node=0", "--mem=1G",
                           "--ntasks-per-node=1", ROOT / "slurm" / "owt_124m.sh"], cwd=tmp_path, text=True,
                          env=cluster.environment, capture_output=True, timeout=60)
    from tests.slurm.cluster import Job

    job = Job(cluster, done.stdout.strip(), tmp_path / "log")
    assert job.wait(60) == "FAILED" and job.exit_code() == 2
    assert f"no slurm/_common.sh in {tmp_path}: submit there, or set DLM_ROOT" in job.log.read_text()

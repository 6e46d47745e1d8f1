"""The scripts that run one process a task: arrays over files and prompts, evaluation, conversion, on a real Slurm."""

import json
import subprocess
import sys

import pytest

from tests.slurm.cluster import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
SMALL = ("--mem=1G", "--cpus-per-task=1")
NO_GPU, A_GPU = (*SMALL, "--gpus-per-node=0"), (*SMALL, "--gpus-per-node=1")
SAMPLING = ("--batch_size=2", "--max_new_tokens=48", "--steps=48", "--seed=3", "--device=cpu")


def needs(*paths):
    missing = [path for path in paths if not (ROOT / path).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not there yet")


def python(*words, **options):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=400,
                          **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(5):
        (folder / f"{i}.txt").write_text("\n\n".join(f"Document {i}.{j}: to be or not to be." for j in range(200)))
    return sorted(folder.glob("*.txt"))


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """A run folder, of a few steps on one of the texts."""
    folder = tmp_path_factory.mktemp("trained")
    python("-m", "dlm_scale.cli", "prepare", texts[0], "--tokenizer=byte", f"--out={folder}/data")
    python("-m", "dlm_scale.train", "configs/quickstart.yaml", f"data.train={folder}/data/train",
           f"data.validation={folder}/data/val", f"train.out={folder}/run", "train.num_steps=4", "train.device=cpu",
           "train.global_batch_size=4", "train.micro_batch_size=4", "train.eval_rows=4", "train.eval_draws=2",
           "model.seq_len=64", "optimizer.name=adamw", "deepspeed.zero_optimization.stage=0")
    return folder / "run"


def test_an_array_prepares_its_shares(cluster, texts, tmp_path):
    out = tmp_path / "data"
    arguments = [*map(str, texts), "--tokenizer", "byte", f"--out={out}"]
    job = cluster.submit("prepare.sh", *arguments, options=(*SMALL, "--array=0-1"))
    assert job.wait() == "COMPLETED", job.report()
    counts = [json.loads((out / part / "meta.json").read_text()) for part in ("part_0000", "part_0001")]
    assert len(counts) == len(list(out.iterdir())) == 2
    python("-m", "dlm_scale.cli", "prepare", *texts[1::2], "--tokenizer=byte", f"--out={tmp_path}/plain")
    for name in ("train.bin", "train.idx", "val.bin"):
        assert (out / "part_0001" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = cluster.submit("prepare.sh", *arguments, options=(*SMALL, "--array=0-1"))
    assert again.wait() == "COMPLETED" and again.log.read_text().count("is finished") == 2, again.report()
    assert f"data.train=[{{path: {out}/part_0000/train" in again.log.read_text()


@pytest.mark.parametrize(("arguments", "said"), [(["x.txt", "--tokenizer=byte"], "--out is missing"),
                                                 (["x.txt", "--out=somewhere"], "1 files for 2 tasks")])
def test_a_wrong_preparation_is_not_requeued(arguments, said, cluster):
    job = cluster.submit("prepare.sh", *arguments, options=(*SMALL, "--array=0-1"))
    assert job.wait(60) == "FAILED" and job.exit_code() == 2 and said in job.log.read_text()


def numbers(report):
    return {key: value for key, value in report.items() if isinstance(value, int | float)}


def test_evaluation_on_two_nodes_equals_one_process(cluster, trained):
    words = [str(trained), "--device=cpu", "--max_rows=8", "--num_draws=2", "--batch_size=2", "--json"]
    job = cluster.submit("evaluate.sh", *words, options=(*A_GPU, "--nodes=2"))
    assert job.wait() == "COMPLETED", job.report()
    found = [json.loads(line) for line in job.log.read_text().splitlines() if line.startswith("{")]
    expected = json.loads(python("-m", "dlm_scale.cli", "evaluate", *words).splitlines()[-1])
    assert len(found) == 1 and numbers(found[0]) == pytest.approx(numbers(expected), rel=1e-6)


@needs("tools/sample_batch.py")
def test_an_array_of_which_a_task_is_killed_samples_what_one_process_samples(cluster, trained, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Document {i}"}) + "\n" for i in range(64)))
    python("tools/sample_batch.py", trained, f"--input={prompts}", f"--output={tmp_path}/plain.jsonl", *SAMPLING)
    job = cluster.submit("sample.sh", str(trained), f"--input={prompts}", f"--output={tmp_path}/out.jsonl", *SAMPLING,
                         options=A_GPU)
    parts = tmp_path / "out.jsonl.state" / "parts"
    job.until(lambda: any(path.stat().st_size for path in parts.glob("worker_00003_*")), "a result of task 3")
    job.kill_task(3, "sample_batch.py")
    assert job.wait(600) == "COMPLETED", job.report()
    assert "exit code 137" in job.log.read_text()
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


@needs("tools/convert_checkpoint.py")
def test_a_conversion_waits_for_its_checkpoint(cluster, trained, tmp_path):
    before = cluster.run("sbatch", "--parsable", "--mem=1G", f"--output={tmp_path}/log", "--wrap=sleep 5").stdout.strip()
    job = cluster.submit("convert.sh", str(trained), str(tmp_path / "out"), "--to=hf",
                         options=(*SMALL, f"--dependency=afterok:{before}"))
    assert job.state() == "PENDING"
    assert job.wait() == "COMPLETED", job.report()
    assert list((tmp_path / "out").glob("*.safetensors"))

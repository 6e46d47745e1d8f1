"""Whole jobs on a real Slurm: two nodes of two ranks, ZeRO 3 x tensor parallel 2, by sbatch of the templates as they
are. However a job is disturbed, its weights are those of four plain processes that nothing disturbed."""

import math
import time

import pytest

from dlm_scale.slurm import describe_run
from tests.slurm.cluster import SMALL, attempts, status
from tests.slurm.conftest import TINY

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
STEPS = 24


def start(cluster, run, *overrides, steps=STEPS, script="owt_124m.sh", options=(), preflight=0, sleep=0.2, **variables):
    arguments = [*TINY, f"train.num_steps={steps}", f"train.out={run}", *overrides]
    return cluster.submit(script, *arguments, options=(*SMALL, *options), DLM_PREFLIGHT=preflight,
                          DLM_TEST_SLEEP=sleep, **variables)


def assert_same_weights(job, run, expected):
    assert job.wait(600) == "COMPLETED", job.report()
    assert (status(run)["status"], status(run)["weights_hash"]) == ("finished", expected), job.report()


def test_a_job_equals_plain_processes(cluster, undisturbed, tmp_path):
    expected = undisturbed(STEPS)
    job = start(cluster, tmp_path / "run", preflight=1, sleep=0)
    assert_same_weights(job, tmp_path / "run", expected)
    assert "preflight: all-reduce of 32 MB over all ranks" in job.log.read_text()
    logs = tmp_path / "run" / "slurm" / "logs" / f"{job.number}.0"
    assert {f"{rank}.log" for rank in range(4)} | {"job.txt"} <= {path.name for path in logs.iterdir()}
    report = describe_run(tmp_path / "run", 0.0)
    assert (report["step"], report["seconds_left"], report["requeues"]) == (STEPS, 0.0, 0)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_on_each_node_gives_the_same(launcher, cluster, undisturbed, tmp_path):
    job = start(cluster, tmp_path / "run", sleep=0, DLM_LAUNCHER=launcher)
    assert_same_weights(job, tmp_path / "run", undisturbed(STEPS))


@pytest.mark.parametrize(("what", "rank"), [("dlm_scale.train", 3), ("srun", None)], ids=["rank", "step"])
def test_a_kill_is_requeued_and_resumed(what, rank, cluster, undisturbed, tmp_path):
    expected = undisturbed(STEPS)
    job = start(cluster, tmp_path / "run")
    job.until_step(tmp_path / "run", 9)
    job.kill(what, rank)
    assert_same_weights(job, tmp_path / "run", expected)
    first, second = attempts(tmp_path / "run")
    assert (first["attempt"], second["attempt"]) == (f"{job.number}.0", f"{job.number}.1")
    assert second["step"] >= 4


@pytest.mark.parametrize("node", [0, 1], ids=["the first node", "another node"])
def test_a_power_failure_of_a_node_is_requeued_and_resumed(node, cluster, undisturbed, tmp_path):
    expected = undisturbed(STEPS)
    job = start(cluster, tmp_path / "run")
    job.until_step(tmp_path / "run", 9)
    name = nodes_of(cluster, attempts(tmp_path / "run")[0])[node]
    cluster.call("kill-node", name)
    try:
        assert_same_weights(job, tmp_path / "run", expected)
        assert name not in nodes_of(cluster, attempts(tmp_path / "run")[-1])
    finally:
        cluster.call("start-node", name)
    assert len(attempts(tmp_path / "run")) == 2
    assert "Invalid generic resource" not in job.log.read_text()


def nodes_of(cluster, attempt):
    return cluster.run("scontrol", "show", "hostnames", attempt["nodes"]).stdout.split()


def test_a_chain_goes_on_in_its_next_link(cluster, undisturbed, tmp_path):
    """The default of several nodes with GPUs: a node is lost, the next link goes on elsewhere, the third has nothing
    left to do, and no GPU stays booked."""
    expected = undisturbed(STEPS, "parallel.sequence_parallel=true", config="llada_1b")
    job = start(cluster, tmp_path / "run", options=("--array=1-3%1", "--no-requeue"), script="llada_1b.sh")
    job.until_step(tmp_path / "run", 9)
    name = nodes_of(cluster, attempts(tmp_path / "run")[0])[1]
    cluster.call("kill-node", name)
    try:
        job.wait()
    finally:
        cluster.call("start-node", name)
    assert status(tmp_path / "run")["weights_hash"] == expected, job.report()
    assert [line["chain"] for line in attempts(tmp_path / "run")] == [job.number] * 2
    assert "nothing left to do" in job.log.read_text()
    used = cluster.run("sinfo", "-h", "-O", "GresUsed:40").stdout.split()
    assert all(word.startswith("gpu:0") for word in used), used


@pytest.mark.timeout(3600)
def test_the_time_limit_three_times_over(cluster, undisturbed, tmp_path):
    """Steps of 3 seconds that make up three times the limit, which leaves room for four starts on this machine: each
    attempt has its checkpoint before the limit. Two ranks on two nodes."""
    alone = ("parallel.tensor_parallel_size=1",)
    begun = time.monotonic()
    undisturbed(3, *alone, ranks=2)
    minutes = max(2, math.ceil(4 * (time.monotonic() - begun) / 60))
    steps, run = 60 * minutes, tmp_path / "run"
    expected = undisturbed(steps, *alone, ranks=2)
    options = ("--ntasks-per-node=1", "--gpus-per-node=1", f"--time={minutes}", f"--signal=B:USR1@{15 * minutes}")
    job = start(cluster, run, *alone, options=options, steps=steps, sleep=3, DLM_ATTEMPTS=6)
    assert job.wait(3000) == "COMPLETED", job.report()
    assert status(run)["weights_hash"] == expected
    begins, ends = attempts(run), attempts(run, "end")
    assert len(ends) >= 4 and {end["outcome"] for end in ends[:-1]} == {"stopped"}
    assert all(end["time"] - begin["time"] <= 60 * minutes for begin, end in zip(begins, ends, strict=True))
    assert "DUE TO TIME LIMIT" not in job.log.read_text()


def test_preemption(cluster, undisturbed, tmp_path):
    expected = undisturbed(STEPS)
    job = start(cluster, tmp_path / "run", sleep=0.5)
    job.until_step(tmp_path / "run", 6)
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=16", "--exclusive", "--time=1",
                         f"--output={tmp_path}/urgent.log", "--wrap=sleep 3").stdout.strip()
    assert_same_weights(job, tmp_path / "run", expected)
    assert "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", urgent).stdout
    first, second = attempts(tmp_path / "run")
    assert second["step"] >= 6 > first["step"], job.report()


def test_a_cancelled_job_stays_ended(cluster, tmp_path):
    job = start(cluster, tmp_path / "run", sleep=1, steps=100)
    job.until_step(tmp_path / "run", 5)
    cluster.run("scancel", job.number)
    assert job.wait() == "CANCELLED", job.report()
    time.sleep(15)  # longer than a requeued job is held back
    assert job.state() == "CANCELLED" and len(attempts(tmp_path / "run")) == 1, job.report()


def test_a_crash_loop_ends(cluster, tmp_path):
    job = start(cluster, tmp_path / "run", DLM_TEST_CRASH=6, DLM_ATTEMPTS=2, sleep=0)
    assert job.wait() == "FAILED", job.report()
    assert len(attempts(tmp_path / "run")) == 3  # the first brought a checkpoint
    last = job.log.read_text().splitlines()[-1]
    assert "giving up after 2 attempts in a row without a new checkpoint" in last and "injected at step 6" in last


@pytest.mark.parametrize(("override", "said"), [
    ("train.num_stps=3", "did you mean train.num_steps"),
    ("parallel.tensor_parallel_size=4", "does not divide the 2 ranks of a node"),
    ("train.device=auto", "GPUs but 2 tasks a node"),
])
def test_a_wrong_config_is_not_requeued(override, said, cluster, tmp_path):
    options = ("--gpus-per-node=4",) if "device" in override else ()
    job = start(cluster, tmp_path / "run", override, options=options)
    assert job.wait() == "FAILED" and job.exit_code() == 2, job.report()
    assert said in job.log.read_text() and "Restarts=0" in cluster.run("scontrol", "show", "job", job.number).stdout


def test_a_folder_in_use_is_not_tried_again(cluster, tmp_path):
    """Only the ranks find that out: no launcher need hand their exit code on."""
    first = start(cluster, tmp_path / "run", sleep=1, steps=100)
    first.until_step(tmp_path / "run", 5)
    second = start(cluster, tmp_path / "run", steps=100)
    assert second.wait() == "FAILED" and second.exit_code() == 2, second.report()
    assert "is in use by process" in second.log.read_text()
    (tmp_path / "run" / "control" / "stop").touch()
    assert first.wait() == "COMPLETED", first.report()
    assert "stopped at step" in first.log.read_text() and "not continued" in first.log.read_text()


def test_preflight_excludes_a_node_that_does_not_see_the_run_folder(cluster, undisturbed, tmp_path):
    expected = undisturbed(STEPS)
    place = tmp_path / "shared"
    place.mkdir()
    leader = (cluster.folder / "n2.pid").read_text().split()[0]
    inside = cluster.run("pgrep", "-P", leader).stdout.split()[0]
    enter = ("nsenter", f"--target={inside}", "--mount")
    assert cluster.run(*enter, "mount", "-t", "tmpfs", "none", str(place)).returncode == 0
    try:
        job = start(cluster, place / "run", preflight=1, sleep=0, DLM_PREFLIGHT_SECONDS=120)  # Slurm takes n1 and n2
        job.until(lambda: "excluding n2" in job.log.read_text(), "exclusion", 300)
        assert_same_weights(job, place / "run", expected)
    finally:
        cluster.run(*enter, "umount", str(place))
    assert "n2" not in nodes_of(cluster, attempts(place / "run")[-1])

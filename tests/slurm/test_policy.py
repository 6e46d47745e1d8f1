"""What follows an attempt, which node is bad, how a run stands: pure functions, without Slurm."""

import json

import pytest

from dlm_scale import cli, slurm
from dlm_scale.preflight import _groups, find_faults, inspect_node
from dlm_scale.slurm import Ended, fruitless_attempts, judge
from tests.engine.reliability import train
from tests.slurm.cluster import ROOT

CONFIG = ROOT / "configs" / "owt_124m.yaml"

FINISHED = {"status": "finished", "step": 9, "weights_hash": "abc", "attempt": 1}


def stopped(reason):
    return {"status": "stopped", "step": 5, "reason": reason, "attempt": 1}


@pytest.mark.parametrize(("ended", "action", "said"), [
    (Ended(FINISHED, 9), "finished", "abc"),
    (Ended(FINISHED, 9, exit_code=143, was_asked=True), "finished", "step 9"),
    (Ended(stopped("control/stop"), 5, was_asked=True), "stopped", "step 5"),
    (Ended(stopped("SIGUSR1"), 5), "stopped", "step 5"),
    (Ended(stopped("control/stop"), 5), "halted", "not continued"),
    (Ended(stopped("stop_at_step"), 5, was_asked=True), "halted", "stop_at_step"),
    (Ended(stopped("SIGTERM"), 5, was_terminated=True), "left", "Slurm"),
    (Ended({}, -1, was_asked=True), "stopped", "before training"),
    (Ended({}, 5, exit_code=137), "crashed", "exit code 137 without a word"),
    (Ended({"status": "failed", "error": "boom"}, 5, exit_code=1), "crashed", "boom"),
    (Ended({"status": "running"}, 5, exit_code=1), "crashed", "step 5"),
    (Ended({"status": "failed", "error": "boom"}, 5, fruitless=3), "failed", "giving up after 3 attempts"),
    (Ended(stopped("SIGUSR1"), 5, fruitless=3), "failed", "DLM_ATTEMPTS=3"),
    (Ended({}, 5, refusal="in use", fruitless=3), "refused", "not tried again: in use"),
    (Ended({}, -1, excluded="n2,n3"), "excluded", "n2,n3"),
    (Ended({}, -1, excluded="n2,n3", fruitless=3), "failed", "n2,n3"),
])  # fmt: skip
def test_what_follows_an_attempt(ended, action, said):
    verdict = judge(ended)
    assert verdict.action == action and said in verdict.message


def lines(*attempts):
    """begin and end lines of (step at its beginning, outcome); no outcome: the node died, and nothing was written."""
    for number, (step, outcome) in enumerate(attempts):
        yield {"event": "begin", "attempt": f"7.{number}", "step": step}
        if outcome:
            yield {"event": "end", "attempt": f"7.{number}", "outcome": outcome, "step": 99}


@pytest.mark.parametrize(("attempts", "step", "expected"), [
    ([], 5, 0),
    ([(-1, "crashed")], -1, 1),
    ([(-1, "crashed")], 0, 0),
    ([(-1, "crashed"), (4, "crashed")], 4, 1),
    ([(-1, "crashed"), (4, "crashed"), (4, "stopped")], 4, 2),
    ([(4, None), (4, None), (4, "crashed")], 4, 3),
    ([(4, "left"), (4, "crashed"), (4, "left"), (4, "excluded")], 4, 2),
    ([(4, "crashed"), (4, "crashed")], 8, 0),
])  # fmt: skip
def test_attempts_without_a_new_checkpoint_are_counted(attempts, step, expected):
    assert fruitless_attempts(list(lines(*attempts)), step) == expected


def test_half_a_line_of_a_dead_node_is_passed_over(tmp_path):
    first, second = {"event": "begin", "chain": "7", "step": 1}, {"event": "end", "chain": "8", "step": 2}
    slurm._append(tmp_path, first)
    with open(tmp_path / "slurm" / "attempts.jsonl", "a") as file:
        file.write('{"event": "be')
    slurm._append(tmp_path, second)
    assert slurm.read_attempts(tmp_path) == [first, second] and slurm.read_attempts(tmp_path, "8") == [second]


TINY = ("model.num_layers=1 model.hidden_size=16 model.num_heads=2 model.ffn_size=32 model.seq_len=8 "
        "data.train=synthetic data.synthetic_vocab_size=20 data.validation=null train.global_batch_size=4 "
        "train.micro_batch_size=2 train.precision=fp32 train.log_every=1 train.num_steps=6").split()


def test_attempts_of_a_run_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    """The calls that a job script makes, in the order in which it makes them, around real training."""
    run = tmp_path / "a run"
    words = [str(CONFIG), f"train.out={run}", "train.device=cpu", *TINY]
    monkeypatch.setenv("DLM_REFUSAL_FILE", str(tmp_path / "refusal"))

    def begin(restart: int) -> tuple[str, str]:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert cli.main(["slurm", "begin", "--ranks", "1", "--ranks_per_node=1", "--attempts=2", *words]) == 0
        first, message = capsys.readouterr().out.splitlines()
        action, device, folder = first.split(" ", 2)
        assert (device, folder) == ("cpu", str(run))
        return action, message

    def end(asked: int = 0) -> str:
        assert cli.main(["slurm", "end", str(run), "--exit_code=0", f"--asked={asked}", "--terminated=0",
                         "--attempts=2"]) == 0
        return capsys.readouterr().out

    assert begin(0) == ("go", "attempt 1, from scratch")
    (run / "control" / "stop.7").touch()
    assert train(CONFIG, run, *TINY) == [0]
    assert end(asked=1).startswith("stopped stopped at step 0; last checkpoint of step 0")
    assert begin(1) == ("go", "attempt 2, from the checkpoint of step 0")
    assert end().startswith("crashed crashed (exit code 0 without a word")  # status.json is of the attempt before
    assert begin(2)[0] == "go"
    assert train(CONFIG, run, *TINY) == [0]
    assert end().startswith("finished finished at step 6")
    assert begin(3)[0] == "done"
    report = slurm.describe_run(run, now=(run / "checkpoints" / "step_00000006").stat().st_mtime + 60)
    assert (report["step"], report["requeues"], report["last_checkpoint"]) == (6, 2, "checkpoints/step_00000006")
    assert report["seconds_left"] == 0.0 and report["checkpoint_age_seconds"] == 60
    assert report["seconds_a_step"] == pytest.approx(32 / report["tokens_per_second"])
    assert cli.main(["slurm", "status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "finished"


def test_status_of_a_folder_that_is_no_run(tmp_path, capsys):
    assert cli.main(["slurm", "status", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


GOOD = {"token": "7.0", "code": "c", "python": "3", "packages": {"torch": "2"}, "free_run": 1e12, "free_shm": 1e9,
        "free_scratch": 1e10, "gpu": None, "world": 1.0, "node": 100.0, "pair": 10.0, "clock": 1000.0}
GPU = {"wanted": 8, "found": 8, "memory_errors": {"0": 0}, "problem": None, "is_exact": True}


def faults(changes, nodes=("n1", "n2", "n3", "n4"), silent=()):
    """Of two ranks a node; `changes`: node -> what its reports have instead; `silent`: ranks without a report."""
    reports = {rank: GOOD | changes.get(nodes[rank // 2], {}) for rank in range(2 * len(nodes)) if rank not in silent}
    return find_faults(reports, nodes, 2 * len(nodes))


@pytest.mark.parametrize(("change", "said"), [
    ({"free_shm": 1e6}, "/dev/shm has 1 MB"),
    ({"free_scratch": 1e8}, "scratch disk has 100 MB"),
    ({"gpu": GPU | {"found": 7}}, "7 of 8 GPUs"),
    ({"gpu": GPU | {"is_exact": False}}, "multiplies wrongly"),
    ({"gpu": GPU | {"problem": "CUDA error: out of memory"}}, "CUDA error"),
    ({"gpu": GPU | {"memory_errors": {"0": 0, "3": 2}}}, "{'3': 2}"),
    ({"token": "6.0"}, "token"),
    ({"code": "d"}, 'code "d" where the others have "c"'),
    ({"packages": {"torch": "1"}}, "packages"),
    ({"clock": 1100.0}, "100 s off"),
    ({"node": 40.0}, "between its own GPUs at 0.4"),
    ({"pair": 4.0}, "to the nodes beside it at 0.4"),
])  # fmt: skip
def test_a_bad_node_is_named_with_its_fault(change, said):
    assert faults({}) == {} and faults({"n3": {"gpu": GPU}}) == {}
    found = faults({"n3": change})
    assert list(found) == ["n3"] and said in found["n3"][0]


def test_a_silent_node_is_bad_and_those_that_waited_for_it_are_not():
    unmet = {"world": None, "node": None, "pair": None, "clock": None}
    nodes = ("n1", "n2", "n3")
    reports = {rank: {k: v for k, v in GOOD.items() if k not in unmet} for rank in range(6) if rank != 5}
    assert list(find_faults(reports, nodes, 6)) == ["n3"]
    assert list(find_faults({**reports, 5: GOOD}, nodes, 6)) == ["n1", "n2", "n3"]


def test_a_report_keeps_what_was_found_before_the_meeting(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (tmp_path / "token").write_text("7.0\n")
    report = inspect_node(tmp_path, "cpu", 0)
    assert (report["host"], report["token"], report["rank"]) == ("n7", "7.0", 0)
    assert set(report) - {"host", "rank"} == set(GOOD) - {"world", "node", "pair", "clock"}


def test_each_node_meets_both_of_its_neighbours():
    assert _groups(["a", "a", "b", "b", "c", "c"]) == {"node": [[0, 1], [2, 3], [4, 5]],
                                                       "pair": [[0, 1, 2, 3], [2, 3, 4, 5]]}


@pytest.mark.parametrize(("nodes", "bad", "code", "printed"), [
    ("n1,n2", {}, 0, ""),
    ("n1,n2", {"n2": {"code": "d"}}, 0, "n2\n"),
    ("n1,n2", {"n1": {"free_shm": 1}, "n2": {"free_shm": 1}}, 2, ""),
    ("n1", {"n1": {"free_shm": 1}}, 0, "n1\n"),
])
def test_judge_prints_bad_nodes_and_refuses_where_none_is_good(nodes, bad, code, printed, tmp_path, capsys, monkeypatch):
    from dlm_scale import preflight

    names = nodes.split(",")
    for rank, node in enumerate(names):
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps(GOOD | bad.get(node, {})))
    monkeypatch.setattr("sys.argv", ["preflight", "judge", str(tmp_path), str(len(names)), nodes])
    assert preflight.main() == code
    assert capsys.readouterr().out == printed

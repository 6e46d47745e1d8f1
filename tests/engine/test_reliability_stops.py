"""Signals, files that ask, dead and hung ranks: how a run ends, and what status.json says about it."""

from __future__ import annotations

import json
import signal
import time

import pytest

from dlm_scale.engine.watchdog import EXIT_HANG, describe_hang
from tests.engine.reliability import (
    Ranks,
    arguments,
    assert_no_secret,
    on_step,
    status,
    train,
    wait_for,
    wait_for_step,
)
from tests.engine.test_training import lines

TWO = ("train.micro_batch_size=2", "train.save_every=4", "data.validation=null")
LONG = ("train.num_steps=100000", "train.save_every=0", "data.validation=null")


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert train(config_file, out, *TWO, ranks=2) == [0, 0]
    return out


def breathe(rank: int = 0) -> None:
    """In this process, steps leave time for what comes between two of them."""
    from dlm_scale.engine import loop

    train_step = loop.train_step
    loop.train_step = lambda *args: (time.sleep(0.05), train_step(*args))[1]


def slow_saves(rank: int) -> None:
    """In this process, saves take half a second."""
    from dlm_scale.engine import async_saving

    write = async_saving.write_staged
    async_saving.write_staged = lambda *args: (time.sleep(0.5), write(*args))[1]


MOMENTS = {  # signals to (rank, number), sent when the line of that step is there; what the ranks are changed by
    "one rank": ([(1, signal.SIGUSR1)], 5, lambda rank: None),
    "during a save, twice, on both": ([(0, signal.SIGINT), (1, signal.SIGUSR2), (0, signal.SIGTERM)], 4, slow_saves),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_signals_stop_all_ranks_at_one_step_and_the_run_goes_on_bit_equal(moment, undisturbed, config_file, tmp_path):
    signals, step, change = MOMENTS[moment]
    with Ranks(2, arguments(config_file, tmp_path, *TWO), lambda rank: [change(rank), breathe()]) as running:
        wait_for_step(tmp_path, step)
        for rank, number in signals:
            running.kill(rank, number)
        assert running.exit_codes() == [0, 0]
    stopped = status(tmp_path)
    assert stopped["status"] == "stopped" and step <= stopped["step"] < 12
    assert stopped["reason"] in {number.name for _, number in signals}
    assert stopped["checkpoint"] == f"checkpoints/step_{stopped['step']:08d}"
    assert train(config_file, tmp_path, *TWO, ranks=2) == [0, 0]
    assert status(tmp_path)["weights_hash"] == status(undisturbed)["weights_hash"]
    assert lines(tmp_path) == lines(undisturbed)


def test_a_signal_while_the_run_starts(config_file, tmp_path):
    with Ranks(1, arguments(config_file, tmp_path)) as running:
        wait_for((tmp_path / "control" / "lock").exists, "the start")
        running.kill(0, signal.SIGTERM)
        assert running.exit_codes() == [0]
    assert status(tmp_path)["status"] == "stopped" and status(tmp_path)["reason"] == "SIGTERM"
    assert (tmp_path / status(tmp_path)["checkpoint"]).is_dir()


def test_files_ask_for_a_save_and_for_the_end(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    control = tmp_path / "control"
    with Ranks(1, arguments(config_file, tmp_path, *LONG), breathe) as running:
        wait_for_step(tmp_path, 2)
        (control / "stop.16").touch()  # another job's
        (control / "save").touch()
        wait_for(lambda: list((tmp_path / "checkpoints").glob("step_????????")), "the checkpoint")
        step = int(next((tmp_path / "checkpoints").glob("step_????????")).name[5:])
        wait_for_step(tmp_path, step + 2)  # it goes on
        (control / "stop.17").touch()
        assert running.exit_codes() == [0]
    assert (status(tmp_path)["status"], status(tmp_path)["reason"]) == ("stopped", "control/stop")
    assert {p.name for p in control.iterdir()} == {"lock", "stop.16"}


def test_a_dead_rank_is_no_graceful_stop(config_file, tmp_path):
    """A launcher turns the death of one rank into SIGTERM for the others."""
    with Ranks(2, arguments(config_file, tmp_path, *LONG, "train.micro_batch_size=2"), breathe) as running:
        wait_for_step(tmp_path, 3)
        running.kill(1, signal.SIGKILL)
        running.kill(0, signal.SIGTERM)
        started = time.monotonic()
        assert running.exit_codes(0) == [1]
        assert time.monotonic() - started < 15.0
    found = status(tmp_path)
    assert found["status"] == "failed" and "no answer from ranks [1]" in found["error"]
    assert "reason" not in found and "SIGTERM" in found["error"]


def test_the_rank_that_fails_first_says_why(config_file, tmp_path):
    def change(rank):
        if rank == 1:
            on_step(3, lambda: [][0])

    assert train(config_file, tmp_path, *TWO, ranks=2, change=change) == [1, 1]
    found = status(tmp_path)
    assert (found["status"], found["rank"]) == ("failed", 1) and "IndexError" in found["error"]
    assert "on_step" in (tmp_path / "logs" / "rank_00001.log").read_text()  # the traceback
    assert "no answer from ranks [1]" in (tmp_path / "train.log").read_text()


def test_a_failed_run_that_starts_again_is_no_longer_failed(config_file, tmp_path):
    assert train(config_file, tmp_path, change=lambda rank: on_step(8, lambda: 1 / 0)) == [1]
    assert status(tmp_path)["status"] == "failed" and status(tmp_path)["checkpoint"] == "checkpoints/step_00000006"
    assert train(config_file, tmp_path) == [0]
    found = status(tmp_path)
    assert found["status"] == "finished" and found["attempt"] == 2 and "error" not in found


def heartbeat(out, rank):
    try:
        return json.loads((out / "logs" / f"heartbeat_rank_{rank}.json").read_text())
    except FileNotFoundError:
        return {}


def sleep_for_ever():
    time.sleep(3600)


HANG_SECONDS = 6
HANG = ("train.micro_batch_size=2", f"train.hang_timeout_seconds={HANG_SECONDS}")


def test_a_stopped_rank_is_named_and_the_others_end(config_file, tmp_path):
    with Ranks(2, arguments(config_file, tmp_path, *LONG, *HANG), breathe) as running:
        wait_for(lambda: heartbeat(tmp_path, 0).get("step", 0) > 1, "a heartbeat")
        running.kill(0, signal.SIGSTOP)
        started = time.monotonic()
        assert running.exit_codes(1) == [EXIT_HANG]
        assert time.monotonic() - started < HANG_SECONDS + 5
        pid = running.processes[0].pid
        assert heartbeat(tmp_path, 0)["pid"] == pid and not heartbeat(tmp_path, 0)["has_fired"]
    found = status(tmp_path)
    assert found["status"] == "failed" and f"frozen or dead (no heartbeat): rank 0 (process {pid} on " in found["error"]
    assert "all_reduce" in (tmp_path / "logs" / "stacks_rank_1.txt").read_text()
    assert_no_secret(tmp_path)


def test_a_hung_rank_is_named_with_its_phase_and_all_leave_their_stacks(config_file, tmp_path):
    def change(rank):
        if rank == 1:
            on_step(4, sleep_for_ever)

    codes = train(config_file, tmp_path, *LONG, *HANG, ranks=2, change=change)
    assert codes == [EXIT_HANG, EXIT_HANG]
    found = status(tmp_path)
    assert found["status"] == "failed" and "hanging: rank 1 (process " in found["error"]
    assert "in data after step 4; the other ranks wait in backward after step 4" in found["error"]
    assert "sleep_for_ever" in (tmp_path / "logs" / "stacks_rank_1.txt").read_text()
    assert "backward" in (tmp_path / "logs" / "stacks_rank_0.txt").read_text()


def test_a_disk_that_hangs_is_named_as_a_save(config_file, tmp_path):
    def change(rank):
        from dlm_scale.engine import async_saving

        async_saving.write_staged = lambda *args: sleep_for_ever()

    codes = train(config_file, tmp_path, "train.save_every=2", HANG[1], change=change)
    assert codes == [EXIT_HANG] and "in save after step 4" in status(tmp_path)["error"]


def test_who_has_entered_the_fewest_phases_is_the_one_that_hangs():
    def place(rank, phase, count, meetings=4):
        return {"rank": rank, "host": "n", "pid": rank, "step": 7, "phase": phase, "count": count,
                "meetings": meetings}

    places = {0: place(0, "backward", 9), 1: place(1, "forward", 8), 2: place(2, "backward", 9)}
    assert "hanging: rank 1 (process 1 on n) in forward after step 7; the other ranks wait in backward" in \
        describe_hang(places, [], 3.0)
    assert "frozen or dead (no heartbeat): rank 2 " in describe_hang(places, [2], 3.0)
    saving = {0: place(0, "save", 9), 1: place(1, "save", 9, meetings=3), 2: place(2, "save", 9)}
    assert "hanging: rank 1 (process 1 on n) in save after step 7; the other" in describe_hang(saving, [], 3.0)


def test_a_run_that_ends_well_leaves_no_stacks(undisturbed):
    assert not list((undisturbed / "logs").glob("stacks*")) and not (undisturbed / "bad_batches").exists()
    assert_no_secret(undisturbed)


def test_a_rank_that_waits_for_another_in_vain_can_be_ended(config_file, tmp_path):
    never_comes = lambda rank: rank and sleep_for_ever()  # noqa: E731
    with Ranks(2, arguments(config_file, tmp_path, "train.micro_batch_size=2"), never_comes) as running:
        wait_for((tmp_path / "control").is_dir, "the start")
        time.sleep(0.5)
        running.kill(0, signal.SIGTERM)
        assert running.exit_codes(0) == [-signal.SIGTERM]

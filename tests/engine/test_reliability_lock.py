"""One job a run folder: who holds it is named, and what a dead one left is recovered."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from dlm_scale.engine.lock import RunLock, _start_of
from dlm_scale.errors import UsageError
from tests.engine.reliability import Ranks, arguments, status, wait_for_step

PATIENCE = 0.4


def _hold(out, pipe) -> None:
    RunLock(out)
    pipe.send(True)
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, theirs), daemon=True)
    process.start()
    assert ours.poll(20)
    yield process
    process.kill()
    process.join()


def leave(out, **changes) -> dict:
    """A lock file as a job of this machine would have left it, but for `changes`."""
    content = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid()), "job": None,
               "since": "2026-01-01 00:00:00", "beats": 7} | changes
    (out / "control").mkdir(exist_ok=True)
    (out / "control" / "lock").write_text(json.dumps(content))
    return content


def test_a_second_job_is_refused_and_the_holder_is_named(holder, tmp_path):
    with pytest.raises(UsageError, match=f"in use by process {holder.pid} on {socket.gethostname()}, since 20"):
        RunLock(tmp_path, PATIENCE)


def test_a_killed_holder_is_no_obstacle(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    RunLock(tmp_path, PATIENCE).release()


def test_a_stopped_holder_still_holds(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(UsageError, match="in use"):
        RunLock(tmp_path, PATIENCE)


def test_a_lock_can_be_taken_again_after_its_release(tmp_path):
    for _ in range(2):
        RunLock(tmp_path, PATIENCE).release()


def test_a_living_holder_that_the_file_system_forgot_still_holds(tmp_path):
    leave(tmp_path)
    with pytest.raises(UsageError, match="in use"):
        RunLock(tmp_path, PATIENCE)


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": "1"}], ids=["no process", "number used again"])
def test_a_dead_holder_of_this_machine_is_recovered(changes, tmp_path):
    leave(tmp_path, **changes)
    RunLock(tmp_path, PATIENCE).release()


def test_a_lock_that_the_file_system_keeps_for_a_dead_holder_is_recovered(tmp_path):
    leave(tmp_path, pid=2**22 + 1)
    with open(tmp_path / "control" / "lock") as ghost:
        fcntl.flock(ghost, fcntl.LOCK_EX)
        lock = RunLock(tmp_path, PATIENCE)
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            RunLock(tmp_path, PATIENCE)
        lock.release()


def test_a_holder_elsewhere_is_known_by_its_heartbeat(tmp_path):
    content = leave(tmp_path, host="elsewhere")
    threading.Timer(PATIENCE / 2, leave, [tmp_path], content | {"beats": 8}).start()
    with pytest.raises(UsageError, match=f"process {os.getpid()} on elsewhere"):
        RunLock(tmp_path, PATIENCE)
    time.sleep(PATIENCE)
    RunLock(tmp_path, PATIENCE).release()


def test_the_last_attempt_of_the_same_slurm_job_has_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    leave(tmp_path, host="elsewhere", job="17")
    started = time.monotonic()
    RunLock(tmp_path, 60.0).release()
    assert time.monotonic() - started < 30.0


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "control").write_text("a file")
    with pytest.raises(UsageError, match="cannot write there"):
        RunLock(tmp_path, PATIENCE)


def test_a_second_run_is_refused_and_the_first_goes_on(config_file, tmp_path):
    argv = arguments(config_file, tmp_path, "train.num_steps=3000", "train.save_every=0", "train.eval_every=0")
    with Ranks(1, argv) as first:
        wait_for_step(tmp_path, 3)
        with Ranks(2, [*argv, "train.micro_batch_size=2"]) as second:
            assert second.exit_codes() == [2, 2]
        assert status(tmp_path)["status"] == "running" and status(tmp_path)["attempt"] == 1
        first.kill(0, signal.SIGTERM)
        assert first.exit_codes() == [0]
    assert status(tmp_path)["status"] == "stopped"

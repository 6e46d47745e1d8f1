"""Checkpoints written behind training: what they hold, one at a time, and what a failure does."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.reader import open_checkpoint
from dlm_scale.checkpoint.writer import CheckpointError, Save
from dlm_scale.engine import async_saving
from dlm_scale.engine.async_saving import Saver
from dlm_scale.engine.run_folder import Metrics, read_metrics
from dlm_scale.engine.state import TrainState
from tests.engine.reliability import arguments, Ranks, status, train, wait_for
from tests.engine.test_training import lines


class Case:
    """A Saver over one tensor of one rank, with a gate in front of the disk."""

    def __init__(self, root, monkeypatch, is_async=True):
        self.tensor, self.said, self.root = torch.zeros(4), [], root
        self.gate, self.errors = threading.Event(), []
        self.gate.set()
        write = async_saving.write_staged

        def gated(save, plan, staged):
            assert self.gate.wait(30)
            if self.errors:
                raise self.errors.pop(0)
            return write(save, plan, staged)

        monkeypatch.setattr(async_saving, "write_staged", gated)
        monkeypatch.setattr(async_saving, "LAST_SAVE_DELAYS", (0.0, 0.0, 0.0, 0.0))
        access = SimpleNamespace(pieces=lambda: iter([Piece("w", "param", (4,), (4,), ((0, 4),), 0, self.tensor)]))
        config = SimpleNamespace(train=SimpleNamespace(async_save=is_async))
        trainer = SimpleNamespace(state_access=access, config=config)
        self.saver = Saver(trainer, self._make, None, lambda: self.said.append("before"),
                           lambda state, path: self.said.append(path.name))

    def _make(self, state):
        return Save(self.root, state.step, 0, 1, lambda value: [value], {}, 2, 0)

    def held(self, path):
        return open_checkpoint(path).read("w").tolist()


@pytest.fixture
def case(tmp_path, monkeypatch):
    return Case(tmp_path, monkeypatch)


def test_what_is_saved_is_the_state_at_the_start_of_the_save(case):
    case.gate.clear()
    case.tensor.fill_(1.0)
    case.saver.start(TrainState(1, 8))
    case.saver.before_update()
    case.tensor.fill_(2.0)  # training goes on
    assert case.saver.durable is None
    case.gate.set()
    case.saver.wait()
    assert case.saver.durable[0] == TrainState(1, 8) and case.held(case.saver.durable[1]) == [1.0] * 4
    assert case.said == ["before", "step_00000001"]


def test_an_update_waits_for_the_copy(case, monkeypatch):
    copy, gate = async_saving.on_host, threading.Event()
    monkeypatch.setattr(async_saving, "on_host", lambda *args: gate.wait(30) and copy(*args))
    case.saver.start(TrainState(1, 8))
    update = threading.Thread(target=case.saver.before_update)
    update.start()
    update.join(0.2)
    assert update.is_alive()
    gate.set()
    update.join(10)
    assert not update.is_alive()
    case.saver.before_update()  # nothing is being copied: at once


def test_a_save_waits_for_the_one_before(case):
    case.gate.clear()
    case.saver.start(TrainState(1, 8))
    second = threading.Thread(target=case.saver.start, args=[TrainState(2, 16)])
    second.start()
    second.join(0.2)
    assert second.is_alive() and case.saver.durable is None
    case.gate.set()
    second.join(10)
    assert case.saver.finish(TrainState(2, 16)).name == "step_00000002"
    assert case.said == ["before", "step_00000001", "before", "step_00000002"]


def test_a_state_is_saved_once(case):
    case.saver.start(TrainState(1, 8))
    case.saver.start(TrainState(1, 8))
    case.saver.finish(TrainState(1, 8))
    assert case.said == ["before", "step_00000001"]


def test_a_failed_save_is_said_and_counted_and_the_next_one_succeeds(case, caplog):
    case.saver.start(TrainState(1, 8))
    case.saver.wait()
    case.errors.append(CheckpointError("disk full"))
    case.saver.start(TrainState(2, 16))
    case.saver.wait()
    assert case.saver.durable[0].step == 1 and case.saver.failures == 1
    assert "SAVE FAILED, training goes on: disk full" in caplog.text and "step_00000001" in caplog.text
    case.saver.start(TrainState(3, 24))
    case.saver.wait()
    assert case.saver.durable[0].step == 3


def test_the_last_save_is_tried_again_and_then_fails(case):
    case.errors += [CheckpointError("disk full")] * 3
    assert case.saver.finish(TrainState(1, 8)).name == "step_00000001"
    case.errors += [CheckpointError("disk full")] * 4
    with pytest.raises(CheckpointError, match="step 2, could not be saved in 4 attempts.*step_00000001"):
        case.saver.finish(TrainState(2, 16))


def test_a_dead_peer_is_no_failed_save(case):
    case.errors.append(RuntimeError("Connection closed by peer"))
    case.saver.start(TrainState(1, 8))
    with pytest.raises(RuntimeError, match="closed by peer"):
        case.saver.wait()


def test_no_memory_for_the_copy_is_a_failed_save(case, monkeypatch, caplog):
    monkeypatch.setattr(case.saver, "_buffers", [])
    monkeypatch.setattr(torch, "empty", lambda *args, **options: (_ for _ in ()).throw(MemoryError("no room")))
    case.saver.start(TrainState(1, 8))
    case.saver.wait()
    assert case.saver.failures == 1 and "no room" in caplog.text


def test_a_synchronous_save_is_on_the_disk_when_it_returns(tmp_path, monkeypatch):
    case = Case(tmp_path, monkeypatch, is_async=False)
    case.saver.start(TrainState(1, 8))
    assert case.saver.durable[1].name == "step_00000001"


def test_both_ways_of_saving_give_the_same_run(config_file, tmp_path):
    for name in ("true", "false"):
        assert train(config_file, tmp_path / name, f"train.async_save={name}", "train.save_every=2") == [0]
    assert status(tmp_path / "true")["weights_hash"] == status(tmp_path / "false")["weights_hash"]
    assert lines(tmp_path / "true") == lines(tmp_path / "false")


def fail_saves(at: set[int]):
    """In this process, let the saves with these numbers (from 1 on) fail."""
    write, number = async_saving.write_staged, []

    def failing(save, plan, staged):
        number.append(1)
        if len(number) in at:
            raise CheckpointError("disk full")
        return write(save, plan, staged)

    async_saving.write_staged, async_saving.LAST_SAVE_DELAYS = failing, (0.0, 0.0, 0.0, 0.0)


def test_training_goes_on_after_a_failed_save_and_says_so(config_file, tmp_path):
    assert train(config_file, tmp_path, "train.save_every=4", change=lambda rank: fail_saves({1})) == [0]
    assert status(tmp_path)["failed_saves"] == 1 and status(tmp_path)["status"] == "finished"
    assert "SAVE FAILED" in (tmp_path / "train.log").read_text()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


def test_a_run_whose_last_save_fails_is_a_failed_run(config_file, tmp_path):
    codes = train(config_file, tmp_path, change=lambda rank: fail_saves({2, 3, 4, 5, 6}))
    assert codes == [1]
    found = status(tmp_path)
    assert found["status"] == "failed" and found["checkpoint"] == "checkpoints/step_00000006"
    assert "could not be saved" in found["error"] and "weights_hash" not in found


def test_metrics_that_cannot_be_written_wait(tmp_path, caplog, monkeypatch):
    path, real = tmp_path / "run" / "metrics.jsonl", Metrics._flush
    path.parent.mkdir()
    metrics = Metrics(path, 0)
    metrics.write({"step": 1})

    def half(self, log):
        with open(path, "ab") as file:
            file.write(self._pending[:5])  # as a full disk leaves it
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Metrics, "_flush", half)
    metrics.write({"step": 2})
    metrics.write({"step": 3})
    monkeypatch.setattr(Metrics, "_flush", real)
    metrics.write({"step": 4})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert caplog.text.count("METRICS NOT WRITTEN") == 1 and "written again" in caplog.text
    path.unlink()
    metrics.write({"step": 5})
    assert [line["step"] for line in read_metrics(path)] == [5] and "has vanished" in caplog.text


@pytest.fixture(autouse=True)
def _propagate(caplog):
    logging.getLogger("dlm_scale").propagate = True


def test_a_run_folder_that_vanishes_stops_no_training(config_file, tmp_path):
    import shutil

    out = tmp_path / "run"
    argv = arguments(config_file, out, "train.save_every=6", "train.num_steps=40")
    with Ranks(1, argv) as running:
        wait_for((out / "checkpoints" / "step_00000006").is_dir, "a checkpoint")
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        assert running.exit_codes() == [0]
    assert status(out)["status"] == "finished" and (out / "checkpoints" / "step_00000040").is_dir()

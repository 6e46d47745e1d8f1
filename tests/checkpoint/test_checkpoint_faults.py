"""A save that fails or dies at any operation on files leaves the checkpoints before it, and nothing in part."""
import errno
import os
import threading
import weakref

import pytest
import torch
import torch.distributed as dist

from dlm_scale.checkpoint.folders import find_checkpoint, list_checkpoints, retained_steps
from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from dlm_scale.checkpoint.writer import CheckpointError, Save, plan_save, stage, write_checkpoint, write_staged
from tests.forked import run_ranks

OPERATIONS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")


class Injector:
    """Counts the operations of `os` that change files, and lets something happen at chosen ones."""

    def __init__(self, monkeypatch, act=lambda number, name, real, arguments: None):
        self.count, self.act, self.lock = 0, act, threading.Lock()
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, real):
        def operation(*arguments, **options):
            with self.lock:
                number, self.count = self.count, self.count + 1
            self.act(number, name, real, arguments)
            return real(*arguments, **options)
        return operation


def pieces_of(sim, step, world):
    tensors = {(name, slot): (torch.full((5, 3), 10.0 * step + i), (5, 3))
               for i, (name, slot) in enumerate([("a", "param"), ("b", "param"), ("b", "m")])}
    return sim.random_layout(tensors, 1, world, 1)


def second_save(sim, root, world, step):
    """keep_last=1, so that the first checkpoint is deleted behind the second."""
    return sim.save(root, step, pieces_of(sim, 7, world), keep_last=1)


def first_save(sim, root, world):
    assert sim.save(root, 1, pieces_of(sim, 1, world))[1] == [None] * world


def check_survivors(root, saved, messages=()):
    """The newest good checkpoint is whole: of the new save if it returned, else of either; nothing partial is seen."""
    folder, skipped = find_checkpoint(root)
    assert not skipped and not list(messages)
    for visible in list_checkpoints(root):
        checkpoint = open_checkpoint(visible)
        assert set(checkpoint.tensors) == {("a", "param"), ("b", "param"), ("b", "m")}
    value = open_checkpoint(folder).read("a")[0, 0].item()
    assert value == 70.0 if saved else value in (10.0, 70.0)
    return value


def check_next_save(sim, root, world):
    """The next save works and sweeps up."""
    assert sim.save(root, 9, pieces_of(sim, 7, world), keep_last=1)[1] == [None] * world
    assert os.listdir(root / "checkpoints") == ["step_00000009"]


def operations_of_a_save(sim, root, world, step):
    first_save(sim, root, world)
    with pytest.MonkeyPatch.context() as monkeypatch:
        injector = Injector(monkeypatch)
        assert second_save(sim, root, world, step)[1] == [None] * world
    assert os.listdir(root / "checkpoints") == [f"step_{step:08d}"]
    return injector.count


# step 2 is a new checkpoint with deletion of the old; step 1 replaces the one there
@pytest.mark.parametrize("world, step", [(1, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_of_the_system_at_every_operation(tmp_path, sim, world, step, lasting, caplog):
    total, outcomes = operations_of_a_save(sim, tmp_path / "count", world, step), set()
    assert total >= 25
    for failing in range(total):
        root = tmp_path / str(failing)
        first_save(sim, root, world)

        def act(number, name, real, arguments):
            if number == failing or (lasting and number > failing and name != "close"):
                if name == "close":
                    real(*arguments)
                raise OSError(errno.ENOSPC if lasting else errno.EIO, "injected")

        with pytest.MonkeyPatch.context() as monkeypatch:
            Injector(monkeypatch, act)
            paths, errors = second_save(sim, root, world, step)
        assert len({type(error) for error in errors}) == 1 and isinstance(errors[0], (CheckpointError, type(None)))
        saved = errors[0] is None
        assert saved or "injected" in str(errors[0])
        outcomes.add((saved, check_survivors(root, saved)))
        check_next_save(sim, root, world)
    assert {(False, 10.0), (True, 70.0)} <= outcomes


@pytest.mark.parametrize("world, step", [(1, 2), (2, 2), (1, 1)])
def test_a_kill_at_every_operation(tmp_path, sim, world, step):
    total, values = operations_of_a_save(sim, tmp_path / "count", world, step), []
    for failing in range(total):
        root = tmp_path / str(failing)
        first_save(sim, root, world)

        def act(number, name, real, arguments):
            if number == failing:
                if name == "write":
                    real(arguments[0], arguments[1][:len(arguments[1]) // 2])
                os._exit(9)

        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            with pytest.MonkeyPatch.context() as monkeypatch:
                Injector(monkeypatch, act)
                second_save(sim, root, world, step)
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 9 or (world > 1 and failing >= total - 1)
        values.append(check_survivors(root, saved=False))
        check_next_save(sim, root, world)
    assert values == sorted(values) and set(values) == {10.0, 70.0}


def test_unsynced_data_is_never_relied_on(tmp_path, sim, monkeypatch):
    """Every file and the folder are fsynced before the rename, the parent after it and before anything is deleted."""
    first_save(sim, tmp_path, 2)
    opened, dirty, log = {}, set(), []

    def act(number, name, real, arguments):
        if name == "write":
            dirty.add(opened[arguments[0]])
        elif name == "fsync":
            dirty.discard(opened[arguments[0]])
            if os.path.isdir(opened[arguments[0]]):
                log.append(("fsync", opened[arguments[0]].partition(".tmp-")[0]))
        elif name == "rename":
            log.append(("rename", str(arguments[1]), not dirty))

    Injector(monkeypatch, act)
    counted = os.open

    def remembering_open(path, *arguments, **options):
        fd = counted(path, *arguments, **options)
        opened[fd] = str(path)
        return fd

    monkeypatch.setattr(os, "open", remembering_open)
    assert second_save(sim, tmp_path, 2, 2)[1] == [None] * 2
    folder = tmp_path / "checkpoints"
    renamed = log.index(("rename", str(folder / "step_00000002"), True))
    assert log[renamed - 1] == ("fsync", str(folder / "step_00000002"))
    assert log[renamed + 1] == ("fsync", str(folder))
    assert log[renamed + 2][0] == "rename" and ".trash-" in log[renamed + 2][1]


def test_a_checkpoint_whose_replacement_died_is_put_back_before_anything_else(tmp_path, sim, monkeypatch):
    first_save(sim, tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000001").rename(folder / "step_00000001.old-0123abcd")
    assert check_survivors(tmp_path, saved=False) == 10.0
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    assert isinstance(sim.save(tmp_path, 1, pieces_of(sim, 7, 1))[1][0], CheckpointError)
    assert os.listdir(folder) == ["step_00000001"] and check_survivors(tmp_path, saved=False) == 10.0


@pytest.mark.parametrize("failing_rank", [0, 1, 2])
def test_a_failure_of_any_rank_is_agreed_by_all(tmp_path, sim, failing_rank):
    first_save(sim, tmp_path, 3)
    pieces = pieces_of(sim, 7, 3)

    def broken():
        yield pieces[failing_rank][0]
        raise RuntimeError("no more memory")

    listed = [broken() if rank == failing_rank else pieces[rank] for rank in range(3)]
    _, errors = sim.save(tmp_path, 2, listed)
    assert all(isinstance(error, CheckpointError) and f"rank {failing_rank}: RuntimeError: no more memory" in str(error)
               for error in errors)

    def work(rank, gather):
        save = Save(tmp_path, 2, rank, 3, gather, {}, 1, 0)
        plan = plan_save(save, pieces[rank])
        return write_staged(save, plan, broken_copy() if rank == failing_rank else stage(plan))

    def broken_copy():
        raise RuntimeError("device lost")
        yield

    _, errors = sim.World(3).run(work)
    assert all(isinstance(error, CheckpointError) and "device lost" in str(error) for error in errors)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


def test_staged_values_are_those_of_the_moment_of_staging(tmp_path, sim):
    """Training may go on changing its tensors while a staged save is written."""
    pieces = pieces_of(sim, 7, 2)

    def work(rank, gather):
        save = Save(tmp_path, 3, rank, 2, gather, {}, 1, 0)
        plan = plan_save(save, pieces[rank])
        staged = list(stage(plan))
        for piece in pieces[rank]:
            piece.tensor.fill_(-1.0)
        return write_staged(save, plan, staged)

    paths, errors = sim.World(2).run(work)
    assert errors == [None, None] and open_checkpoint(paths[0]).read("a").eq(70.0).all()


def test_too_little_free_space_is_said_before_a_byte_is_written(tmp_path, sim, monkeypatch):
    first_save(sim, tmp_path, 2)
    needed = 3 * 15 * 4 + len(b'{"step":2}')
    for factor, fits in ((1.09, False), (1.11, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": int(needed * factor)}))
        _, errors = sim.save(tmp_path, 2, pieces_of(sim, 7, 2))
        assert [error is None for error in errors] == [fits] * 2
        assert fits or "free some space" in str(errors[1])
        assert len(os.listdir(tmp_path / "checkpoints")) == 1 + fits


@pytest.mark.parametrize("steps, step, keep_last, keep_every, kept", [
    ([10, 20, 30, 40], 40, 2, 0, [30, 40]),
    ([10, 20, 30, 40], 40, 1, 20, [20, 40]),
    ([10, 20, 30, 40], 40, 9, 0, [10, 20, 30, 40]),
    ([10, 20, 30, 40], 20, 1, 0, [20, 30, 40]),
    ([10, 20, 30, 40], 30, 2, 0, [20, 30, 40]),
    ([0, 5], 5, 1, 7, [0, 5]),
])
def test_which_checkpoints_stay(steps, step, keep_last, keep_every, kept):
    assert sorted(retained_steps(steps, step, keep_last, keep_every)) == kept


def test_retention_over_a_run(tmp_path, sim):
    for step in range(1, 12):
        sim.save(tmp_path, step, pieces_of(sim, 7, 1), keep_last=2, keep_every=4)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [f"step_{s:08d}" for s in (4, 8, 10, 11)]
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    sim.save(tmp_path, 12, pieces_of(sim, 7, 1), keep_last=1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["notes.txt", "step_00000012"]


def test_values_reach_the_host_one_piece_at_a_time(tmp_path, sim):
    pieces, alive, peak = pieces_of(sim, 7, 1), [], []

    def work(rank, gather):
        save = Save(tmp_path, 1, rank, 1, gather, {}, 1, 0)
        plan = plan_save(save, pieces[0])

        def watched():
            for tensor in stage(plan):
                alive.append(weakref.ref(tensor))
                yield tensor
                del tensor
                peak.append(sum(ref() is not None for ref in alive))

        return write_staged(save, plan, watched())

    assert sim.World(1).run(work)[1] == [None]
    assert len(peak) == len(pieces[0]) == 3 and max(peak) <= 1


def save_on_gloo(root):
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def gather(value):
        values = [None, None]
        dist.all_gather_object(values, value)
        return values

    whole = torch.arange(24, dtype=torch.float32)
    mine = [Piece("w", "param", (4, 6), (4, 6), ((0, 4), (0, 6)), 11 * rank, whole[:11] if rank == 0 else whole[11:]),
            Piece("b", "param", (24,), (24,), ((0, 24),), 0, whole)]
    outcomes = []
    for step, offered in ((1, mine), (2, mine[rank:]), (3, mine)):  # in step 2 rank 1 lacks its half of w
        try:
            outcomes.append(write_checkpoint(root, step, offered, rank=rank, world_size=2, gather=gather,
                                             documents={"state.json": b"{}"}, keep_last=2).name)
        except CheckpointError as error:
            outcomes.append("elements of box" in str(error))
    dist.destroy_process_group()
    return outcomes


def test_two_real_processes(tmp_path, monkeypatch):
    monkeypatch.undo()  # here the disk is waited for
    assert run_ranks(2, save_on_gloo, tmp_path, seconds=60) == [["step_00000001", True, "step_00000003"]] * 2
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
    checkpoint = open_checkpoint(list_checkpoints(tmp_path)[1])
    whole = torch.arange(24, dtype=torch.float32)
    assert torch.equal(checkpoint.read("w"), whole.view(4, 6)) and torch.equal(checkpoint.read("b"), whole)
    assert weights_hash(checkpoint) == weights_hash([("b", whole), ("w", whole.view(4, 6))])

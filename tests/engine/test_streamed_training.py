"""Training while preparation still runs: the same weights, and waiting that is neither a hang nor deaf to signals."""

from __future__ import annotations

import shutil
import signal
import time

import pytest

from dlm_scale.data.indexed import IndexedDataset, IndexedWriter
from dlm_scale.data.meta import read_meta
from dlm_scale.data.stream import StreamProducer
from tests.engine.reliability import Ranks, arguments, train, wait_for
from tests.engine.test_training import lines, status

PREPARED = 80  # windows in each of the three shards; a step takes 8


class Preparation:
    """The shards of a stream of the grammar corpus, one at a time, as `data.train`."""

    def __init__(self, folder, grammar):
        self.prefix, self._meta = str(folder / "train"), read_meta(grammar / "meta.json")
        self._tokens = IndexedDataset(grammar / "train").tokens
        folder.mkdir()
        for name in self._meta.tokenizer.files:
            shutil.copy(grammar / name, folder / name)

    def go_on(self, *numbers: int, finish: bool = False, beat: float = 60.0) -> None:
        with StreamProducer(self.prefix, self._meta, {"source": "grammar"}, beat) as producer:
            for number in numbers:
                writer = IndexedWriter(self.prefix + ".part", self._tokens.dtype)
                for i in range(PREPARED):
                    writer.add_document(self._tokens[16 * (number * PREPARED + i) :][:16])
                writer.close()
                producer.publish(self.prefix + ".part")
            if finish:
                producer.finish()

    def overrides(self) -> tuple[str, ...]:
        return (f"data.train={self.prefix}", "data.order=sharded", "data.validation=null", "train.num_steps=34",
                "train.save_every=0")


@pytest.fixture
def preparation(tmp_path, grammar):
    return Preparation(tmp_path / "stream", grammar)


@pytest.fixture(scope="module")
def whole(config_file, grammar, tmp_path_factory):
    """A run that starts after preparation: 34 steps of 8 windows, more than one epoch of 240."""
    folder = tmp_path_factory.mktemp("whole")
    preparation = Preparation(folder / "stream", grammar)
    preparation.go_on(0, 1, 2, finish=True)
    assert train(config_file, folder / "run", *preparation.overrides()) == [0]
    return folder / "run"


def hashes(out) -> list:
    return [(line["step"], line["batch_hash"]) for line in lines(out) if "loss" in line]


def wait_until_it_waits(out) -> None:
    wait_for(lambda: (out / "train.log").exists() and "waiting for shard 1 of" in (out / "train.log").read_text(),
             "waiting")
    wait_for(lambda: len(hashes(out)) == 10, "the last step that can be taken")


def test_a_run_that_starts_before_preparation_ends(whole, preparation, config_file, tmp_path):
    """On two ranks, across a wait that is longer than `hang_timeout_seconds`."""
    preparation.go_on(0)
    argv = arguments(config_file, tmp_path / "run", *preparation.overrides(), "train.hang_timeout_seconds=6")
    with Ranks(2, argv) as running:
        wait_until_it_waits(tmp_path / "run")
        time.sleep(8)
        preparation.go_on(1, 2, finish=True)
        assert running.exit_codes() == [0, 0]
    assert hashes(tmp_path / "run") == hashes(whole)


def test_the_weights_are_those_of_a_run_that_starts_after_even_if_it_was_stopped(whole, preparation, config_file,
                                                                                  tmp_path):
    preparation.go_on(0)
    argv = arguments(config_file, tmp_path / "run", *preparation.overrides())
    with Ranks(1, argv) as running:
        wait_until_it_waits(tmp_path / "run")
        (tmp_path / "run" / "control").mkdir(exist_ok=True)
        (tmp_path / "run" / "control" / "save").touch()
        wait_for((tmp_path / "run" / "checkpoints" / "step_00000010").exists, "a checkpoint while it waits")
        running.kill(0, signal.SIGTERM)
        assert running.exit_codes() == [0]
    assert status(tmp_path / "run")["reason"] == "SIGTERM" and status(tmp_path / "run")["step"] == 10
    with Ranks(1, argv) as running:
        time.sleep(1)
        preparation.go_on(1)
        preparation.go_on(2, finish=True)
        assert running.exit_codes() == [0]
    assert hashes(tmp_path / "run") == hashes(whole)
    assert status(tmp_path / "run")["weights_hash"] == status(whole)["weights_hash"]


def test_a_preparation_that_died_ends_the_run(preparation, config_file, tmp_path):
    preparation.go_on(0, beat=0.05)
    assert train(config_file, tmp_path / "run", *preparation.overrides()) == [2]
    assert "no sign for 1 s. Start the preparation again" in status(tmp_path / "run")["error"]

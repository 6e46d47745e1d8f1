"""`dlm prepare --stream`: shards while it runs, the same whenever it was killed, the same dataset at the end."""

import threading

import numpy as np
import pytest

from dlm_scale.data import prepare as preparing
from dlm_scale.data import stream
from dlm_scale.data.assemble import Choice
from dlm_scale.data.documents import Chunk, Document, Source
from dlm_scale.data.loader import open_data
from dlm_scale.data.stream import read_list
from dlm_scale.errors import UsageError

from .conftest import snapshot, write_jsonl

TEXTS = [f"document {i}: " + "abc " * (i % 9) for i in range(400)]
SHARD_TOKENS, L = 1500, 16
GATES: dict[int, threading.Event] = {}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)


@pytest.fixture
def path(tmp_path):
    return str(write_jsonl(tmp_path / "t.jsonl", TEXTS))


def prepared(path, out, **options):
    made = {"chunk_bytes": 1000, "workers": 1, "stream": True, "stream_tokens": SHARD_TOKENS} | options
    preparing.prepare(path, "byte", out, **made)
    return snapshot(out)


def rows_of(out, count=900):
    return open_data(str(out / "train"), L, 3, "none", "sharded").rows(np.arange(count))


def test_the_dataset_is_that_of_a_plain_preparation_and_its_list_stays(path, tmp_path):
    streamed, plain = prepared(path, tmp_path / "S"), prepared(path, tmp_path / "P", stream=False)
    assert streamed.keys() - plain.keys() == {"train.stream.json"}
    assert all(streamed[name] == plain[name] for name in plain)
    found = read_list(tmp_path / "S" / "train")
    assert found.is_finished and len(found.shards) > 5
    assert all(SHARD_TOKENS <= shard.tokens < SHARD_TOKENS + 1500 for shard in found.shards[:-1])
    assert rows_of(tmp_path / "S").shape == (900, L)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_preparation_publishes_the_same_shards(path, tmp_path, monkeypatch, seed):
    whole = prepared(path, tmp_path / "whole")
    rng, out, left, deaths = np.random.default_rng(seed), tmp_path / "killed", [0], 0
    publish = stream.StreamProducer.publish

    class Killed(BaseException):
        pass

    def dying(self, prefix):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        publish(self, prefix)

    monkeypatch.setattr(stream.StreamProducer, "publish", dying)
    for left[0] in [*rng.integers(0, 3, 3).tolist(), 99]:
        try:
            assert prepared(path, out) == whole
        except Killed:
            deaths += 1
    assert deaths >= 2


def gated(number, texts):
    GATES[number].wait(60)
    return (Document(text) for text in texts)


def test_rows_are_there_before_the_end_and_the_same_after(tmp_path):
    parts = [TEXTS[40 * i : 40 * i + 40] for i in range(10)]
    GATES.update({i: threading.Event() for i in range(10)})
    source = Source(lambda size, cut: (Chunk(gated, (i, part), 0.1, len(part)) for i, part in enumerate(parts)), {"name": "t"})
    run = threading.Thread(target=preparing.prepare_source, args=(source, "byte", tmp_path / "D", Choice()),
                           kwargs={"workers": 1, "stream_tokens": SHARD_TOKENS})  # fmt: skip
    for i in range(6):
        GATES[i].set()
    run.start()
    while not (tmp_path / "D" / "train.stream.json").exists() or not read_list(tmp_path / "D" / "train").shards:
        threading.Event().wait(0.01)
    early = rows_of(tmp_path / "D", 60)
    assert not read_list(tmp_path / "D" / "train").is_finished and not (tmp_path / "D" / "meta.json").exists()
    late = []
    reader = threading.Thread(target=lambda: late.append(rows_of(tmp_path / "D", 600)))
    reader.start()
    for gate in GATES.values():
        gate.set()
    run.join(60)
    reader.join(60)
    after = rows_of(tmp_path / "D", 600)
    assert np.array_equal(early, after[:60]) and np.array_equal(late[0], after)


def test_conversations_are_not_streamed(path, tmp_path):
    with pytest.raises(UsageError, match="leave one out"):
        prepared(path, tmp_path / "D", chat="chatml")

"""Shards that appear while they are read: the same rows whenever one begins, and clear words where they stop coming."""

import json
import logging
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dlm_scale.data import stream
from dlm_scale.data.indexed import IndexedDataset, IndexedWriter
from dlm_scale.data.loader import open_data
from dlm_scale.data.meta import read_meta
from dlm_scale.data.stream import Closed, StreamProducer, list_path, read_list, shard_prefix
from dlm_scale.errors import UsageError

L = 16
CONTENT = {"source": "300 documents", "hash": "0123"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)


@pytest.fixture
def source(dataset):
    """The documents of the byte dataset in five parts, its tokenizer, and a new prefix."""
    data, meta = IndexedDataset(dataset / "train"), read_meta(dataset / "meta.json")
    documents = [data.document(i) for i in range(data.num_documents)]
    parts = [documents[i::5][: 10 + 9 * i] for i in range(5)]
    return SimpleNamespace(parts=parts, meta=meta, dtype=data.dtype, prefix=str(dataset / "stream"))


@pytest.fixture
def said():
    """A handler of everything that is said."""
    log, handler = logging.getLogger("dlm_scale"), logging.Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


def write(prefix, documents, dtype):
    writer = IndexedWriter(prefix, dtype)
    for ids in documents:
        writer.add_document(ids)
    writer.close()


def produce(source, numbers=range(5), finish=True, beat=30.0, before=lambda number: None):
    """The reference producer: each part a shard."""
    with StreamProducer(source.prefix, source.meta, CONTENT, beat) as producer:
        for number in numbers:
            before(number)
            write(source.prefix + ".part", source.parts[number], source.dtype)
            producer.publish(source.prefix + ".part")
        if finish:
            producer.finish()


def opened(source, packing="none", seed=3):
    return open_data(source.prefix, L, seed, packing, "sharded")


def ids_of(rows):
    return getattr(rows, "ids_BL", rows)


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_an_epoch_passes_the_shards_in_sequence_and_each_in_a_keyed_order(source, packing):
    produce(source)
    data = opened(source, packing)
    whole = [open_data_of_part(source, number, packing) for number in range(5)]
    sizes = [len(rows) for rows in whole]
    for epoch in range(2):
        at = epoch * sum(sizes)
        for expected in whole:
            found = ids_of(data.rows(np.arange(at, at + len(expected)))).tolist()
            assert sorted(found) == sorted(expected) and found != expected
            at += len(expected)
    first, second = (ids_of(data.rows(np.arange(sizes[0]) + e * sum(sizes))).tolist() for e in range(2))
    assert first != second
    assert ids_of(opened(source, packing, seed=4).rows(np.arange(sizes[0]))).tolist() != first
    all_rows = ids_of(data.rows(np.arange(2 * sum(sizes))))  # any batch, in any sequence
    assert np.array_equal(ids_of(opened(source, packing).rows(np.arange(2 * sum(sizes))[::-1])), all_rows[::-1])


def open_data_of_part(source, number, packing):
    """All rows of one part by themselves, in the sequence of the file or of the plan."""
    from dlm_scale.data.packing import make_plan
    from dlm_scale.data.rows import PackedDocuments

    data = IndexedDataset(shard_prefix(source.prefix, number))
    if packing == "none":
        return data.tokens[: len(data.tokens) // L * L].reshape(-1, L).tolist()
    plan = make_plan(data.bounds, data.num_documents, L)
    rows = PackedDocuments(data.bin_path, data.tokens, plan, source.meta.vocabulary, source.meta.eos_id)
    return rows.take(np.arange(plan.num_rows))[0].tolist()


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_reader_that_starts_first_gets_the_rows_of_one_that_starts_last(source, packing, said):
    produce(source, [], finish=False)
    early, gate, heard = opened(source, packing), threading.Semaphore(0), []
    print_of_early = early.fingerprint
    said.emit = lambda record: heard.append(record.getMessage()) or gate.release()  # a shard for each wait
    producer = threading.Thread(target=produce, args=(source,), kwargs={"before": lambda number: gate.acquire()})
    producer.start()
    found = [ids_of(early.rows(np.arange(start, start + 8))) for start in range(0, 160, 8)]
    gate.release(5)
    producer.join()
    late = opened(source, packing)
    assert np.array_equal(np.concatenate(found), ids_of(late.rows(np.arange(160))))
    assert late.fingerprint == print_of_early
    assert len(heard) >= 4 and all("which is being prepared" in line for line in heard)
    assert opened(source, "best_fit" if packing == "none" else "none").fingerprint != print_of_early


def test_shards_may_be_joined_and_removed(source):
    produce(source, finish=False)
    unfinished = opened(source)
    produce(source, [])
    before = {packing: opened(source, packing).rows(np.arange(200)) for packing in ("none", "best_fit")}
    open_one = opened(source)
    open_one.rows(np.arange(3))
    write(source.prefix, sum(source.parts, []), source.dtype)
    for number in range(5):
        for suffix in (".bin", ".idx"):
            os.unlink(shard_prefix(source.prefix, number) + suffix)
    for packing, rows in before.items():
        assert np.array_equal(ids_of(opened(source, packing).rows(np.arange(200))), ids_of(rows))
    assert np.array_equal(open_one.rows(np.arange(200)), before["none"])  # it had only the first open
    assert np.array_equal(unfinished.rows(np.arange(30)), before["none"][:30])  # it knew of no end
    write(source.prefix, sum(source.parts[::-1], []), source.dtype)
    with pytest.raises(UsageError, match="does not lie where it must"):
        opened(source).rows(np.arange(200))
    write(source.prefix, sum(source.parts[:4], []), source.dtype)
    with pytest.raises(UsageError, match="other tokens or documents"):
        opened(source).rows(np.arange(200))


def test_only_the_shards_that_are_needed_are_opened(source, monkeypatch):
    produce(source, [0, 1], finish=False)
    data, asked = opened(source), []
    check = stream.ShardTokens.check
    monkeypatch.setattr(stream.ShardTokens, "check", lambda self: asked.append(self.prefix[-1]) or check(self))
    sizes = [s.tokens // L for s in read_list(source.prefix).shards]
    data.rows(np.arange(sizes[0]))
    assert asked == ["0"]
    data.rows(np.arange(sizes[0], sum(sizes)))
    assert asked == ["0", "1"]


def test_a_producer_that_died_is_named_and_may_go_on(source):
    produce(source, [0], finish=False, beat=0.01)
    data, start = opened(source), time.monotonic()
    with pytest.raises(UsageError, match=r"shard 1 is missing and .* no sign for 0.2 s. Start the preparation again"):
        data.rows(np.arange(100))
    assert time.monotonic() - start < 20
    produce(source, [1, 2, 3, 4], beat=0.01)
    assert len(read_list(source.prefix).shards) == 5
    data.rows(np.arange(100))


def test_signs_of_life_keep_a_reader_waiting(source):
    produce(source, [0], finish=False)
    with StreamProducer(source.prefix, source.meta, CONTENT, 0.02) as producer:  # dead would be after 0.4 s
        data, found = opened(source), []
        reader = threading.Thread(target=lambda: found.append(data.rows(np.arange(100))))
        reader.start()
        time.sleep(1.0)
        assert reader.is_alive()
        write(source.prefix + ".part", source.parts[1], source.dtype)
        producer.publish(source.prefix + ".part")
        producer.finish()
        reader.join(20)
    assert found[0].shape == (100, L)


def test_waiting_ends_where_the_run_does(source):
    produce(source, [0], finish=False)
    data = opened(source)
    threading.Timer(0.05, data.close).start()
    with pytest.raises(Closed):
        data.rows(np.arange(100))


def change_list(source, change):
    raw = json.loads(list_path(source.prefix).read_text())
    change(raw)
    list_path(source.prefix).write_text(json.dumps(raw))


DAMAGE = {
    "another shard": (lambda raw: raw["shards"][0].update(idx_xxh3="0" * 16), "no continuation"),
    "other content": (lambda raw: raw["content"].update(hash="4567"), "no continuation"),
    "fewer": (lambda raw: raw.update(shards=[]), "no continuation"),
    "unknown key": (lambda raw: raw.update(extra=1), "unknown key 'extra'"),
    "version": (lambda raw: raw.update(format_version=2), "format_version 2"),
    "no documents": (lambda raw: raw["shards"][0].update(documents=0), "without documents"),
}


@pytest.mark.parametrize("change, reason", DAMAGE.values(), ids=DAMAGE)
def test_a_list_that_does_not_go_on_is_refused(change, reason, source):
    produce(source, [0], finish=False)
    data = opened(source)
    data.rows(np.arange(2))
    change_list(source, change)
    with pytest.raises(UsageError, match=reason):
        data.rows(np.arange(100))


def test_a_shard_that_is_not_the_listed_one_is_refused(source):
    produce(source)
    path = shard_prefix(source.prefix, 0) + ".bin"
    raw = bytearray(open(path, "rb").read())
    raw[0] ^= 1
    open(path, "wb").write(raw)
    with pytest.raises(UsageError, match="not the tokens that were listed"):
        opened(source).rows(np.arange(2))
    change_list(source, lambda raw: raw["shards"][0].update(tokens=raw["shards"][0]["tokens"] + 1))
    with pytest.raises(UsageError, match="not the shard that was listed"):
        opened(source).rows(np.arange(2))


def test_what_is_no_stream_is_refused(source, dataset):
    with pytest.raises(UsageError, match="data.order=shuffled"):
        open_data(str(dataset / "train"), L, 1, order="sharded")
    with StreamProducer(source.prefix, source.meta, CONTENT), pytest.raises(UsageError, match="of other content"):
        StreamProducer(source.prefix, source.meta, {"source": "another"})
    write(source.prefix + ".part", [np.arange(3)], source.dtype)
    with StreamProducer(source.prefix, source.meta, CONTENT) as producer:
        producer.publish(source.prefix + ".part")
        producer.finish()
    with pytest.raises(UsageError, match="no row of model.seq_len=16"):
        opened(source).rows(np.arange(2))

"""Preparing in many processes, killed and continued: the same files; chunks and pieces; limits; duplicates."""

import base64
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken

from dlm_scale.data import indexed
from dlm_scale.data import prepare as module
from dlm_scale.data.assemble import Seen
from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.meta import read_meta
from dlm_scale.data.prepare import prepare
from dlm_scale.data.sources import halves, open_source, safe_cut
from dlm_scale.data.tokenizer import CUTS, GPT2_FILE, GPT2_PATTERN, WIDE_SPACES, make_tokenizer
from dlm_scale.data.verify import verify
from dlm_scale.data.workers import run_tasks
from dlm_scale.errors import UsageError

from .conftest import snapshot, texts_of, write_jsonl

RUN = """
import sys
from dlm_scale.data.prepare import prepare
if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), chunk_bytes=20_000, deduplicate=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of every kind of file, about 400 KB: small and large texts, rows, some of them twice."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rng, root = random.Random(0), tmp_path_factory.mktemp("corpus")
    words = ["".join(rng.choices("abcdeé日 ", k=rng.randint(1, 9))) for _ in range(500)]

    def text(size):
        return " ".join(rng.choices(words, k=size)) + rng.choice(["\n", "\n\n", " ", "x"])

    rows = [text(rng.randint(1, 60)) for _ in range(400)]
    rows[200:220] = rows[:20]
    (root / "a").mkdir()
    for i in range(30):
        (root / "a" / f"{i:02}.txt").write_text(text(50))
    (root / "b.txt").write_text(text(15_000))
    write_jsonl(root / "c.jsonl", rows)
    (root / "d.jsonl.zst").write_bytes(zstandard.compress(write_jsonl(root / "x", rows[100:300]).read_bytes()))
    table = pyarrow.table({"text": [text(40) for _ in range(150)] + rows[:5]})
    pyarrow.parquet.write_table(table, root / "e.parquet", row_group_size=20)
    (root / "x").unlink()
    return root


@pytest.fixture(scope="module")
def one_worker(corpus, tmp_path_factory):
    """The dataset that every other way must lead to."""
    out = tmp_path_factory.mktemp("one") / "D"
    prepare(str(corpus), "byte", out, workers=1, chunk_bytes=20_000, deduplicate=True)
    return out


def test_chunks_hold_the_source_in_order(corpus):
    whole = [d.text for d in open_source(str(corpus)).documents()]
    chunks = list(open_source(str(corpus)).chunks(20_000, "character"))
    assert len(chunks) > 12 and sum(c.share for c in chunks) == pytest.approx(1)
    pieces = [d for c in chunks for d in c.documents()]
    assert "".join(d.text for d in pieces) == "".join(whole) and sum(d.is_end for d in pieces) == len(whole)
    assert max(len(d.text.encode()) for d in pieces) < 20_010


def test_the_result_without_chunks(corpus, one_worker, tmp_path):
    """One chunk a file, one process, each document whole: the same token files."""
    prepare(str(corpus), "byte", tmp_path / "D", workers=1, chunk_bytes=1 << 30, deduplicate=True)
    assert snapshot(tmp_path / "D") == snapshot(one_worker)
    texts = [d.text for d in open_source(str(corpus)).documents()]
    kept = list(dict.fromkeys(texts))
    made = [texts_of(one_worker, name) for name in ("train", "val")]
    assert sorted(made[0] + made[1]) == sorted(t + "\0" for t in kept)
    assert read_meta(one_worker / "meta.json").source["duplicates"] == len(texts) - len(kept) > 100
    assert "all good" in verify(str(one_worker / "train"))


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_and_a_kill_give_the_same_files(corpus, one_worker, tmp_path, workers):
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "run.py", str(corpus), "byte", "D", str(workers)]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE)
    shards = tmp_path / "D" / module.STAGING
    deadline = time.monotonic() + 60
    while len(list(shards.glob("*/*.records"))) < 3 * workers - 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "D" / "meta.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in shards.glob("*/*.records")}
    time.sleep(0.3)  # orphans may still finish theirs
    restarted = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert restarted.returncode == 0 and "continuing: " in restarted.stderr, restarted.stderr
    assert snapshot(tmp_path / "D") == snapshot(one_worker) and len(times) >= 3 * workers - 3


def test_a_restart_makes_only_what_is_missing(corpus, one_worker, tmp_path, monkeypatch, capsys):
    made, real = [], module.write_shard

    def write_shard(folder, number, *rest):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(number)
        return real(folder, number, *rest)

    def run(**changes):
        prepare(str(corpus), "byte", tmp_path / "D", **dict(workers=1, chunk_bytes=20_000, deduplicate=True) | changes)

    monkeypatch.setattr(module, "write_shard", write_shard)
    for expected in ([0, 1, 2, 3], [4, 5, 6, 7]):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            run()
        assert made == expected
    assert "continuing: 4 shards are done" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        made.clear()
        run(val_fraction=0.2)
    assert made == [0, 1, 2, 3] and "starting anew" in capsys.readouterr().err
    monkeypatch.setattr(module, "write_shard", real)
    run(overwrite=True)
    assert snapshot(tmp_path / "D") == snapshot(one_worker)


def test_stopped_at_every_step_of_the_end(corpus, one_worker, tmp_path, monkeypatch):
    """Each rename, unlink and sync of the assembling and publishing process may be the last thing it does."""
    count = {"left": 0}

    def dying(function):
        def call(*arguments, **options):
            if count["left"] == 0:
                raise KeyboardInterrupt
            count["left"] -= 1
            return function(*arguments, **options)

        return call

    for name in ("replace", "rename", "fsync"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(module.Path, "unlink", dying(module.Path.unlink))
    stops = 0
    for steps in itertools.count(3, 7):
        count["left"] = steps
        try:
            prepare(str(corpus), "byte", tmp_path / "D", workers=1, chunk_bytes=60_000, deduplicate=True)
            break
        except KeyboardInterrupt:
            stops += 1
        assert not (tmp_path / "D" / "meta.json").exists() or steps > 20
    count["left"] = -1
    assert stops > 3 and snapshot(tmp_path / "D") == snapshot(one_worker)


def test_a_changed_source_starts_anew(tmp_path, documents, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", documents)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Assembler, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D")
    monkeypatch.undo()
    write_jsonl(tmp_path / "a.jsonl", documents[::-1])  # of the same size
    prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D")
    assert "starting anew" in capsys.readouterr().err
    assert texts_of(tmp_path / "D", "train")[0].startswith("document 299")


def test_shards_that_are_done_outlive_a_bad_row(tmp_path, documents):
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    with open(path, "a") as file:
        file.write("not json\n")
    for _ in range(2):
        with pytest.raises(UsageError, match="a.jsonl:301: not a line of JSON.*the same command continues"):
            prepare(str(path), "byte", tmp_path / "D", workers=1, chunk_bytes=2000)
    assert len(list((tmp_path / "D" / module.STAGING).glob("*/*.records"))) > 3


# pieces of one text


@pytest.fixture(scope="module")
def gpt2(request):
    return make_tokenizer(str(request.getfixturevalue("shared_data")("gpt2.tiktoken")))


SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
KINDS = ["a", "Zé", "日本", "12", "!", "'s", "'", "\x1c", "\u200b", "\0", "😀", "  ", "\n\n", " \n", *SPACES]


def test_marks_change_no_id(gpt2, shared_data):
    """The quick pattern against GPT-2's own, also around marks and wide spaces in the text itself."""
    pairs = (line.split() for line in gpt2.files[GPT2_FILE].splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    plain = tiktoken.Encoding("plain", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(3)
    narrow = [kind for kind in KINDS if not set(kind) & set(WIDE_SPACES)]
    draws = [kinds for kinds in (narrow, narrow, [*KINDS, "\x01"]) for _ in range(6000)]
    texts = ["".join(rng.choices(kinds, k=rng.randint(1, 12))) for kinds in draws]
    texts += [shared_data(name).read_text() for name in ("tinyshakespeare.txt", "wikitext2_valid.txt")]
    for text in [*texts, "", open(__file__).read()]:
        assert gpt2.encode(text).tolist() == plain.encode_ordinary(text), repr(text[:40])
    white = {c for c in map(chr, range(0x3001)) if re.match(r"\s", c)}
    assert white - set("\x1c\x1d\x1e\x1f") == set(SPACES) and len(narrow) > 15


def test_every_cut_at_a_word_is_exact(gpt2):
    """All kinds of characters that GPT-2's pattern tells apart, around every place where it may be cut."""
    rng, cuts = random.Random(1), 0
    for _ in range(4000):
        text = "".join(rng.choices(KINDS, k=rng.randint(3, 10)))
        raw, whole = text.encode(), gpt2.encode(text).tolist()
        for found in CUTS["word"].finditer(raw):
            parts = [raw[: found.end()], raw[found.end() :]]
            assert [i for part in parts for i in gpt2.encode(part.decode()).tolist()] == whole, repr(text)
            cuts += 1
    assert cuts > 1000


def test_pieces_have_the_ids_of_the_whole(gpt2, tmp_path):
    rng, path = random.Random(2), tmp_path / "a.txt"
    path.write_text("".join(rng.choices(KINDS, k=60_000)))
    for made in (gpt2, make_tokenizer("byte"), make_tokenizer("char", [path.read_bytes().decode()])):
        (whole,) = open_source(str(path)).documents()
        pieces = [c for c in open_source(str(path)).chunks(3000, made.cut)]
        assert len(pieces) > 40
        ids = np.concatenate([made.encode(d.text) for c in pieces for d in c.documents()])
        assert np.array_equal(ids, made.encode(whole.text))
    assert [c.num_documents for c in pieces] == [1] + [0] * (len(pieces) - 1)


def test_a_text_without_a_place_to_cut_stays_whole(tmp_path):
    (tmp_path / "a.txt").write_text("日" * 3000)
    assert safe_cut(tmp_path / "a.txt", 1000, "word") == 9000
    assert safe_cut(tmp_path / "a.txt", 1000, "character") == 1005  # at a character
    assert len(list(open_source(str(tmp_path / "a.txt")).chunks(1000, "word"))) == 1


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
@pytest.mark.parametrize("fraction", [0.1, 0.37])
def test_one_large_text_is_cut_at_the_same_character(tmp_path, shared_data, tokenizer, fraction):
    spec = str(shared_data("gpt2.tiktoken")) if tokenizer == "gpt2" else tokenizer
    (tmp_path / "a.txt").write_text("été 日本 \n" * 2000 + "x" * 1000)
    for name, size in (("whole", 1 << 20), ("pieces", 700)):
        prepare(str(tmp_path / "a.txt"), spec, tmp_path / name, val_fraction=fraction, workers=1, chunk_bytes=size)
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "pieces")
    data = IndexedDataset(tmp_path / "pieces" / "train")
    assert data.num_documents == 1 and 50256 not in data.tokens


def test_halves_of_a_file_at_every_fraction(tmp_path):
    (tmp_path / "a.txt").write_text("aé日😀" * 50)
    text = (tmp_path / "a.txt").read_text()
    (chunk,) = list(open_source(str(tmp_path / "a.txt")).chunks(64, "character"))[:1]
    for fraction in np.linspace(0.01, 0.99, 30):
        documents = [d for c in halves(chunk, fraction, 64, "character") for d in c.documents()]
        train = "".join(d.text for d in documents if d.split == "train")
        assert train == text[: int(len(text) * (1 - fraction))]
        assert train + "".join(d.text for d in documents if d.split == "val") == text


def test_a_document_longer_than_a_sequence_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "MAX_SEQUENCE", 64)
    monkeypatch.setattr(indexed, "INDEX_BLOCK", 8)
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    prepare(str(tmp_path / "a.txt"), "byte", tmp_path / "D", workers=1, chunk_bytes=100)
    data = IndexedDataset(tmp_path / "D" / "train")
    assert data.num_documents == 1 and len(data.lengths) == 15 and data.lengths.max() == 64
    assert bytes(data.document(0).astype("u1")).decode() == "0123456789" * 90


# limits and duplicates


@pytest.mark.parametrize("chunk_bytes", [500, 1 << 20])
@pytest.mark.parametrize("workers", [1, 2])
def test_limits_at_any_chunk_size(tmp_path, documents, chunk_bytes, workers):
    write_jsonl(tmp_path / "a.jsonl", documents)
    options = {"workers": workers, "chunk_bytes": chunk_bytes, "overwrite": True}
    for limit in (1, 7, 100, 299, 300, 1000):
        meta = prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D", max_documents=limit, **options)
        texts = sorted(texts_of(tmp_path / "D", "train") + texts_of(tmp_path / "D", "val"))
        expected = documents[:limit] if limit > 1 else []  # a single one is cut by position
        assert texts == sorted(d + "\0" for d in expected) or limit == 1
        assert sum(s.bytes for s in meta.splits.values()) == sum(len(d) for d in documents[:limit])
        if workers == 2:
            break
    ends = np.cumsum([len(d) + 1 for d in documents])
    for limit in (int(ends[40]), int(ends[40]) - 1, 10**9):
        meta = prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D", max_tokens=limit, **options)
        assert sum(s.tokens for s in meta.splits.values()) == ends[ends <= limit][-1]
        if workers == 2:
            break


def test_limits_of_char(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", [*documents, "ü"])
    limit = sum(len(d) for d in documents[:50])
    meta = prepare(str(tmp_path / "a.jsonl"), "char", tmp_path / "D", max_tokens=limit, chunk_bytes=300, workers=1)
    assert sum(s.tokens for s in meta.splits.values()) == limit
    assert meta.vocab_size == len(set("".join(documents[:50]))) + 1


def test_a_first_document_beyond_the_limit(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", documents)
    with pytest.raises(UsageError, match="max_tokens 5: the first document alone has 14 tokens"):
        prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D", max_tokens=5)


def test_more_text_than_the_disk_holds(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(1 << 43)
    for tokenizer in ("byte", "char", "no-such"):
        with pytest.raises(UsageError, match="are free there"):
            prepare(str(tmp_path / "a.txt"), tokenizer, tmp_path / "D")


def test_seen_agrees_with_a_set():
    rng = np.random.default_rng(0)
    seen, known = Seen(), set()
    for size in (1, 5, 0, 200, 3, 1000, 1, 40, 3000):
        hashes = rng.integers(0, 2000, size).astype(">u8").tobytes()
        content_N = np.array([hashes[8 * i : 8 * i + 8] + b"\0" * 7 + b"x" for i in range(size)], dtype="S16")
        expected = []
        for value in content_N.tolist():
            expected.append(value not in known)
            known.add(value)
        assert seen.add(content_N).tolist() == expected
    assert sum(len(run) for run in seen._runs) == len(known) and len(seen._runs) < 12


# the pool


def double(x):
    return 2 * x


def fails(kind):
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"usage": UsageError, "other": ValueError}[kind]("the cause")


def test_the_pool():
    found = dict(run_tasks(((i, (double, (i,))) for i in range(20)), 3))
    assert found == {i: 2 * i for i in range(20)}
    assert list(run_tasks(iter(()), 3)) == []
    for kind, error, said in (("usage", UsageError, "^the cause$"), ("other", RuntimeError, "ValueError: the cause"),
                              ("killed", RuntimeError, "ended with signal SIGKILL")):  # fmt: skip
        with pytest.raises(error, match=said):
            list(run_tasks(iter([(0, (fails, (kind,))), (1, (double, (1,)))]), 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_ten_random_moments(tmp_path):
    from benchmarks.benchmark_prepare import killed_at_random_moments

    assert killed_at_random_moments(tmp_path, kills=10, megabytes=4, seed=0)["identical"] == 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_compares_equal_ids(shared_data):
    command = ["--ranks", shared_data("gpt2.tiktoken"), "--text", shared_data("wikitext2_valid.txt"), "--json",
               "--megabytes", "1", "--repeats", "1", "--kills", "1"]  # fmt: skip
    program = [sys.executable, "benchmarks/benchmark_prepare.py", *map(str, command)]
    done = subprocess.run(program, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids_equal"] and found["identical"] == found["kills"] == 1 and found["peak_resident_megabytes"] < 1024


def test_json_of_the_plan_is_stable(tmp_path, documents):
    source = open_source(str(write_jsonl(tmp_path / "a.jsonl", documents)))
    plan = module._plan(source, make_tokenizer("byte"), module.Choice(), 10)
    assert json.loads(json.dumps(plan))["choice"]["val_fraction"] == 0.1

"""`prepare`: splits, separators, sources, and that nothing is left half done."""

import fcntl
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dlm_scale.data import prepare as module
from dlm_scale.data.loader import ValidationData
from dlm_scale.data.prepare import prepare
from dlm_scale.data.sources import open_source
from dlm_scale.errors import UsageError

from .conftest import snapshot, texts_of, write_jsonl


def test_tinyshakespeare_splits_90_10(shared_data, tmp_path):
    path = shared_data("tinyshakespeare.txt")
    meta = prepare(str(path), "char", tmp_path / "D")
    assert (meta.vocab_size, meta.mask_id, meta.eos_id) == (66, 65, None)
    assert [meta.splits[name].tokens for name in ("train", "val")] == [1_003_854, 111_540]
    text = path.read_text()
    assert texts_of(tmp_path / "D", "train") == [text[:1_003_854]]
    assert texts_of(tmp_path / "D", "val") == [text[1_003_854:]]
    p = np.bincount(np.frombuffer(text[1_003_854:].encode(), dtype=np.uint8)) / 111_540
    assert meta.splits["val"].unigram_entropy == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert meta.splits["val"].max_id == 64


def test_one_document_is_cut_at_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 100)
    meta = prepare(str(tmp_path / "a.txt"), "byte", tmp_path / "D", val_fraction=0.25)
    assert [s.tokens for s in meta.splits.values()] == [150, 50]  # no separator inside or behind one document
    assert texts_of(tmp_path / "D", "val") == ["é" * 25]


def test_many_documents_split_by_hash_whatever_their_order(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_jsonl(tmp_path / "b.jsonl", documents[::-1])
    for name in "ab":
        prepare(str(tmp_path / f"{name}.jsonl"), "byte", tmp_path / name, val_fraction=0.3)
    a, b = ([texts_of(tmp_path / name, split) for split in ("train", "val")] for name in "ab")
    assert [sorted(x) for x in a] == [sorted(x) for x in b]
    assert sorted(a[0] + a[1]) == sorted(d + "\0" for d in documents)  # a separator behind each
    assert a[0] == [d + "\0" for d in documents if d + "\0" in a[0]]  # in the order of the source
    assert abs(len(a[1]) - 90) < 4 * np.sqrt(300 * 0.3 * 0.7)


@pytest.mark.parametrize(("count", "val"), [(2, 1), (3, 1), (20, 2), (95, 10)])
def test_a_few_documents_always_leave_some_for_validation(tmp_path, count, val):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(count)])
    meta = prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D")
    assert [s.documents for s in meta.splits.values()] == [count - val, val]


def test_grammar_keeps_its_floor_where_a_token_is_a_letter(tmp_path, monkeypatch, shared_data):
    monkeypatch.setattr("dlm_scale.data.corpora.GRAMMAR_LENGTH", {"train": 5000, "val": 1000})
    for tokenizer in ("byte", "char"):
        meta = prepare("grammar", tokenizer, tmp_path / tokenizer)
        assert [s.tokens for s in meta.splits.values()] == [5000, 1000]
        data = ValidationData(tmp_path / tokenizer / "val", 64)
        assert data.floor == pytest.approx((meta.floor.first + 63 * meta.floor.rate) / 64)
    assert prepare("grammar", str(shared_data("gpt2.tiktoken")), tmp_path / "gpt2").floor is None


def test_the_same_input_gives_the_same_bytes(tmp_path, documents, dataset):
    prepare(str(tmp_path / "d.jsonl"), "byte", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(dataset)
    assert sorted(snapshot(dataset)) == ["meta.json", "train.bin", "train.idx", "val.bin", "val.idx"]


def test_a_finished_dataset_is_not_overwritten_unasked(tmp_path, dataset):
    (tmp_path / "n.txt").write_text("new text " * 20)
    before = snapshot(dataset)
    with pytest.raises(UsageError, match="meta.json.*--overwrite"):
        prepare(str(tmp_path / "n.txt"), "byte", dataset)
    assert snapshot(dataset) == before
    (dataset / "meta.json").unlink()  # token files of another program are worth as much
    with pytest.raises(UsageError, match="train.bin.*--overwrite"):
        prepare(str(tmp_path / "n.txt"), "byte", dataset)
    (dataset / module.STAGING).mkdir()  # left by a killed run
    (dataset / module.STAGING / "train.bin").write_bytes(b"half")
    prepare(str(tmp_path / "n.txt"), "byte", dataset, overwrite=True)
    assert texts_of(dataset, "train") == [("new text " * 20)[:162]]
    assert not (dataset / module.STAGING).exists()


def test_a_failure_leaves_the_old_dataset(tmp_path, dataset):
    before = snapshot(dataset)
    for source, reason in (
        (write_jsonl(tmp_path / "e.jsonl", ["", ""]), "no text"),
        (write_jsonl(tmp_path / "s.jsonl", ["same", "same"]), "val split came out empty|train split came out empty"),
        (write_jsonl(tmp_path / "k.jsonl", ["x"], key="body"), "give --text_key, one of: body"),
    ):
        with pytest.raises(UsageError, match=reason):
            prepare(str(source), "byte", dataset, overwrite=True)
        assert snapshot(dataset) == before


def test_a_failure_while_files_move_leaves_no_mixed_dataset(tmp_path, dataset, monkeypatch):
    (tmp_path / "n.txt").write_text("new text " * 20)
    moved = []

    def replace(src, dst):
        if len(moved) == 2:
            raise OSError("the disk went away")
        moved.append(dst)
        Path(src).rename(dst)

    monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(OSError, match="went away"):
        prepare(str(tmp_path / "n.txt"), "byte", dataset, overwrite=True)
    assert not (dataset / "meta.json").exists()  # without it nothing opens the files


def test_two_at_once_in_one_folder(tmp_path, dataset):
    holder = os.open(dataset, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    (dataset / module.STAGING).mkdir()
    with pytest.raises(UsageError, match="another `dlm prepare`"):
        prepare(str(tmp_path / "d.jsonl"), "byte", dataset, overwrite=True)
    assert (dataset / module.STAGING).exists()  # the other one's work is left alone
    os.close(holder)


def test_wrong_values(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for fraction in (0, 1, -1, 2):
        with pytest.raises(UsageError, match="val_fraction"):
            prepare(str(tmp_path / "a.txt"), "byte", tmp_path / "D", val_fraction=fraction)
    with pytest.raises(UsageError, match="--out"):
        prepare(str(tmp_path / "a.txt"), "byte", tmp_path / "a.txt" / "D")
    with pytest.raises(UsageError, match="max_documents -1"):
        prepare(str(tmp_path / "a.txt"), "byte", tmp_path / "D", max_documents=-1)
    assert not (tmp_path / "D").exists()


def test_a_tokenizer_that_makes_unusable_ids_is_refused(tmp_path, monkeypatch):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[MASK]": 0, "a": 1}, unk_token="[MASK]"))
    made.add_special_tokens(["[MASK]"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("unknown words are the mask here")
    with pytest.raises(UsageError, match="made id 0"):
        prepare(str(tmp_path / "a.txt"), str(tmp_path / "tokenizer.json"), tmp_path / "D")


def test_progress_is_told_now_and_then(tmp_path, documents, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", documents)
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
    prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D")
    assert re.search(r"prepare: 300 documents, 0.0 MB, [\d.]+ MB/s, 0:00:00 left", capsys.readouterr().err)
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 5.0)
    prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "D", overwrite=True)
    assert capsys.readouterr().err == ""


# sources


def read(*spec, text_key="text"):
    return [d.text for d in open_source(spec[0] if len(spec) == 1 else spec, text_key).documents()]


@pytest.fixture
def folder(tmp_path):
    """Every kind of file, in names whose order is the order of the texts."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one\r\n")
    write_jsonl(root / "b.jsonl", ["two", "three"])
    lines = write_jsonl(tmp_path / "c", ["four", "five"]).read_bytes()
    half = len(lines) // 2
    frames = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    (root / "c.jsonl.zst").write_bytes(frames)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["six", "seven"], "n": [1, 2]}), root / "d.parquet")
    (root / "sub" / "e.md").write_text("eight")
    (root / "ignored.png").write_bytes(b"\xff\xfe")
    return root


def test_files_folders_and_globs(folder):
    assert read(str(folder)) == ["one\r\n", "two", "three", "four", "five", "six", "seven", "eight"]
    assert read(str(folder / "*.jsonl")) == ["two", "three"]
    assert read(str(folder / "**" / "*.md")) == ["eight"]
    assert read(str(folder / "a.txt"), str(folder / "b.jsonl")) == ["one\r\n", "two", "three"]
    description = open_source(str(folder)).description
    assert description["files"] == 5


def test_the_key_of_the_text(folder):
    write_jsonl(folder / "b.jsonl", ["two"], key="body")
    assert read(str(folder / "b.jsonl"), text_key="body") == ["two"]
    with pytest.raises(UsageError, match="no column 'body'; give --text_key, one of: text, n"):
        read(str(folder / "d.parquet"), text_key="body")
    with pytest.raises(UsageError, match="no text under 'n'"):
        read(str(folder / "d.parquet"), text_key="n")


def test_bad_files_are_named(folder):
    (folder / "b.jsonl").write_text('{"text": "fine"}\n\nnot json\n')
    with pytest.raises(UsageError, match="b.jsonl:3: not a line of JSON"):
        read(str(folder / "b.jsonl"))
    (folder / "b.jsonl").write_text("[1]\n")
    with pytest.raises(UsageError, match="b.jsonl:1: no text"):
        read(str(folder / "b.jsonl"))
    (folder / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(UsageError, match="a.txt is not UTF-8 text: byte 3 is 0xff"):
        read(str(folder / "a.txt"))
    whole = (folder / "c.jsonl.zst").read_bytes()
    for raw, reason in ((b"not zstd at all", "is not a Zst"), (whole[:-5], "cut short"), (whole[:5], "cut short")):
        (folder / "c.jsonl.zst").write_bytes(raw)
        with pytest.raises(UsageError, match=f"c.jsonl.zst.*{reason}"):
            read(str(folder / "c.jsonl.zst"))
    (folder / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="d.parquet is not a readable"):
        read(str(folder / "d.parquet"))
    for spec, reason in (("no/such/file", "built-in corpus"), (str(folder / "*.xml"), "pattern")):
        with pytest.raises(UsageError, match=reason):
            read(spec)
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no .txt"):
        read(str(folder / "empty"))


def test_a_lone_surrogate_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert read(str(tmp_path / "a.jsonl")) == ["a\ufffdb \U0001f600"]


def test_max_documents(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", documents)
    meta = prepare(str(tmp_path / "a.jsonl"), "char", tmp_path / "D", max_documents=40)
    assert sum(s.documents for s in meta.splits.values()) == 40
    assert meta.vocab_size == len(set("".join(documents[:40]))) + 1


def test_a_dataset_of_the_datasets_library(folder):
    local = folder / "hub"
    local.mkdir()
    (folder / "d.parquet").rename(local / "train.parquet")
    assert read(f"hf:{local}") == ["six", "seven"]
    assert read(f"hf:{local}::train") == ["six", "seven"]
    with pytest.raises(UsageError, match="cannot open"):
        read(f"hf:{local}::nosuch")
    with pytest.raises(UsageError, match="cannot open"):
        read("hf:no-such-owner/no-such-dataset")


def test_an_absent_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match="pip install zstandard"):
        read(str(folder / "c.jsonl.zst"))


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("~/a.txt") == ["one\r\n"]
    assert json.dumps(open_source("~/a.txt").description).count(str(Path(folder))) == 0

"""Rows: pure functions of the sample index, the right tokens, and a refusal of ids that clean text cannot hold."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import benchmark_loader
from dlm_scale.data import loader
from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.loader import ValidationData, open_data, open_split, require_same_tokenizer
from dlm_scale.data.prepare import prepare
from dlm_scale.errors import UsageError

L = 16


@pytest.fixture
def other(tmp_path):
    (tmp_path / "o.txt").write_text("xyz " * 400)
    prepare(str(tmp_path / "o.txt"), "byte", tmp_path / "O")
    return tmp_path / "O"


def windows(prefix):
    tokens = IndexedDataset(prefix).tokens.astype(int)
    return tokens[: len(tokens) // L * L].reshape(-1, L)


def test_an_epoch_is_every_window_once(dataset):
    data = open_data(str(dataset / "train"), L, seed=3)
    expected = windows(dataset / "train")
    assert data.num_rows == len(expected) and data.vocabulary.mask_id == 256
    rows = data.rows(np.arange(2 * len(expected)))
    assert rows.dtype == np.int64 and rows.shape == (2 * len(expected), L)
    for epoch in (rows[: len(expected)], rows[len(expected) :]):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, expected))
    assert not np.array_equal(rows[: len(expected)], expected)  # not in file order
    assert not np.array_equal(rows[: len(expected)], rows[len(expected) :])


def test_rows_depend_on_the_sample_alone(dataset, other):
    source = [{"path": str(dataset / "train"), "weight": 0.75}, {"path": str(other / "train"), "weight": 0.25}]
    for source in (source, str(dataset / "train"), "synthetic:100"):
        whole = open_data(source, L, 1).rows(np.arange(100, 164))
        again = open_data(source, L, 1)
        for size in (1, 8, 64):
            parts = [again.rows(np.arange(100, 164)[i : i + size]) for i in range(0, 64, size)]
            assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(again.rows(np.arange(163, 99, -1)), whole[::-1])
        assert not np.array_equal(open_data(source, L, 2).rows(np.arange(100, 164)), whole)


def test_a_mixture_takes_its_shares_and_all_of_each(dataset, other):
    big = SimpleNamespace(path=str(dataset / "train"), weight=3.0)
    small = SimpleNamespace(path=str(other / "train"), weight=1.0)
    data = open_data([big, small], L, 1)
    is_small = (data.rows(np.arange(400)) == ord("y")).any(-1)
    assert is_small.sum() == 100
    sizes = [len(windows(m.path)) for m in (big, small)]
    assert data.num_rows == sum(sizes)
    rows = data.rows(np.arange(4 * sizes[0]))  # more than one epoch of the big member
    big_rows = rows[~(rows == ord("y")).any(-1)]
    assert sorted(map(tuple, big_rows[: sizes[0]])) == sorted(map(tuple, windows(big.path)))


def test_members_of_a_mixture_need_one_tokenizer(dataset, tmp_path):
    (tmp_path / "c.txt").write_text("some characters " * 50)
    prepare(str(tmp_path / "c.txt"), "char", tmp_path / "C")
    members = [{"path": str(dataset / "train"), "weight": 1}, {"path": str(tmp_path / "C" / "train"), "weight": 1}]
    with pytest.raises(UsageError, match="different tokenizers .byte, 257"):
        open_data(members, L, 1)
    data = ValidationData(tmp_path / "C" / "val", L)
    require_same_tokenizer(data.meta, data.meta, "a", "b")
    with pytest.raises(UsageError, match="data.train and data.validation"):
        require_same_tokenizer(
            open_data(str(dataset / "train"), L, 1).tokenizer_meta, data.meta, "data.train", "data.validation"
        )


def test_the_fingerprint_names_the_tokens_not_the_place(dataset, other, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(dataset, moved)
    prints = [
        open_data(source, L, 1).fingerprint
        for source in (
            str(dataset / "train"),
            str(dataset / "val"),
            str(other / "train"),
            "synthetic:9",
            "synthetic:10",
            [{"path": dataset / "train", "weight": 2}, {"path": other / "train", "weight": 1}],
            [{"path": dataset / "train", "weight": 1}, {"path": other / "train", "weight": 1}],
        )
    ]
    assert len(set(prints)) == len(prints)
    assert open_data(str(moved / "train"), L, 9).fingerprint == prints[0]
    assert open_data([{"path": moved / "train", "weight": 5}], L, 9).fingerprint == prints[0]


def damage(dataset, offset, token):
    data = np.memmap(dataset / "train.bin", dtype="<u2", mode="r+")
    data[offset] = token
    data.flush()


@pytest.mark.parametrize(("token", "what"), [(256, "the mask"), (257, "not a token"), (65_535, "not a token")])
def test_a_bad_id_is_named_when_its_row_is_read(dataset, token, what, monkeypatch):
    """As in a file too large to be read whole at open."""
    monkeypatch.setattr(loader, "_scanned_at_open", lambda num_tokens: [])
    damage(dataset, 3 * L + 5, token)
    data = open_data(str(dataset / "train"), L, 1)
    with pytest.raises(UsageError, match=f"train.bin: token {3 * L + 5} is id {token}, {what}"):
        data.rows(np.arange(data.num_rows))
    rows = ValidationData(dataset / "train", L)
    assert rows.rows(np.arange(3)).shape == (3, L)  # rows before it are sound
    with pytest.raises(UsageError, match=f"token {3 * L + 5} is id {token}"):
        rows.rows(np.array([4, 3]))


def edit_meta(dataset, change):
    path = dataset / "meta.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("tokens", 400, "bin_bytes .* not fit"), ("documents", 5, "documents is"), ("idx_xxh3", "0" * 16, "idx_xxh3 is")],
)
def test_meta_and_files_must_agree(dataset, key, value, reason):
    edit_meta(dataset, lambda raw: raw["splits"]["train"].update({key: value}))
    with pytest.raises(UsageError, match=reason):
        open_split(dataset / "train")


def test_a_token_type_of_another_width_is_refused(dataset):
    def change(raw):  # twice the ids would need twice the bytes: meta.json agrees with itself, not with the files
        raw["vocab_size"], raw["mask_id"] = 10**6, 10**6 - 1
        for split in raw["splits"].values():
            split["tokens"] //= 2
            split["bin_bytes"] = 4 * split["tokens"]

    edit_meta(dataset, change)
    with pytest.raises(UsageError, match="tokens is"):
        open_split(dataset / "train")


def test_files_of_another_dataset_are_refused(dataset, other):
    for suffix in (".bin", ".idx"):
        shutil.copy(other / f"train{suffix}", dataset / f"train{suffix}")
    with pytest.raises(UsageError, match="not of one dataset"):
        open_split(dataset / "train")


def test_too_short_for_one_window(dataset):
    tokens = open_split(dataset / "val")[0].splits["val"].tokens
    assert ValidationData(dataset / "val", tokens).num_rows == 1
    for make in (lambda n: ValidationData(dataset / "val", n), lambda n: open_data(str(dataset / "val"), n, 1)):
        with pytest.raises(UsageError, match=f"seq_len={tokens + 1}"):
            make(tokens + 1)


def test_synthetic_tokens_are_uniform_without_the_mask():
    data = open_data("synthetic:11", 50, seed=4)
    rows = data.rows(np.arange(2**33, 2**33 + 2000))
    counts = np.bincount(rows.reshape(-1), minlength=11)
    assert counts[10] == 0 and data.vocabulary.mask_id == 10
    expected = rows.size / 10
    assert ((counts[:10] - expected) ** 2 / expected).sum() < 9 + 4 * np.sqrt(18)
    assert not np.array_equal(rows[0], data.rows(np.array([0]))[0])  # the high word of the sample counts
    assert data.tokenizer_meta.tokenizer.kind == "none" and data.folder is None
    with pytest.raises(UsageError, match="vocabulary size"):
        open_data("synthetic", 8, 1)


def test_validation_rows_are_in_file_order_and_spread(dataset):
    expected = windows(dataset / "val")
    data = ValidationData(dataset / "val", L)
    assert data.num_rows == len(expected)
    assert np.array_equal(data.rows(np.arange(data.num_rows)), expected)
    few = ValidationData(dataset / "val", L, max_rows=4)
    at = [i * len(expected) // 4 for i in range(4)]
    assert few.num_rows == 4 and np.array_equal(few.rows(np.arange(4)), expected[at])
    assert ValidationData(dataset / "val", L, max_rows=10**6).num_rows == len(expected)


def test_validation_text_and_bytes(dataset, documents):
    data = {name: ValidationData(dataset / name, L) for name in ("train", "val")}
    text = "".join(d.text() for d in data.values())
    assert sorted(text.split("document ")[1:]) == sorted("".join(documents).split("document ")[1:])
    tokens = sum(len(IndexedDataset(dataset / name).tokens) for name in data)
    split = {name: d.meta.splits[name] for name, d in data.items()}
    assert sum(s.tokens for s in split.values()) == tokens == len(text) + len(documents)  # a separator each
    assert data["val"].bytes_per_token == len(data["val"].text()) / split["val"].tokens
    assert data["val"].floor is None


def test_a_foreign_id_anywhere_in_a_small_file_is_refused_at_open(tmp_path):
    prepare("grammar", "char", tmp_path / "d")
    path = tmp_path / "d" / "train.bin"
    for offset in (0, 999_999, 1_999_999):
        data = np.fromfile(path, dtype=np.uint16)
        kept, data[offset] = data[offset], 11
        data.tofile(path)
        with pytest.raises(UsageError, match=rf"token {offset} is id 11"):
            open_data(str(tmp_path / "d" / "train"), 16, 1)
        data[offset] = kept
        data.tofile(path)
    open_data(str(tmp_path / "d" / "train"), 16, 1)


def test_a_large_file_is_looked_at_in_64_places(monkeypatch):
    monkeypatch.setattr(loader, "SCANNED_TOKENS", 6400)
    monkeypatch.setattr(loader, "STRETCH_TOKENS", 100)
    stretches = list(loader._scanned_at_open(1_000_000))
    assert len(stretches) == 64 and stretches[0][0] == 0 and stretches[-1][1] == 1_000_000
    assert all(stop - start == 100 for start, stop in stretches)
    assert list(loader._scanned_at_open(6401))[-1] == (6301, 6401)
    assert list(loader._scanned_at_open(6350)) == [(i, min(i + 100, 6350)) for i in range(0, 6350, 100)]


def test_rows_of_a_large_file_are_those_of_a_small_one(dataset, monkeypatch):
    """Other advice to the system, fewer places looked at."""
    small = open_data(str(dataset / "train"), L, 1).rows(np.arange(50))
    monkeypatch.setattr(loader, "SCANNED_TOKENS", 200)
    monkeypatch.setattr(loader, "STRETCH_TOKENS", 3)
    assert np.array_equal(open_data(str(dataset / "train"), L, 1).rows(np.arange(50)), small)


def test_the_benchmark_of_speed_runs(monkeypatch, capsys):
    command = ["benchmark_loader", "--json", "--only", "speed", "--tokens", "40000", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_loader.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    read = {f"{kind}_{source}" for kind in ("windows", "packed") for source in ("one", "mixture")}
    arms = read | {"batch_windows_one", "batch_packed_one", "get_batch", "get_batch_ids"}
    assert all(found[f"mtokens_per_cpu_second_{name}"] > 0 for name in arms)
    assert all(found[f"ratio_{name}"] > 0 for name in read) and found["ratio_ids_windows_one"] > 0


@pytest.mark.slow
def test_the_first_batch_of_100_gb_takes_little_memory(repository_root):
    command = [sys.executable, "benchmarks/benchmark_loader.py", "--json", "--only", "sparse"]
    ran = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, check=True, timeout=100)
    assert json.loads(ran.stdout.splitlines()[-1])["sparse_grown_mbytes"] < 50

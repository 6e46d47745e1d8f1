"""The indexed format: the same bytes as megatron-core's builder, and a refusal of everything that is not sound."""

import re
import struct

import numpy as np
import pytest
import torch

from dlm_scale.data import indexed
from dlm_scale.data.indexed import HEADER, IndexedDataset, IndexedWriter, token_dtype
from dlm_scale.data.loader import open_split
from dlm_scale.errors import UsageError

DTYPES = [np.dtype("<u2"), np.dtype("<i4")]


def write(prefix, documents, dtype):
    writer = IndexedWriter(prefix, dtype)
    for ids in documents:
        writer.add_document(ids)
    writer.close()
    return prefix


@pytest.fixture
def ids():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60_000, size=n) for n in rng.integers(1, 50, size=40)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_over_many_flushes(tmp_path, ids, dtype, monkeypatch):
    monkeypatch.setattr(indexed, "FLUSH_TOKENS", 64)
    data = IndexedDataset(write(tmp_path / "t", ids, dtype))
    assert data.num_documents == len(ids) and data.dtype == dtype
    assert data.tokens.tolist() == np.concatenate(ids).tolist()
    assert all(data.document(i).tolist() == ids[i].tolist() for i in range(len(ids)))


def test_dtype_rule_is_megatrons():
    assert [token_dtype(n).itemsize for n in (2, 65_499, 65_500, 10**6)] == [2, 2, 4, 4]


def test_documents_that_the_format_cannot_hold(tmp_path):
    with pytest.raises(UsageError, match="0 tokens"):
        IndexedWriter(tmp_path / "t", DTYPES[0]).add_document(np.array([], dtype=int))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_files_as_megatron_core(tmp_path, ids, dtype):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype.type)
    for document in ids:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    write(tmp_path / "t", ids, dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"m{suffix}").read_bytes() == (tmp_path / f"t{suffix}").read_bytes()
    theirs = megatron.IndexedDataset(str(tmp_path / "t"))
    assert [d.tolist() for d in theirs[:]] == [d.tolist() for d in ids]


def test_documents_of_several_sequences(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.finalize(str(tmp_path / "m.idx"))
    data = IndexedDataset(tmp_path / "m")
    assert [data.document(i).tolist() for i in range(data.num_documents)] == [[1, 2, 3, 4, 5], [6]]


def put(offset, fmt, value):
    def change(raw):
        raw[offset : offset + struct.calcsize(fmt)] = struct.pack(fmt, value)
        return raw

    return change


IDX_DAMAGE = {
    "magic": (put(0, "<B", 0), "magic"),
    "version": (put(9, "<Q", 2), "version 2"),
    "dtype unknown": (put(17, "<B", 99), "dtype code 99"),
    "dtype float": (put(17, "<B", 6), "dtype code 6"),
    "dtype of another size": (put(17, "<B", 4), "pointers"),
    "dtype of the same size": (put(17, "<B", 3), "dtype code 3"),
    "more sequences": (lambda raw: put(18, "<Q", struct.unpack_from("<Q", raw, 18)[0] + 1)(raw), "header says"),
    "absurd count": (put(18, "<Q", 1 << 62), "header says"),
    "no sequences": (lambda raw: HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 2) + struct.pack("<QQ", 0, 0), "no documents"),
    "no documents": (lambda raw: HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 1) + struct.pack("<Q", 0), "no documents"),
    "short": (lambda raw: raw[:-1], "header says"),
    "long": (lambda raw: raw + b"\0", "header says"),
    "modes": (lambda raw: raw + bytes(struct.unpack_from("<Q", raw, 18)[0]), "multimodal"),
    "header only in part": (lambda raw: raw[:20], "less than a header"),
    "empty": (lambda raw: b"", "empty"),
    "length 0": (put(34, "<i", 0), "length 0"),
    "negative length": (put(38, "<i", -5), "sequence 1 has length -5"),
    "doubled length": (lambda raw: put(34, "<i", 2 * struct.unpack_from("<i", raw, 34)[0])(raw), "pointers"),
    "pointer": (lambda raw: put(34 + 4 * struct.unpack_from("<Q", raw, 18)[0], "<q", 2)(raw), "pointers"),
    "negative pointer": (lambda raw: put(42 + 4 * struct.unpack_from("<Q", raw, 18)[0], "<q", -8)(raw), "pointers"),
    "last document": (lambda raw: put(len(raw) - 8, "<q", 1)(raw), "document indices"),
    "unsorted documents": (lambda raw: put(len(raw) - 16, "<q", 0)(raw), "document indices"),
    "first document": (lambda raw: put(34 + 12 * struct.unpack_from("<Q", raw, 18)[0], "<q", 1)(raw), "document indic"),
}


@pytest.mark.parametrize("name", IDX_DAMAGE)
def test_a_damaged_index_is_refused_with_its_reason(dataset, name):
    change, reason = IDX_DAMAGE[name]
    path = dataset / "train.idx"
    path.write_bytes(bytes(change(bytearray(path.read_bytes()))))
    with pytest.raises(UsageError, match=reason) as caught:
        IndexedDataset(dataset / "train")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("change", [-1, -1000, 1, 2, 1000])
def test_a_bin_of_another_size_is_refused(dataset, change):
    path = dataset / "train.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(UsageError, match="cut short" if change < 0 else "longer"):
        IndexedDataset(dataset / "train")


def test_missing_and_empty_files(dataset):
    (dataset / "train.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="train.bin: it is empty"):
        IndexedDataset(dataset / "train")
    (dataset / "train.bin").unlink()
    with pytest.raises(UsageError, match="train.bin: No such file"):
        IndexedDataset(dataset / "train")
    with pytest.raises(UsageError, match="train.bin.idx: No such file"):
        IndexedDataset(dataset / "train.bin")


def mutate(raw, rng):
    """One random change of the header or of the tables behind it."""
    raw, kind = bytearray(raw), rng.integers(6)
    at = int(rng.integers(34 if rng.random() < 0.5 else len(raw)))
    if kind == 0:
        raw[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        raw[at] = int(rng.integers(256))
    elif kind == 2:
        del raw[at : at + int(rng.integers(1, 20))]
    elif kind == 3:
        raw[at:at] = rng.bytes(int(rng.integers(1, 20)))
    elif kind == 4:
        raw[at : at + 8] = rng.bytes(8)[: len(raw) - at]
    else:
        other = int(rng.integers(len(raw) - 8))
        raw[at : at + 8], raw[other : other + 8] = raw[other : other + 8], raw[at : at + 8]
    return bytes(raw)


REASONS = (
    "bad magic|version .* of the format|dtype code|no documents in it|where its header says|multimodal"
    "|less than a header|it is empty|has length|byte pointers|document indices|where its index says"
    "|in the files and .* in meta.json"
)


def test_a_thousand_random_mutations_of_the_index_are_refused_with_a_reason(dataset):
    path, rng = dataset / "train.idx", np.random.default_rng(7)
    raw = path.read_bytes()
    whole = IndexedDataset(dataset / "train")
    tokens, lengths = whole.tokens.tolist(), whole.lengths.tolist()
    tried, accepted, reasons = 0, 0, set()
    while tried < 1000:
        changed = mutate(raw, rng)
        if changed == raw:
            continue
        tried += 1
        path.write_bytes(changed)
        with pytest.raises(UsageError, match=REASONS) as caught:  # with meta.json beside it, nothing passes
            open_split(dataset / "train")
        reasons.add(re.search(REASONS, str(caught.value))[0][:10])
        try:
            data = IndexedDataset(dataset / "train")
        except UsageError:
            continue
        # without meta.json only document borders between the same sequences can differ: the tokens are the same
        accepted += 1
        assert data.tokens.tolist() == tokens and data.lengths.tolist() == lengths
    assert accepted < 100 and len(reasons) >= 8

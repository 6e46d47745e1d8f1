"""`dlm data import`: the ids of nanoGPT and datatrove, unchanged; what is not such ids is refused with its reason."""

import numpy as np
import pytest

from dlm_scale.cli import main
from dlm_scale.data.convert import import_ids
from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.meta import read_meta
from dlm_scale.data.prepare import prepare
from dlm_scale.data.verify import verify
from dlm_scale.errors import UsageError

from .conftest import snapshot, texts_of, write_jsonl


def ids_of(documents):
    """Of the byte tokenizer, with its separator."""
    return [np.frombuffer(text.encode() + b"\0", dtype=np.uint8) for text in documents]


@pytest.fixture
def nanogpt(tmp_path, documents):
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    for name, texts in (("train", documents[:250]), ("val", documents[250:])):
        np.concatenate(ids_of(texts)).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


def datatrove(folder, documents, dtype, name="00000"):
    folder.mkdir(exist_ok=True)
    ids = ids_of(documents)
    np.concatenate(ids).astype(dtype).tofile(folder / f"{name}.ds")
    np.cumsum([len(i) for i in ids]).astype("<u8").tofile(folder / f"{name}.ds.index")
    return folder


@pytest.mark.parametrize("chunk_tokens", [100, 1 << 22])
def test_nanogpts_folder_keeps_its_splits_and_ids(nanogpt, tmp_path, documents, chunk_tokens):
    meta = import_ids(nanogpt, "byte", tmp_path / "D", workers=1, chunk_tokens=chunk_tokens)
    for name, texts in (("train", documents[:250]), ("val", documents[250:])):
        assert (tmp_path / "D" / f"{name}.bin").read_bytes() == (nanogpt / f"{name}.bin").read_bytes()
        assert texts_of(tmp_path / "D", name) == [t + "\0" for t in texts]
        assert meta.splits[name].bytes == sum(len(t) for t in texts)
        verify(str(tmp_path / "D" / name))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_datatroves_files_are_split_as_texts_are(tmp_path, documents, dtype):
    folder = datatrove(tmp_path / "ds", documents[:170], dtype)
    datatrove(folder, documents[170:], dtype, "00001")
    import_ids(folder, "byte", tmp_path / "D", workers=1, chunk_tokens=500)
    prepare(str(write_jsonl(tmp_path / "a.jsonl", documents)), "byte", tmp_path / "E")
    for name in ("train", "val"):
        for file in (f"{name}.bin", f"{name}.idx"):
            assert (tmp_path / "D" / file).read_bytes() == (tmp_path / "E" / file).read_bytes()


def test_one_document_is_cut_by_position(tmp_path):
    ids = np.arange(1, 201).astype("<u2")
    ids.tofile(tmp_path / "x.bin")
    import_ids(tmp_path / "x.bin", "byte", tmp_path / "D", val_fraction=0.25)
    assert IndexedDataset(tmp_path / "D" / "train").tokens.tolist() == ids[:150].tolist()
    assert IndexedDataset(tmp_path / "D" / "val").tokens.tolist() == ids[150:].tolist()


def test_gpt2_ids(tmp_path, shared_data):
    ranks = str(shared_data("gpt2.tiktoken"))
    ids = np.append([[i, 995, 50256] for i in range(1000, 1150)], [15496, 11]).astype("<u2")  # one without a separator
    ids.tofile(tmp_path / "train.bin")
    meta = import_ids(tmp_path / "train.bin", ranks, tmp_path / "D", workers=1)
    assert read_meta(tmp_path / "D" / "meta.json") == meta and meta.splits["val"].documents < 60


def test_the_command(nanogpt, tmp_path, capsys):
    assert main(["data", "import", str(nanogpt), "--tokenizer=byte", f"--out={tmp_path}/D"]) == 0
    assert f"train on it with data.train={tmp_path}/D/train" in capsys.readouterr().out
    before = snapshot(tmp_path / "D")
    assert main(["data", "import", str(nanogpt), "--tokenizer=byte", f"--out={tmp_path}/D"]) == 2
    assert "--overwrite" in capsys.readouterr().err and snapshot(tmp_path / "D") == before
    assert main(["data", "import", str(nanogpt), f"--out={tmp_path}/E"]) == 2


def change(path, edit):
    raw = bytearray(path.read_bytes())
    path.write_bytes(bytes(edit(raw)))


REFUSED = {
    "odd size": ("x.ds", lambda raw: raw + b"\0", "bytes are not 2 or 4 for each of the"),
    "short": ("x.ds", lambda raw: raw[:-2], "bytes are not 2 or 4"),
    "empty": ("x.ds", lambda raw: b"", "is empty"),
    "id": ("x.ds", lambda raw: raw[:20] + b"\x2c\x01" + raw[22:], "token 10 is id 300.*Name the --tokenizer"),
    "the mask": ("x.ds", lambda raw: raw[:20] + b"\x00\x01" + raw[22:], "token 10 is id 256"),
    "index cut": ("x.ds.index", lambda raw: raw[:-3], "are not rising ends"),
    "index falls": ("x.ds.index", lambda raw: raw[8:16] + raw[:8] + raw[16:], "are not rising ends"),
    "index from 0": ("x.ds.index", lambda raw: bytes(8) + raw[8:], "are not rising ends"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_files_are_refused(tmp_path, documents, name):
    file, edit, reason = REFUSED[name]
    folder = datatrove(tmp_path / "ds", documents, "<u2", "x")
    change(folder / file, edit)
    with pytest.raises(UsageError, match=f"{file}.*{reason}"):
        import_ids(folder, "byte", tmp_path / "D")
    assert not (tmp_path / "D" / "meta.json").exists()


def test_other_refusals(nanogpt, tmp_path):
    change(nanogpt / "val.bin", lambda raw: raw[:-1])
    with pytest.raises(UsageError, match="val.bin.*no whole number of uint16"):
        import_ids(nanogpt, "byte", tmp_path / "D")
    with pytest.raises(UsageError, match="char: its ids depend"):
        import_ids(nanogpt, "char", tmp_path / "D")
    with pytest.raises(UsageError, match="no .bin or .ds"):
        import_ids(tmp_path / "none", "byte", tmp_path / "D")
    (nanogpt / "a.ds").write_bytes(b"12")
    with pytest.raises(UsageError, match="no folder of either kind"):
        import_ids(nanogpt, "byte", tmp_path / "D")
    with pytest.raises(UsageError, match="a.ds.index: No such file"):
        import_ids(nanogpt / "a.ds", "byte", tmp_path / "D")

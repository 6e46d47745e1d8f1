"""Small datasets for the tests of the data room."""

import json

import pytest

from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.meta import read_meta
from dlm_scale.data.prepare import prepare
from dlm_scale.data.tokenizer import load_tokenizer


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def texts_of(folder, name):
    """Each document of a split, as text."""
    meta = read_meta(folder / "meta.json")
    made, data = load_tokenizer(folder, meta), IndexedDataset(folder / name)
    return [made.decode(data.document(i)) for i in range(data.num_documents)]


def snapshot(folder):
    """Every file's content; packing plans beside them do not count."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="session")
def documents():
    return [f"document {i}: " + "abc " * (i % 7) + "." for i in range(300)]


@pytest.fixture
def dataset(tmp_path, documents):
    """A folder with a byte dataset of 300 documents."""
    prepare(str(write_jsonl(tmp_path / "d.jsonl", documents)), "byte", tmp_path / "D")
    return tmp_path / "D"

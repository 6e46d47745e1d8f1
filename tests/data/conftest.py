"""Small datasets for the tests of the data room."""

import json

import pytest

from dlm_scale.data.prepare import prepare


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def documents():
    return [f"document {i}: " + "abc " * (i % 7) + "." for i in range(300)]


@pytest.fixture
def dataset(tmp_path, documents):
    """A folder with a byte dataset of 300 documents."""
    prepare(str(write_jsonl(tmp_path / "d.jsonl", documents)), "byte", tmp_path / "D")
    return tmp_path / "D"

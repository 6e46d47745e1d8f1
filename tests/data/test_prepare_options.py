"""Flags, variables and the config section of `dlm prepare`: which wins, and what an invalid one says."""

import os

import pytest

from dlm_scale import prepare as command
from dlm_scale.cli import main
from dlm_scale.data.meta import read_meta

from .conftest import snapshot, write_jsonl
from .test_hub import numbered, parquet

CONFIG = """
model: {{num_layers: 1, hidden_size: 8, num_heads: 1, seq_len: 8}}
data:
  train: {train}
  prepare: {prepare}
train: {{global_batch_size: 1, micro_batch_size: 1, num_steps: 1, out: x}}
optimizer: {{learning_rate: 1e-3}}
"""


@pytest.fixture
def source(tmp_path, documents):
    return str(write_jsonl(tmp_path / "a.jsonl", documents))


@pytest.fixture
def said(monkeypatch):
    """What `prepare` would be called with, instead of calling it."""
    calls = []

    def prepare(source, tokenizer, out, **options):
        calls.append(options | {"source": source, "tokenizer": tokenizer, "out": out})
        raise KeyboardInterrupt

    monkeypatch.setattr("dlm_scale.data.prepare.prepare", prepare)
    for option in command.OPTIONS.values():
        monkeypatch.delenv(option.variable or "x", raising=False)
    return calls


VARIABLES = {  # variable, its value, the flag and another value for it, how to see what arrived
    "OWT_MAX_DOCS": ("7", "--max_documents=9", lambda call: call["max_documents"], 7, 9),
    "OWT_MAX_TOKENS": ("70", "--max_tokens=90", lambda call: call["max_tokens"], 70, 90),
    "OWT_NUM_PROC": ("2", "--workers=3", lambda call: call["workers"], 2, 3),
    "OWT_NUM_PROC_LOAD_DATASET": ("2", "--num_proc_load_dataset=3", lambda call: call["hub"].num_proc, 2, 3),
    "OWT_STREAMING": ("0", "--streaming=true", lambda call: call["hub"].streaming, False, True),
    "OWT_DELETE_CACHE": ("1", "--delete_cache=false", lambda call: call["hub"].cache != "", True, False),
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_counts_and_a_flag_counts_more(said, monkeypatch, capsys, variable):
    text, flag, value_of, by_variable, by_flag = VARIABLES[variable]
    arguments = ["prepare", "openwebtext", "--out=D", *(["--streaming=0"] if variable == "OWT_DELETE_CACHE" else [])]
    monkeypatch.setenv(variable, text)
    assert main(arguments) == 130 and value_of(said[-1]) == by_variable
    assert f"{variable}={text}" in capsys.readouterr().err and said[-1]["tokenizer"] == "gpt2"
    assert main([*arguments, flag]) == 130 and value_of(said[-1]) == by_flag
    for wrong in ("many", "-1", "1.5"):
        monkeypatch.setenv(variable, wrong)
        assert main(arguments) == 2 and f"{variable} is '{wrong}': expected" in capsys.readouterr().err
    monkeypatch.setenv(variable, "")
    assert main(arguments) == 130 and capsys.readouterr().err == ""
    assert main([*arguments, flag.split("=")[0] + "=x"]) == 2
    assert f"{flag.split('=')[0]} is 'x': expected" in capsys.readouterr().err


def test_all_variables_of_the_seed_are_known():
    assert {option.variable for option in command.OPTIONS.values()} - {""} == set(VARIABLES)


def test_variables_make_a_smaller_dataset(source, tmp_path, monkeypatch):
    monkeypatch.setenv("OWT_MAX_DOCS", "50")
    monkeypatch.setenv("OWT_NUM_PROC", "1")
    assert main(["prepare", source, "--tokenizer=byte", f"--out={tmp_path}/D"]) == 0
    assert sum(s.documents for s in read_meta(tmp_path / "D" / "meta.json").splits.values()) == 50


def test_a_download_into_out_is_deleted(tmp_path):
    parquet(tmp_path / "files" / "train.parquet", numbered(120))
    arguments = ["prepare", "openwebtext", f"--from={tmp_path}/files", "--tokenizer=byte", f"--out={tmp_path}/D"]
    assert main([*arguments, "--streaming=false", "--delete_cache", "--num_proc_load_dataset=1", "--workers=1"]) == 0
    assert sorted(os.listdir(tmp_path / "D")) == ["meta.json", "train.bin", "train.idx", "val.bin", "val.idx"]


def test_duplicates_by_flag(tmp_path, documents):
    path = write_jsonl(tmp_path / "a.jsonl", documents + documents[:40])
    assert main(["prepare", str(path), "--deduplicate", "--tokenizer=byte", f"--out={tmp_path}/D"]) == 0
    meta = read_meta(tmp_path / "D" / "meta.json")
    assert sum(s.documents for s in meta.splits.values()) == 300 and meta.source["duplicates"] == 40


def config(folder, train, prepare):
    (folder / "c.yaml").write_text(CONFIG.format(train=train, prepare=prepare))
    return f"--config={folder}/c.yaml"


def test_from_a_training_config(source, tmp_path):
    flag = config(tmp_path, f"{tmp_path}/D/train", f"{{source: {source}, tokenizer: byte, max_documents: 50}}")
    assert main(["prepare", flag, "--val_fraction=0.4"]) == 0
    assert main(["prepare", source, "--tokenizer=byte", "--max_documents=50", "--val_fraction=.4",
                 f"--out={tmp_path}/E"]) == 0  # fmt: skip
    assert snapshot(tmp_path / "D") == snapshot(tmp_path / "E")


def test_a_recipe_in_a_config_has_its_tokenizer(tmp_path, said):
    assert main(["prepare", config(tmp_path, "data/x/train", "{source: shakespeare_char}")]) == 130
    assert (said[0]["source"], said[0]["tokenizer"], said[0]["out"]) == (["shakespeare_char"], "char", "data/x")
    mixed = "[{path: data/x/train}, {path: data/y/train}]"
    assert main(["prepare", config(tmp_path, mixed, "{source: [a, b], tokenizer: byte, out: data/z}")]) == 130
    assert (said[1]["source"], said[1]["out"]) == (["a", "b"], "data/z")


@pytest.mark.parametrize(
    ("train", "prepare", "reason"),
    [
        ("D/train", "{sourec: a}", "did you mean data.prepare.source"),
        ("D/train", "{source: a, val_fraction: 2}", "data.prepare.val_fraction"),
        ("D/train", "{source: a, tokenizer: 3}", "data.prepare.tokenizer"),
        ("D/train", "{tokenizer: byte}", "data.prepare.source"),
        ("D/train", "null", "has no section data.prepare"),
        ("D/other", "{source: a}", "say data.prepare.out"),
        ("D/train", "{source: a}", "--tokenizer is missing"),
    ],
)
def test_a_wrong_section_is_refused(tmp_path, capsys, train, prepare, reason):
    assert main(["prepare", config(tmp_path, train, prepare)]) == 2
    assert reason in capsys.readouterr().err


def test_nothing_to_prepare(capsys):
    assert main(["prepare", "--tokenizer=byte", "--out=D"]) == 2
    assert "say what to prepare" in capsys.readouterr().err
    assert main(["prepare", "a.txt", "--tokenizer=byte"]) == 2
    assert "--out is missing" in capsys.readouterr().err

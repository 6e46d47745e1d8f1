"""docs/from_the_seeds.md: every command of it runs, at tiny size, one after the other in forks of this process.

The recipes' downloads are stood in for by small files with the same columns, as tests/data has them.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import datasets  # noqa: F401  (once, before the forks, as everything that a command would import)
import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pyarrow
import pyarrow.parquet
import pytest
import torch._dynamo  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

import dlm_scale.engine.session  # noqa: F401
import dlm_scale.inference  # noqa: F401
from dlm_scale import cli
from dlm_scale.config import load_config
from dlm_scale.prepare import _of_config
from tests.forked import run_ranks
from tests.test_docs import BLOCKS, DOCUMENTS, ROOT, RUN, commands

DOCUMENT, STEPS, LENGTH = "docs/from_the_seeds.md", 3, 256
TINY = ("model.hidden_size=16", "model.num_heads=2", "model.ffn_size=32", f"train.stop_at_step={STEPS}",
        "train.log_every=1", "train.precision=fp32", "train.eval_rows=2", "train.eval_draws=2", "train.device=cpu")
ROWS = ("train.total_batch_size=null", "train.global_batch_size=4", "train.micro_batch_size=2")
EARLY = {"critic_start": "objective.critic_start=0 objective.critic_end=2",
         "sampler_start": "objective.sampler_start=0",
         "edit_stage_start": "diffusion.edit_stage_start=0.0"}  # what begins late begins at once


def parquet(path: Path, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def stand_in(recipe: str, folder: Path) -> Path:
    """A folder with what the recipe's repository has, small."""
    folder = folder / "hub" / recipe
    if folder.exists():
        return folder
    talks = [[{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "It is said. " * (1 + i % 7)}]
             for i in range(40)]
    texts = [f"Document {i}. " + "To be, or not to be, that is the question. " * 40 for i in range(40)]
    if recipe == "shakespeare_char":
        folder.mkdir(parents=True)
        (folder / "input.txt").write_text("ROMEO:\nTo be, or not to be?\n\nJULIET: What's in a name\n" * 200)
    elif recipe == "wikitext103":
        lines = [line for i, text in enumerate(texts) for line in (f" = Title {i} = \n", f" {text}\n")]
        for split in ("train", "validation", "test"):
            parquet(folder / f"{split}-00000-of-00001.parquet", text=lines)
    elif recipe in ("smol-smoltalk", "everyday-conversations", "nemotron-chat"):
        names = {"everyday-conversations": ("train_sft", "test_sft"), "nemotron-chat": ("chat_if",)}
        splits = names.get(recipe, ("train", "test"))
        for split in splits:
            parquet(folder / "data" / f"{split}-00000-of-00001.parquet", messages=talks)
        files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
        (folder / "README.md").write_text(
            "---\n" + json.dumps({"configs": [{"config_name": "default", "data_files": files}]}) + "\n---\n")
    else:
        places = {"openwebtext": "plain_text/train-0.parquet", "tinystories": "data/train-00000-of-00001.parquet"}
        parquet(folder / places.get(recipe, "sample/10BT/000_00000.parquet"), text=texts)
        if recipe == "tinystories":
            parquet(folder / "data" / "validation-00000-of-00001.parquet", text=texts)
    return folder


def tiny(words: list[str], folder: Path) -> list[str]:
    """The words after `dlm`, with what makes the command small behind them."""
    if words[0] == "prepare":
        recipe = _of_config(words[2])["source"][0] if words[1] == "--config" else words[1]
        tokenizer = [] if recipe == "shakespeare_char" else ["--tokenizer=byte"]
        return [*words, f"--from={stand_in(recipe, folder)}", "--workers=1", *tokenizer]
    if words[0] != "train":
        return [*words, "--animate_delay=0"] if any(word.startswith("--animate") for word in words) else words
    given, config = " ".join(words[2:]), Path(words[1]).read_text()
    small = [*TINY, *" ".join(more for key, more in EARLY.items() if key in config).split()]
    if "model.depth=" not in given:
        small += ["model.depth=null", "model.num_layers=1"]
    if "train.total_batch_size=" not in given:
        small += [*ROWS, f"model.seq_len={LENGTH}"]
    return [*words, *small]


def runnable() -> Iterator[tuple[str, str]]:
    """(heading, command) of everything that runs."""
    for block in BLOCKS:
        if block.document == DOCUMENT and block.directive == RUN and block.language == "bash":
            heading = DOCUMENTS[DOCUMENT].split(block.text)[0].rsplit("\n## ", 1)[1].split("\n")[0]
            for words in commands(block.text):
                yield heading, shlex.join(words)


HEADINGS = list(dict.fromkeys(heading for heading, _ in runnable()))


def _run(folder: str, words: list[str], output: str) -> int:
    os.chdir(folder)
    with open(output, "a", encoding="utf-8") as file, redirect_stdout(file):
        return cli.main(words)


def execute(command: str, folder: Path) -> str:
    """Run one command line of the document; what it printed."""
    program, *rest = shlex.split(command)
    ranks = 1
    if program in ("deepspeed", "torchrun"):
        ranks, rest = 2, rest[rest.index("dlm_scale.train") :]
        rest[0] = "train"
    output = folder / "output"
    output.unlink(missing_ok=True)
    codes = run_ranks(ranks, _run, str(folder), tiny(rest, folder), str(output))
    assert codes == [0] * ranks, f"{command}: exit codes {codes}"
    return output.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("seeds")
    for name in ("configs", "tools"):
        (path / name).symlink_to(ROOT / name)
    return path


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_command_runs(heading, folder, monkeypatch):
    monkeypatch.chdir(folder)
    printed = {command: execute(command, folder) for where, command in runnable() if where == heading}
    for command, text in printed.items():
        if " sample " in command or " evaluate " in command:
            assert text.strip(), command
        if "train configs/" in command:
            config, *overrides = shlex.split(command.split("train ", 1)[1])
            status = json.loads((folder / load_config(config, overrides).train.out / "status.json").read_text())
            assert (status["status"], status["step"]) == ("stopped", STEPS), command


def test_the_options_of_the_document_do_what_they_say(folder):
    """After the commands above: a depth is a number of layers, a batch in tokens is rows, N tokens are whole rows."""
    config = load_config(folder / "runs" / "depth4" / "config.yaml")
    assert config.model.num_layers == 4 and config.train.global_batch_size == 2

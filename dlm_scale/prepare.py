"""`dlm prepare`: its flags, the variables and the config section that they overrule, and what it says at the end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dlm_scale.errors import UsageError


class Option(NamedTuple):
    """A value that a flag, a variable or a config key may give, in this order; `parse` raises ValueError."""

    parse: Callable[[str], Any]
    default: Any
    expected: str
    help: str
    variable: str = ""


def _boolean(text: str) -> bool:
    known = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in known:
        raise ValueError
    return known[text.lower()]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


COUNT, BOOLEAN = (_count, "a whole number, 0 or more"), (_boolean, "true or false (1 or 0)")
OPTIONS = {
    "tokenizer": Option(str, None, "a name", "byte, char, gpt2, a GPT-2 .tiktoken ranks file, or a tokenizer.json"),
    "out": Option(str, None, "a folder", "folder to write"),
    "val_fraction": Option(float, 0.1, "a number", "share of validation (default 0.1)"),
    "text_key": Option(str, "text", "a name", "key or column of the text in JSON Lines, Parquet, hf:"),
    "max_documents": Option(COUNT[0], 0, COUNT[1], "take at most so many documents (0: all)", "OWT_MAX_DOCS"),
    "max_tokens": Option(COUNT[0], 0, COUNT[1], "take documents up to so many tokens (0: all)", "OWT_MAX_TOKENS"),
    "chat": Option(
        str, "", "a name", "rows are conversations: a document an answer, by this template (chatml, or a Jinja file)"
    ),
    "max_length": Option(COUNT[0], 0, COUNT[1], "of an answer with its past: the oldest past goes first (0: any)"),
    "special_tokens": Option(
        lambda text: tuple(text.split(",")), (), "names with commas", "tokens to add, as <|im_end|> (--chat: its own)"
    ),
    "deduplicate": Option(BOOLEAN[0], False, BOOLEAN[1], "take each text once (16 bytes of memory a document)"),
    "stream": Option(BOOLEAN[0], False, BOOLEAN[1], "publish shards at once, for data.order=sharded"),
    "stream_tokens": Option(COUNT[0], 1 << 24, COUNT[1], "tokens of such a shard (default 16,777,216)"),
    "workers": Option(COUNT[0], 0, COUNT[1], "processes (default: one a core)", "OWT_NUM_PROC"),
    "from": Option(str, "", "a folder", "take the files of a recipe or of hf:NAME from this folder"),
    "streaming": Option(BOOLEAN[0], True, BOOLEAN[1], "false: download hf: and recipes first", "OWT_STREAMING"),
    "num_proc_load_dataset": Option(
        COUNT[0], 0, COUNT[1], "processes of that download (default: workers)", "OWT_NUM_PROC_LOAD_DATASET"
    ),
    "delete_cache": Option(
        BOOLEAN[0], False, BOOLEAN[1], "true: download into OUT and delete it at the end", "OWT_DELETE_CACHE"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Tokenize a text into OUT/train.{bin,idx}, OUT/val.{bin,idx} and OUT/meta.json."
    parser.add_argument(
        "source",
        nargs="*",
        metavar="SOURCE",
        help="file, folder, glob, built-in corpus (stdlib, grammar), recipe (shakespeare_char, openwebtext,"
        " wikitext103, fineweb, fineweb-edu, tinystories) or hf:NAME[:CONFIG[:SPLIT]]",
    )
    config = "training config: SOURCE and options from its data.prepare, OUT from data.train"
    parser.add_argument("--config", help=config)
    for name, option in OPTIONS.items():
        variable = f" [{option.variable}]" if option.variable else ""
        bare = {"nargs": "?", "const": "true"} if option.parse is _boolean else {}
        bare = {"nargs": "?", "const": "chatml"} if name == "chat" else bare
        parser.add_argument(f"--{name}", help=option.help + variable, **bare)
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset in OUT")


def run(args: argparse.Namespace) -> int:
    """Prepare, then say what was made and what to do next. Raises UsageError."""
    config = _of_config(args.config) if args.config else {}
    source = args.source or config.get("source")
    if not source:
        raise UsageError("say what to prepare: dlm prepare SOURCE --tokenizer T --out DIR, or --config CONFIG.yaml")
    from dlm_scale.data.hub import RECIPES

    if len(source) == 1 and source[0] in RECIPES:
        recipe = RECIPES[source[0]]
        config = {"tokenizer": recipe.tokenizer, "chat": recipe.chat} | config
    chosen = {name: _value(name, getattr(args, name), os.environ, config) for name in OPTIONS}
    for name in ("tokenizer", "out"):
        if not chosen[name]:
            raise UsageError(f"--{name} is missing; see `dlm prepare --help`")
    if chosen["chat"] and chosen["text_key"] == "text":
        chosen["text_key"] = "messages"
    _prepare(list(source), chosen, args.overwrite)
    return 0


def _prepare(source: list[str], chosen: dict[str, Any], overwrite: bool) -> None:
    from dlm_scale.data.hub import HubOptions
    from dlm_scale.data.prepare import prepare
    from dlm_scale.data.verify import summary

    out, workers = Path(chosen["out"]), chosen["workers"]
    cache = str(out / ".download") if chosen.pop("delete_cache") and not chosen["streaming"] else ""
    hub = HubOptions(chosen.pop("from"), chosen.pop("streaming"), chosen.pop("num_proc_load_dataset") or workers, cache)
    meta = prepare(source, **chosen, overwrite=overwrite, hub=hub)
    if cache:
        import shutil

        shutil.rmtree(cache, ignore_errors=True)
    print(summary(meta, chosen["out"]))


def _value(name: str, flag: str | None, variables: Mapping[str, str], config: Mapping[str, Any]) -> Any:
    option = OPTIONS[name]
    text, origin = flag, f"--{name}"
    if text is None and variables.get(option.variable, "") != "":
        text, origin = variables[option.variable], option.variable
        print(f"prepare: {option.variable}={text} in the environment: --{name} {text}", file=sys.stderr)
    if text is None:
        return config.get(name, option.default)
    try:
        return option.parse(text)
    except ValueError:
        raise UsageError(f"{origin} is {text!r}: expected {option.expected}") from None


def _of_config(path: str) -> dict[str, Any]:
    """`data.prepare` of a training config as values, OUT being the folder of its data.train."""
    from dlm_scale.config import load_config

    data = load_config(path).data
    if data.prepare is None:
        raise UsageError(f"{path} has no section data.prepare: add one, as in prepare: {{source: ..., tokenizer: ...}}")
    given = {key: value for key, value in data.prepare.model_dump().items() if key in data.prepare.model_fields_set}
    prefix = Path(data.train[0].path)
    if "out" not in given:
        if len(data.train) > 1 or prefix.name != "train":
            raise UsageError(f"{path}: data.train is not one path DIR/train, so say data.prepare.out")
        given["out"] = str(prefix.parent)
    return given

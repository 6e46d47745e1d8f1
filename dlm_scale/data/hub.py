"""Datasets read through the `datasets` library: recipes by name, `hf:NAME[:CONFIG[:SPLIT]]`, streamed or downloaded."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_scale.data.chat import messages_of
from dlm_scale.data.documents import Chunk, Document, Source, batches
from dlm_scale.data.optional import import_optional
from dlm_scale.errors import UsageError

MIN_CHUNKS, MAX_CHUNKS = 64, 1024  # of a stream: a file each where there are many, else a few row groups each
BATCH_ROWS = 256


@dataclass(frozen=True)
class HubOptions:
    """`folder`: where the dataset's files lie, instead of on the Hub. Not `streaming`: download it first, with
    `num_proc` processes, into `cache` (empty: the library's own)."""

    folder: str = ""
    streaming: bool = True
    num_proc: int = 0
    cache: str = ""


@dataclass(frozen=True)
class Recipe:
    """A named source: a dataset of the Hub, or a text at `url`; `validation` names a split that is validation as it is.

    `title`: rows are lines of articles, each of which begins with a line that this pattern matches. `chat`: rows are
    conversations, for this template.
    """

    about: str
    repository: str
    config: str = ""
    tokenizer: str = "gpt2"
    text_key: str = "text"
    validation: str = ""
    title: str = ""
    url: str = ""
    split: str = "train"
    chat: str = ""


RECIPES = {
    "shakespeare_char": Recipe(
        "Shakespeare's plays, 1.1 MB, by character",
        "text",
        tokenizer="char",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    "openwebtext": Recipe("web pages that Reddit linked to, 40 GB", "Skylion007/openwebtext"),
    "wikitext103": Recipe(
        "good articles of Wikipedia, 0.5 GB, with their own validation",
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        validation="validation",
        title=r" = [^=].* = \n?",
    ),
    "fineweb": Recipe("web pages, 10 billion tokens", "HuggingFaceFW/fineweb", "sample-10BT"),
    "fineweb-edu": Recipe("educational web pages, 10 billion tokens", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "tinystories": Recipe(
        "short stories, 2 GB, with their own validation", "roneneldan/TinyStories", validation="validation"
    ),
    "smol-smoltalk": Recipe(
        "conversations for small models, with their own validation", "HuggingFaceTB/smol-smoltalk",
        text_key="messages", validation="test", chat="chatml",
    ),
    "everyday-conversations": Recipe(
        "2,000 short conversations, with their own validation", "HuggingFaceTB/everyday-conversations-llama3.1-2k",
        text_key="messages", validation="test_sft", split="train_sft", chat="chatml",
    ),
    "nemotron-chat": Recipe(
        "conversations that follow instructions", "nvidia/Nemotron-Instruction-Following-Chat-v1",
        text_key="messages", split="chat_if", chat="chatml",
    ),
}


@dataclass(frozen=True)
class Table:
    """What `datasets.load_dataset` is called with, so that every process opens the same rows."""

    name: str
    path: str
    config: str
    split: str
    files: tuple[str, ...]
    options: HubOptions


def hub_source(spec: str, text_key: str, options: HubOptions) -> Source:
    """`hf:NAME[:CONFIG[:SPLIT]]`, NAME being a dataset of the Hub or a folder."""
    name, config, split = (*spec[3:].split(":", 2), "", "")[:3]
    recipe = Recipe(spec, name, config, text_key=text_key)
    return _source(spec, recipe, {split or "train": None}, options)


def recipe_source(name: str, text_key: str, options: HubOptions) -> Source:
    """One of RECIPES. A `text_key` other than the default is taken instead of the recipe's."""
    recipe = RECIPES[name]
    if text_key != "text":
        recipe = Recipe(**{**vars(recipe), "text_key": text_key})
    splits = {recipe.validation: "val", recipe.split: "train"} if recipe.validation else {recipe.split: None}
    return _source(name, recipe, splits, options)


def _source(name: str, recipe: Recipe, splits: dict[str, str | None], options: HubOptions) -> Source:
    datasets = import_optional("datasets", name)
    tables = {_table(name, recipe, split, options): role for split, role in splits.items()}

    def chunks(chunk_bytes: int, cut: str | None) -> Iterator[Chunk]:
        for table, role in tables.items():
            if recipe.title:
                lines = (document.text for document in _rows(table, 1, 0, recipe.text_key))
                yield from batches((Document(t, split=role) for t in articles(lines, recipe.title)), chunk_bytes)
                continue
            parts = _num_parts(table, chunk_bytes)
            for part in range(parts):
                yield Chunk(read_part, (table, parts, part, recipe.text_key, role), 1 / parts / len(tables))

    known = {"repository": recipe.repository, "config": recipe.config} if name in RECIPES else {}
    where = [(t.path, t.config, t.split, t.files, t.options.folder, t.options.streaming) for t in tables]
    return Source(chunks, {"name": name} | known, identity=[where, datasets.__version__])


def _table(name: str, recipe: Recipe, split: str, options: HubOptions) -> Table:
    folder = options.folder and Path(options.folder).expanduser()
    if folder and not folder.is_dir():
        raise UsageError(f"--from {options.folder}: no such folder. Give the one with the files of {name}")
    if not recipe.url:
        return Table(name, str(folder or recipe.repository), recipe.config, split, (), options)
    files = tuple(sorted(map(str, folder.glob("*.txt")))) if folder else (recipe.url,)
    if not files:
        raise UsageError(f"--from {options.folder} holds no .txt file. Give the folder with the text of {name}")
    return Table(name, recipe.repository, "", split, files, options)


def read_part(table: Table, parts: int, part: int, text_key: str, role: str | None) -> Iterator[Document]:
    """The rows of one of so many parts, in order."""
    return _rows(table, parts, part, text_key, role)


def _rows(table: Table, parts: int, part: int, text_key: str, role: str | None = None) -> Iterator[Document]:
    with _said_by_library(table):
        opened = _opened(table)
        number = 0
        for batch in opened.shard(parts, part, contiguous=True).with_format("arrow").iter(batch_size=BATCH_ROWS):
            if text_key not in batch.column_names:
                raise UsageError(f"{table.name} has no column {text_key!r}; give --text_key, one of: "
                                 f"{', '.join(batch.column_names)}")  # fmt: skip
            for text in batch[text_key].to_pylist():
                yield document_of({text_key: text}, text_key, lambda: f"{table.name} row {number} of part {part}", role)
                number += 1


def _num_parts(table: Table, chunk_bytes: int) -> int:
    """Into how many parts the rows are cut: by bytes where they lie here, else by files or row groups."""
    with _said_by_library(table):
        opened = _opened(table)
        if table.options.streaming:
            return min(opened.num_shards, MAX_CHUNKS)
        return max(1, min(opened.num_rows, -(-opened.data.nbytes // chunk_bytes)))


@functools.lru_cache(maxsize=2)
def _opened(table: Table) -> Any:
    datasets = import_optional("datasets", table.name)
    config, options = table.config, table.options
    if options.folder and config and config not in datasets.get_dataset_config_names(table.path):
        config = ""  # the folder holds the files of that config alone
    arguments: dict[str, Any] = {"split": table.split, "streaming": options.streaming}
    if table.files:
        arguments |= {"data_files": {table.split: list(table.files)}, "sample_by": "document"}
    if not options.streaming:
        arguments |= {"num_proc": options.num_proc or None, "cache_dir": options.cache or None}
    opened = datasets.load_dataset(table.path, config or None, **arguments)
    if options.streaming and opened.num_shards < MIN_CHUNKS and hasattr(opened, "reshard"):
        opened = opened.reshard()
    return opened


@contextmanager
def _said_by_library(table: Table) -> Iterator[None]:
    try:
        yield
    except (UsageError, GeneratorExit):
        raise
    except Exception as error:  # whatever its many readers raise for files that they do not like
        raise UsageError(f"{table.name}: `datasets` cannot open it: {type(error).__name__}: {error}") from error


def articles(lines: Iterator[str], title: str) -> Iterator[str]:
    """Lines joined to texts, a new one at each line that matches `title`."""
    begins, article = re.compile(title), []
    for line in lines:
        if article and begins.fullmatch(line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def document_of(row: Any, text_key: str, where: Callable[[], str], split: str | None = None) -> Document:
    """The text of a row, or its conversation where a list stands under the key. UsageError names `where()`."""
    found = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(found, list) or not found:
        return Document(text_of(row, text_key, where), split=split)
    messages = tuple((_encodable(role), _encodable(content)) for role, content in messages_of(found, where))
    return Document("\n".join(itertools.chain(*messages)), split=split, messages=messages)


def text_of(row: Any, text_key: str, where: Callable[[], str]) -> str:
    """The text of a row. Raises UsageError that names `where()`."""
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        known = f"; give --text_key, one of: {', '.join(map(str, row))}" if isinstance(row, dict) else ""
        raise UsageError(f"{where()}: no text under {text_key!r}{known}")
    return _encodable(text)


def _encodable(text: str) -> str:
    """A lone surrogate is legal in JSON and in no encoding."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

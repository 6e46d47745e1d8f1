"""The worker's part of preparing: a chunk of the source becomes a shard of ids and a record of each document."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from dlm_scale.data.chat import Chat
from dlm_scale.data.documents import Chunk, Document, hashes_of
from dlm_scale.data.files import sync
from dlm_scale.data.indexed import FLUSH_TOKENS, token_dtype
from dlm_scale.data.tokenizer import Tokenizer, load_tokenizer
from dlm_scale.data.workers import end_if_orphaned
from dlm_scale.errors import UsageError

SPLITS = ("train", "val")
TOKENIZER_NAME = "tokenizer_meta.json"
FLUSH_BYTES = 1 << 20
CHAT_NAME = "chat.json"
# of a document, or of a piece of one; split: index in SPLITS, -1 to be decided by `key`; prompt: how many of its tokens
# are the past of an answer
RECORD = np.dtype(
    [("tokens", "<i8"), ("bytes", "<i8"), ("key", "<u8"), ("content", "S16"), ("split", "i1"), ("is_end", "?"),
     ("prompt", "<i4")]
)  # fmt: skip


class Shard(NamedTuple):
    """A finished one. `ids_path` is gone once its ids have been copied."""

    ids_path: Path
    records: np.ndarray


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """(ids, records); the records, written last, make a shard complete."""
    return folder / f"{number:06}.ids", folder / f"{number:06}.records"


def read_shard(folder: Path, number: int) -> Shard | None:
    """The shard of that number, None where it is not finished."""
    ids_path, records_path = shard_paths(folder, number)
    return Shard(ids_path, np.fromfile(records_path, RECORD)) if records_path.exists() else None


def write_shard(folder: Path, number: int, chunk: Chunk, max_documents: int, max_tokens: int) -> tuple[int, int]:
    """Returns (documents, bytes of text). A shard ends with the first document beyond the limits of the dataset (0:
    none), to which validation does not count."""
    records, num_counted, num_tokens = [], 0, 0
    ids_path, records_path = shard_paths(folder, number)
    temporary = ids_path.with_suffix(f".{os.getpid()}.ids.tmp")  # an orphan of a killed run may be at the same shard
    with open(temporary, "wb", buffering=FLUSH_BYTES) as file:
        for document, ids, record in _entries(folder, chunk):
            file.write(ids.data)
            records.append(record)
            if num_tokens // FLUSH_TOKENS < (num_tokens + len(ids)) // FLUSH_TOKENS:
                end_if_orphaned()
            num_tokens += len(ids)
            num_counted += document.split != "val"
            if 0 < max_documents < num_counted or document.split != "val" and 0 < max_tokens < num_tokens:
                break
        sync(file)
    os.replace(temporary, ids_path)
    temporary = records_path.with_suffix(f".{os.getpid()}.records.tmp")
    table = np.array(records, dtype=RECORD)
    with open(temporary, "wb") as file:
        table.tofile(file)
        sync(file)
    os.replace(temporary, records_path)
    return len(table), int(table["bytes"].sum())


def _entries(folder: Path, chunk: Chunk) -> Iterator[tuple[Document, np.ndarray, tuple]]:
    """(document, ids, row of RECORD) of each document; of a conversation for each of its answers."""
    tokenizer, (chat, max_length) = _tokenizer(folder), _chat(folder)
    for document in chunk.documents():
        if (chat is None) != (document.messages is None):
            raise UsageError(f"{document.text[:40]!r}... " + ("is text, and --chat wants conversations: rows with a list "
                             "of messages under --text_key" if chat else "is a conversation: say --chat"))  # fmt: skip
        if chat is None:
            ids = _ids_of(tokenizer, document)
            yield document, ids, record_of(document, len(ids))
            continue
        for turn in chat.turns(document.messages, f"the conversation {document.text[:40]!r}..."):
            prompt, answer = turn.within(max_length)
            ids = np.concatenate([prompt, answer]).astype(token_dtype(tokenizer.vocabulary.size))
            said = tokenizer.decode(ids).encode()
            key, content = hashes_of(document, document.text.encode()).key, xxhash.xxh3_128_digest(ids)
            split = -1 if document.split is None else SPLITS.index(document.split)
            yield document, ids, (len(ids), len(said), key, content, split, True, len(prompt))


@functools.lru_cache(maxsize=1)
def _chat(folder: Path) -> tuple[Chat | None, int]:
    """The chat template and the longest document, as `save_tokenizer` left them."""
    if not (folder / CHAT_NAME).exists():
        return None, 0
    about, tokenizer = json.loads((folder / CHAT_NAME).read_bytes()), _tokenizer(folder)
    return Chat(about["template"], tokenizer.special_ids, tokenizer.encode), about["max_length"]


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, json.loads((folder / TOKENIZER_NAME).read_bytes()))


def save_tokenizer(tokenizer: Tokenizer, folder: Path, template: str = "", max_length: int = 0) -> None:
    """Where `write_shard` finds it, and the chat template where there is one."""
    if template:
        (folder / CHAT_NAME).write_text(json.dumps({"template": template, "max_length": max_length}))
    tokenizer.save(folder)
    (folder / TOKENIZER_NAME).write_text(json.dumps(tokenizer.meta.tokenizer_dict()))


def _ids_of(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    ids = tokenizer.encode_compact(document.text) if document.ids is None else document.ids
    bad = tokenizer.vocabulary.first_invalid(ids)
    if bad is not None:
        raise UsageError(f"the tokenizer made id {ids[bad]} of {document.text[:40]!r}...: text cannot hold that id")
    has_separator = document.ids is None and document.is_separated and document.is_end and tokenizer.eos_id is not None
    out = np.empty(len(ids) + has_separator, token_dtype(tokenizer.vocabulary.size))
    out[: len(ids)] = ids
    if has_separator:
        out[-1] = tokenizer.eos_id
    return out


def record_of(document: Document, num_tokens: int) -> tuple:
    """A row of RECORD."""
    raw = document.text.encode()
    split = -1 if document.split is None else SPLITS.index(document.split)
    return num_tokens, len(raw), *hashes_of(document, raw), split, document.is_end, 0

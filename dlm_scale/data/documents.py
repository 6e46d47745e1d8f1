"""What a source is made of: chunks, which any process can read at any time, and the documents in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dlm_scale.data.meta import Floor

CHUNK_BYTES = 16 << 20


class Hashes(NamedTuple):
    """`key` (64 bit) decides a document's split, `content` (128 bit) says whether it was there before."""

    key: int
    content: bytes


class Document(NamedTuple):
    """A text; `key` decides its split by hash (default: the text itself), unless `split` names it.

    A document may come in pieces: all but the last have `is_end` False, and each has the `hashes` of the whole. One
    that is not `is_separated` gets no separator. `ids` are given where it was tokenized before. Of a conversation
    `messages` are (role, content), and `text` all that is said in it.
    """

    text: str
    key: str | None = None
    split: str | None = None
    is_separated: bool = True
    is_end: bool = True
    hashes: Hashes | None = None
    ids: np.ndarray | None = None
    messages: tuple[tuple[str, str], ...] | None = None


def hashes_of(document: Document, raw: bytes) -> Hashes:
    """`raw` is its text in UTF-8."""
    if document.hashes is not None:
        return document.hashes
    key = raw if document.key is None else document.key.encode()
    return Hashes(xxhash.xxh3_64_intdigest(key), xxhash.xxh3_128_digest(raw))


class Chunk(NamedTuple):
    """`read(*args)` yields its documents; both can be sent to another process.

    `share` is its part of the whole source, 0 where unknown; `num_documents` how many begin in it, where that is known.
    """

    read: Callable[..., Iterator[Document]]
    args: tuple
    share: float = 0.0
    num_documents: int | None = None

    def documents(self) -> Iterator[Document]:
        """Those with something in them."""
        return (d for d in self.read(*self.args) if d.text or d.ids is not None)


@dataclass(frozen=True)
class Source:
    """`chunks(chunk_bytes, cut)` gives all chunks in order, the same ones every time.

    chunk_bytes: about so many bytes of text in each; cut: where a text may be cut into pieces (see `Tokenizer.cut`),
    None nowhere. `description` is what to record of it; `identity` what else tells it from a changed one; `text_bytes`
    its size where each byte is text; `floor` its entropy where known.
    """

    chunks: Callable[[int, str | None], Iterator[Chunk]]
    description: dict[str, Any]
    floor: Floor | None = None
    identity: Any = None
    text_bytes: int = 0

    def documents(self) -> Iterator[Document]:
        """All of them, uncut, in this process."""
        return (document for chunk in self.chunks(CHUNK_BYTES, None) for document in chunk.documents())


def given(documents: tuple[Document, ...]) -> Iterator[Document]:
    """The reader of chunks that carry their documents themselves."""
    return iter(documents)


def batches(documents: Iterator[Document], chunk_bytes: int) -> Iterator[Chunk]:
    """Documents that only one process can read, as chunks to hand on."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= chunk_bytes:
            yield Chunk(given, (tuple(batch),))
            batch, size = [], 0
    if batch:
        yield Chunk(given, (tuple(batch),))

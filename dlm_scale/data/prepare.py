"""From a source of text to D/train.{bin,idx}, D/val.{bin,idx}, D/meta.json and the tokenizer's files in D."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from dlm_scale.data.corpora import Document
from dlm_scale.data.indexed import IndexedWriter, token_dtype
from dlm_scale.data.meta import BLOCK_BYTES, FORMAT_VERSION, META_NAME, DatasetMeta, SplitMeta, write_meta
from dlm_scale.data.sources import open_source
from dlm_scale.data.tokenizer import Tokenizer, make_tokenizer
from dlm_scale.errors import UsageError

SPLITS = ("train", "val")
STAGING = ".preparing"
FEW_DOCUMENTS = 100
PROGRESS_SECONDS = 5.0


def prepare(
    source: str | Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    val_fraction: float = 0.1,
    text_key: str = "text",
    max_documents: int = 0,
    overwrite: bool = False,
) -> DatasetMeta:
    """Tokenize `source` (see `open_source`) with `tokenizer` (see `make_tokenizer`) into the folder `out`.

    A source of one document is split by position at a character, its last `val_fraction` being validation. Of many,
    those of the lowest hash of their text are validation, and a separator follows each where the tokenizer has one.
    `max_documents` 0 means all. The same input gives the same bytes. UsageError leaves a dataset in `out` alone.
    """
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val_fraction {val_fraction} must lie between 0 and 1")
    if max_documents < 0:
        raise UsageError(f"--max_documents {max_documents} must be 0 (all) or more")
    stream = open_source(source, text_key)

    def documents() -> Iterator[Document]:
        return itertools.islice((d for d in stream.documents() if d.text), max_documents or None)

    made = make_tokenizer(tokenizer, (d.text for d in documents()))
    with _staging(Path(out), overwrite) as folder:
        splits = _write_splits(folder, made, documents, val_fraction)
        made.save(folder)
        floor = stream.floor if made.kind in ("byte", "char") else None  # known per letter
        about = {"format_version": FORMAT_VERSION, "splits": splits, "source": stream.description, "floor": floor}
        meta = DatasetMeta(**vars(made.meta), **about)
        write_meta(meta, folder / META_NAME)
    return meta


def block_hashes(path: str | Path) -> tuple[str, ...]:
    """xxh3 (64 bit, hex) of each 64 MiB of a file."""
    with open(path, "rb") as file:
        return tuple(xxhash.xxh3_64_hexdigest(b) for b in iter(lambda: file.read(BLOCK_BYTES), b""))


@dataclass
class _Split:
    """A split being written, and what is counted on the way."""

    prefix: Path
    tokenizer: Tokenizer
    num_documents: int = 0
    num_bytes: int = 0
    count_V: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        size = self.tokenizer.vocabulary.size
        self.count_V = np.zeros(size, dtype=np.int64)
        self.writer = IndexedWriter(self.prefix, token_dtype(size))

    def add(self, text: str, separator: list[int]) -> int:
        """Returns the bytes of the text."""
        ids = np.append(self.tokenizer.encode(text), np.array(separator, dtype=np.int64))
        bad = self.tokenizer.vocabulary.first_invalid(ids)
        if bad is not None:
            raise UsageError(f"the tokenizer made id {ids[bad]} of {text[:40]!r}...: text cannot hold that id")
        if ids.size:
            self.writer.add_document(ids)
            self.num_documents += 1
            np.add.at(self.count_V, ids, 1)
        size = len(text.encode())
        self.num_bytes += size
        return size

    def finish(self) -> SplitMeta:
        self.writer.close()
        tokens = int(self.count_V.sum())
        if not tokens:
            raise UsageError(
                f"the {self.prefix.name} split came out empty: SOURCE is too short, or its documents are all the same."
                " Give more text, or change --val_fraction"
            )
        p = self.count_V[self.count_V > 0] / tokens
        bin_path = f"{self.prefix}.bin"
        return SplitMeta(
            tokens=tokens,
            documents=self.num_documents,
            bytes=self.num_bytes,
            max_id=int(np.flatnonzero(self.count_V)[-1]),
            unigram_entropy=float(-(p * np.log(p)).sum()) + 0.0,
            bin_bytes=os.path.getsize(bin_path),
            bin_xxh3=block_hashes(bin_path),
            idx_xxh3=xxhash.xxh3_64_hexdigest(Path(f"{self.prefix}.idx").read_bytes()),
        )


def _write_splits(
    folder: Path, tokenizer: Tokenizer, documents: Callable[[], Iterator[Document]], val_fraction: float
) -> dict[str, SplitMeta]:
    splits = {name: _Split(folder / name, tokenizer) for name in SPLITS}
    hashes = sorted(_hash_of(d) for d in itertools.islice(documents(), FEW_DOCUMENTS))
    if not hashes:
        raise UsageError("SOURCE holds no text")
    limit = _validation_limit(hashes, val_fraction)
    report = _progress()
    for document in documents() if len(hashes) > 1 else _by_position(next(documents()).text, val_fraction):
        has_end = document.split is None and tokenizer.eos_id is not None  # a split of its own is one document
        split = splits[document.split or ("val" if _hash_of(document) < limit else "train")]
        report(split.add(document.text, [tokenizer.eos_id] if has_end else []))
    return {name: split.finish() for name, split in splits.items()}


def _by_position(text: str, val_fraction: float) -> Iterator[Document]:
    cut = int(len(text) * (1 - val_fraction))
    yield Document(text[:cut], split="train")
    yield Document(text[cut:], split="val")


def _hash_of(document: Document) -> int:
    return xxhash.xxh3_64_intdigest((document.text if document.key is None else document.key).encode())


def _validation_limit(hashes: list[int], val_fraction: float) -> float:
    """Documents whose hash is below it are validation: the share itself, or that of a few documents, at least 1."""
    if len(hashes) >= FEW_DOCUMENTS:
        return val_fraction * 2.0**64
    return hashes[min(max(1, round(len(hashes) * val_fraction)), len(hashes) - 1)]


def _progress() -> Callable[[int], None]:
    """A function to call with the bytes of each document; says how far it is every few seconds, on stderr."""
    start = last = time.monotonic()
    documents = num_bytes = 0

    def report(size: int) -> None:
        nonlocal last, documents, num_bytes
        documents, num_bytes, now = documents + 1, num_bytes + size, time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            rate = num_bytes / 1e6 / (now - start)
            print(f"prepare: {documents:,} documents, {num_bytes / 1e6:,.1f} MB, {rate:.1f} MB/s", file=sys.stderr)

    return report


@contextmanager
def _staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder inside `out` whose files move into `out` at the end, meta.json last; nothing changes on failure."""
    taken = [n for n in (META_NAME, *(f"{s}.{e}" for s in SPLITS for e in ("bin", "idx"))) if (out / n).exists()]
    if taken and not overwrite:
        raise UsageError(f"{out} already holds a dataset ({taken[0]}). Give another --out, or --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    lock = _lock(out)
    staging = out / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
        staging.mkdir()
        yield staging
        (out / META_NAME).unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda p: p.name == META_NAME):
            os.replace(path, out / path.name)
        staging.rmdir()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(out: Path) -> int:
    """The descriptor of the locked folder; closing it (or dying) frees the lock."""
    folder_fd = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder_fd)
        raise UsageError(f"{out}: another `dlm prepare` is writing there. Wait, or give another --out") from error
    except OSError:
        pass  # a file system without locks
    return folder_fd

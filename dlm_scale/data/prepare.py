"""From a source of text to D/train.{bin,idx}, D/val.{bin,idx}, D/meta.json and the tokenizer's files in D.

Worker processes turn chunks of the source into shards below D/.preparing; this process puts the shards together in
the order of the source. A run that was killed is continued by the same call: finished shards are taken as they are.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash

from dlm_scale.data.assemble import Assembler, Choice, Chooser
from dlm_scale.data.chat import CHAT_TOKENS, PROMPTS_SUFFIX, check_template, end_id_of, template_of
from dlm_scale.data.documents import CHUNK_BYTES, Chunk, Source
from dlm_scale.data.files import read_regular, sync, sync_folder
from dlm_scale.data.hub import HubOptions
from dlm_scale.data.indexed import FLUSH_TOKENS, IndexedDataset, token_dtype
from dlm_scale.data.meta import BLOCK_BYTES, FORMAT_VERSION, META_NAME, DatasetMeta, SplitMeta, read_meta, write_meta
from dlm_scale.data.shards import RECORD, SPLITS, Shard, read_shard, record_of, save_tokenizer, shard_paths, write_shard
from dlm_scale.data.sources import halves, open_source
from dlm_scale.data.stream_out import SHARD_TOKENS, StreamOut
from dlm_scale.data.tokenizer import Tokenizer, make_tokenizer
from dlm_scale.data.workers import cores, run_tasks
from dlm_scale.errors import UsageError

STAGING, BUILDING, FINAL = ".preparing", "building", "final"
PLAN_VERSION = 1  # another one makes other shards
PROGRESS_SECONDS = 5.0
LEAST_BYTES = {"byte": 2, "char": 0.5}  # of ids, a byte of text

Chunks = Callable[[], Iterator[Chunk]]


def prepare(
    source: str | Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    val_fraction: float = 0.1,
    text_key: str = "text",
    max_documents: int = 0,
    max_tokens: int = 0,
    deduplicate: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    hub: HubOptions = HubOptions(),
    chunk_bytes: int = CHUNK_BYTES,
    chat: str = "",
    max_length: int = 0,
    special_tokens: Sequence[str] = (),
    stream: bool = False,
    stream_tokens: int = SHARD_TOKENS,
) -> DatasetMeta:
    """Tokenize `source` (see `open_source`) with `tokenizer` (see `make_tokenizer`) into the folder `out`.

    A source of one document is split by position at a character, its last `val_fraction` being validation. Of many,
    those of the lowest hash of their text are validation, and a separator follows each where the tokenizer has one.
    Documents are taken while there are at most `max_documents` and `max_tokens` (0: all); `deduplicate` takes each
    text once. The same input gives the same bytes with any number of `workers` (0: one a core), after any number of
    kills. UsageError leaves a dataset in `out` alone.

    `chat` names the template of conversations (see `chat.template_of`): each answer becomes a document with the past
    that it may see, of at most `max_length` tokens (0: any), in D/train.prompts the length of that past.
    `stream`: OUT/train.stream.json lists shards of about `stream_tokens` tokens as soon as they are there, so that
    training may begin (`data.order=sharded`). `special_tokens`: names to add behind the tokenizer's own; a template
    brings CHAT_TOKENS.
    """
    _check(val_fraction, max_documents, max_tokens, workers, max_length)
    choice = Choice(val_fraction, max_documents, max_tokens, deduplicate, chat and template_of(chat), max_length)
    if stream and chat:
        raise UsageError("--stream publishes text as it comes; conversations are prepared as a whole: leave one out")
    if max_length and not chat:
        raise UsageError(f"--max_length {max_length} is the longest answer with its past: it needs --chat")
    opened = open_source(source, text_key, hub)
    return prepare_source(opened, tokenizer, out, choice, overwrite=overwrite, workers=workers, chunk_bytes=chunk_bytes,
                          special_tokens=special_tokens or (CHAT_TOKENS if chat else ()),
                          stream_tokens=stream_tokens if stream else 0)  # fmt: skip


def prepare_source(
    source: Source,
    tokenizer: str,
    out: str | Path,
    choice: Choice,
    *,
    overwrite: bool = False,
    workers: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
    special_tokens: Sequence[str] = (),
    stream_tokens: int = 0,
) -> DatasetMeta:
    """As `prepare`, of a source that is open."""
    out, workers = Path(out), workers or cores()
    _refuse_taken(out, overwrite or any((out / STAGING).glob(f"*/{FINAL}")))
    _require_space(out, source, tokenizer)
    made = make_tokenizer(tokenizer, _characters(source, choice, chunk_bytes, workers), special_tokens)
    if choice.chat:
        check_template(choice.chat, made.special_ids)
    chunks = _chunks_of(source, choice, chunk_bytes, made.cut)
    plan = _plan(source, made, choice, chunk_bytes)
    with _staging(out, plan) as folder:
        with StreamOut(out, folder, made, plan, stream_tokens) if stream_tokens else nullcontext() as stream:
            if not (folder / FINAL).exists():
                _refuse_taken(out, overwrite)
                _build(folder, chunks, made, choice, source, workers, stream)
            meta = _publish(folder, out)
            if stream:
                stream.remove_shards()
        return meta


def _check(val_fraction: float, max_documents: int, max_tokens: int, workers: int, max_length: int) -> None:
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val_fraction {val_fraction} must lie between 0 and 1")
    for name, value, zero in (
        ("max_documents", max_documents, "all"),
        ("max_tokens", max_tokens, "all"),
        ("workers", workers, "one a core"),
        ("max_length", max_length, "any"),
    ):
        if value < 0:
            raise UsageError(f"--{name} {value} must be 0 ({zero}) or more")


def _refuse_taken(out: Path, overwrite: bool) -> None:
    taken = [n for n in (META_NAME, *(f"{s}.{e}" for s in SPLITS for e in ("bin", "idx"))) if (out / n).exists()]
    if taken and not overwrite:
        raise UsageError(f"{out} already holds a dataset ({taken[0]}). Give another --out, or --overwrite")


def _chunks_of(source: Source, choice: Choice, chunk_bytes: int, cut: str | None) -> Chunks:
    """The chunks of a source; of one that is one document, those of its two halves."""
    if choice.chat:
        return lambda: source.chunks(chunk_bytes, cut)
    found, first = 0, None
    wanted = 1 if choice.max_documents == 1 else 2
    for chunk in source.chunks(chunk_bytes, cut):
        count = chunk.num_documents
        if count is None:
            count = sum(1 for _ in itertools.islice(chunk.documents(), wanted))
        first = first or (chunk if count else None)
        found += count
        if found >= wanted:
            break
    if first is None:
        raise UsageError("SOURCE holds no text")
    if (found == 1 or wanted == 1) and next(first.documents()).split is None:
        return lambda: iter(halves(first, choice.val_fraction, chunk_bytes, cut))
    return lambda: source.chunks(chunk_bytes, cut)


def _characters(source: Source, choice: Choice, chunk_bytes: int, workers: int) -> Iterator[str]:
    """All characters of the documents that are taken; nothing is read before they are asked for."""
    yield choice.chat
    if not choice.max_documents and not choice.max_tokens:
        tasks = ((number, (characters_of, (c,))) for number, c in enumerate(source.chunks(chunk_bytes, "character")))
        yield from ("".join(found) for _, found in run_tasks(tasks, workers))
        return
    chooser = Chooser(choice)
    for chunk in source.chunks(chunk_bytes, None):
        documents = list(chunk.documents())
        records = np.array([record_of(d, len(d.text)) for d in documents], RECORD)
        yield from (d.text for d, is_taken in zip(documents, chooser.take(records), strict=True) if is_taken)
        if chooser.is_full:
            return


def characters_of(chunk: Chunk) -> set[str]:
    """Those of its texts."""
    found: set[str] = set()
    for document in chunk.documents():
        found.update(document.text)
    return found


def _require_space(out: Path, source: Source, tokenizer: str) -> None:
    """Refuse at once what cannot end well: a text whose ids will be larger than the disk."""
    needed = source.text_bytes * LEAST_BYTES.get(tokenizer, 0.25)
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"--out {out}: {source.text_bytes / 1e9:,.1f} GB of text make at least {needed / 1e9:,.1f} GB of ids, and"
            f" {free / 1e9:,.1f} GB are free there"
        )


def _plan(source: Source, tokenizer: Tokenizer, choice: Choice, chunk_bytes: int) -> dict:
    """All that the result depends on."""
    about = {"source": source.description, "identity": source.identity, "tokenizer": tokenizer.hash}
    return about | {"choice": asdict(choice), "chunk_bytes": chunk_bytes, "version": PLAN_VERSION}


@contextmanager
def _staging(out: Path, plan: dict) -> Iterator[Path]:
    """The folder of this plan inside `out`, which is locked. It stays where some shards are worth continuing with."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    lock = _lock(out)
    staging = out / STAGING
    folder = staging / xxhash.xxh3_64_hexdigest(json.dumps(plan, sort_keys=True).encode())
    try:
        _start_or_continue(folder, plan)
        yield folder
    except UsageError as error:
        if _is_unfinished(folder):
            raise UsageError(f"{error}. The shards that are done are kept: the same command continues") from error
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _start_or_continue(folder: Path, plan: dict) -> None:
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if other != folder:
            _say(f"{folder.parent} holds the beginning of another dataset (other source or options): starting anew")
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    if folder.exists():
        _say(f"continuing: {len(list(folder.glob('*.records')))} shards are done")
    else:
        (folder / BUILDING).mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps(plan, indent=1, sort_keys=True))


def _is_unfinished(folder: Path) -> bool:
    return any(folder.glob("*.records")) and not (folder / "all_shards").exists()


def _say(text: str) -> None:
    print(f"prepare: {text}", file=sys.stderr)


def _build(
    folder: Path, chunks: Chunks, tokenizer: Tokenizer, choice: Choice, source: Source, workers: int,
    stream: StreamOut | None,
) -> None:  # fmt: skip
    """Everything of the dataset, in FINAL."""
    save_tokenizer(tokenizer, folder, choice.chat, choice.max_length)
    building = folder / BUILDING
    assembler = Assembler(building, token_dtype(tokenizer.vocabulary.size), choice, stream)
    for shard in _shards(folder, chunks, choice, workers, lambda: assembler.chooser.is_full):
        assembler.add(shard)
    (folder / "all_shards").touch()
    assembler.finish()
    tokenizer.save(building)
    splits = {name: _split_meta(building / name, assembler.num_bytes[i], tokenizer.vocabulary.size, workers)
              for i, name in enumerate(SPLITS)}  # fmt: skip
    floor = source.floor if tokenizer.kind in ("byte", "char") else None  # known per letter
    options = {key: value for key, value in asdict(choice).items() if value and key != "val_fraction"}
    dropped = {"duplicates": assembler.chooser.duplicates} if choice.deduplicate else {}
    if choice.chat:
        options["end_id"] = end_id_of(choice.chat, tokenizer.special_ids)
        options["prompts_xxh3"] = {name: prompts_hash(building / name) for name in SPLITS}
    about = {"splits": splits, "source": source.description | options | dropped, "floor": floor}
    write_meta(DatasetMeta(**vars(tokenizer.meta), format_version=FORMAT_VERSION, **about), building / META_NAME)
    for path in building.iterdir():
        with open(path, "rb") as file:
            sync(file)
    os.rename(building, folder / FINAL)
    sync_folder(folder)


def _shards(
    folder: Path, chunks: Chunks, choice: Choice, workers: int, is_full: Callable[[], bool]
) -> Iterator[Shard]:
    """All shards in order, until it `is_full`; those that are missing are made."""
    progress, shares, done, following = _Progress(), {}, set(), 0

    def missing() -> Iterator:
        for number, chunk in enumerate(chunks()):
            if is_full():
                return
            shares[number] = chunk.share
            if shard_paths(folder, number)[1].exists():
                done.add(number)
                progress.skip(chunk.share)
            else:
                limits = choice.max_documents, choice.max_tokens
                yield number, (write_shard, (folder, number, chunk, *limits))

    for number, (documents, num_bytes) in run_tasks(missing(), workers):
        progress.add(documents, num_bytes, shares[number])
        done.add(number)
        while following in done and not is_full():
            yield read_shard(folder, following)
            following += 1
        if is_full():
            return
    while following in done and not is_full():
        yield read_shard(folder, following)
        following += 1


class _Progress:
    """Says every few seconds, on stderr, how far it is, how fast, and how long the rest will take."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._documents = self._bytes = 0
        self._skipped = self._made = 0.0

    def skip(self, share: float) -> None:
        self._skipped += share

    def add(self, documents: int, num_bytes: int, share: float) -> None:
        self._documents += documents
        self._bytes += num_bytes
        self._made += share
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS:
            return
        self._last, seconds = now, now - self._start
        left, megabytes = f", {self._remaining(seconds)} left" if self._made else "", self._bytes / 1e6
        _say(f"{self._documents:,} documents, {megabytes:,.1f} MB, {megabytes / seconds:.1f} MB/s{left}")

    def _remaining(self, seconds: float) -> str:
        minutes, rest = divmod(round(max(0.0, 1 - self._skipped - self._made) / self._made * seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def prompts_hash(prefix: str | Path) -> str:
    """xxh3 (64 bit, hex) of PREFIX.prompts."""
    return xxhash.xxh3_64_hexdigest(read_regular(f"{prefix}{PROMPTS_SUFFIX}"))


def block_summary(path: Path, number: int, vocab_size: int) -> tuple[str, np.ndarray]:
    """(hash, how often each id stands in it) of one block of a .bin."""
    block = np.fromfile(path, np.uint8, BLOCK_BYTES, offset=number * BLOCK_BYTES)
    ids, count_V = block.view(token_dtype(vocab_size)), np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(ids), FLUSH_TOKENS):
        count_V += np.bincount(ids[start : start + FLUSH_TOKENS], minlength=vocab_size)
    return xxhash.xxh3_64_hexdigest(block), count_V


def _split_meta(prefix: Path, num_bytes: int, vocab_size: int, workers: int) -> SplitMeta:
    data, path = IndexedDataset(prefix), Path(f"{prefix}.bin")
    size = data.tokens.nbytes
    tasks = ((i, (block_summary, (path, i, vocab_size))) for i in range(-(-size // BLOCK_BYTES)))
    hashes, count_V = {}, np.zeros(vocab_size, dtype=np.int64)
    for number, (digest, counts_V) in run_tasks(tasks, workers):
        hashes[number] = digest
        count_V += counts_V
    tokens = int(count_V.sum())
    p = count_V[count_V > 0] / tokens
    return SplitMeta(
        tokens=tokens,
        documents=data.num_documents,
        bytes=num_bytes,
        max_id=int(np.flatnonzero(count_V)[-1]),
        unigram_entropy=float(-(p * np.log(p)).sum()) + 0.0,
        bin_bytes=size,
        bin_xxh3=tuple(hashes[i] for i in sorted(hashes)),
        idx_xxh3=xxhash.xxh3_64_hexdigest(data.index),
    )


def _publish(folder: Path, out: Path) -> DatasetMeta:
    """Move what is complete into `out`, meta.json last; without it nothing opens the files. May be done again."""
    final = folder / FINAL
    if (final / META_NAME).exists():
        (out / META_NAME).unlink(missing_ok=True)
        for name in SPLITS:
            (out / f"{name}{PROMPTS_SUFFIX}").unlink(missing_ok=True)
        sync_folder(out)
    for path in sorted(final.iterdir(), key=lambda p: p.name == META_NAME):
        if path.name == META_NAME:
            sync_folder(out)
        os.replace(path, out / path.name)
    sync_folder(out)
    shutil.rmtree(out / STAGING)
    return read_meta(out / META_NAME)


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

"""Training while preparation still runs: shards that appear one after the other, and the list that says which are there.

PREFIX.stream.json is replaced as a whole whenever a shard is complete; shard j is the indexed pair PREFIX.0000j.bin and
.idx, there before the list names it and never changed after. When the last one is listed, `is_finished` is set. Then,
at any time, the shards may be joined into PREFIX.bin and .idx in their sequence, and removed. The producer renews the
list's time of change every `heartbeat_seconds`; the tokenizer's files lie in the folder before the list does.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dlm_scale.data.files import parse_json, read_regular
from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.meta import TokenizerMeta, parse
from dlm_scale.errors import UsageError

FORMAT_VERSION = 1
HEARTBEAT_SECONDS, STALE_HEARTBEATS = 15.0, 20
POLL_SECONDS, SAY_SECONDS = 0.5, 30.0


@dataclass(frozen=True)
class Shard:
    """What the list says of a complete shard."""

    tokens: int
    documents: int
    bin_xxh3: str
    idx_xxh3: str


@dataclass(frozen=True)
class StreamList:
    """PREFIX.stream.json. `content`, declared before the first shard, identifies the tokens to come: the source and
    all that changes what is made of it."""

    format_version: int
    is_finished: bool
    heartbeat_seconds: float
    content: dict[str, Any]
    tokenizer: TokenizerMeta
    shards: tuple[Shard, ...]


class Closed(RuntimeError):
    """The run ends while it waits for a shard."""


def list_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.stream.json")


def shard_prefix(prefix: str | Path, number: int) -> str:
    return f"{prefix}.{number:05d}"


def read_list(prefix: str | Path) -> StreamList:
    """The list as it is now. Raises UsageError naming file and key."""
    path = list_path(prefix)
    try:
        content = read_regular(path)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}. data.order=sharded reads what is prepared as a stream; for a dataset that is"
            " whole use data.order=shuffled, or start the preparation first"
        ) from error
    found = parse(StreamList, parse_json(content, str(path), "is not JSON"), str(path))
    if found.format_version != FORMAT_VERSION or found.heartbeat_seconds <= 0:
        raise UsageError(f"{path}: format_version {found.format_version} is not {FORMAT_VERSION}, or no heartbeat")
    if any(not 1 <= s.documents <= s.tokens for s in found.shards):
        raise UsageError(f"{path}: a shard without documents, or with more of them than tokens. Prepare it again")
    return found


class ShardStream:
    """The shards of PREFIX; asking for one that is not listed yet waits for it.

    Raises UsageError where the producer's heartbeat stops, or the list is not a continuation of what it was.
    """

    def __init__(self, prefix: str | Path):
        self.prefix, self._closed = str(prefix), threading.Event()
        self.list = read_list(prefix)

    def close(self) -> None:
        """Whoever waits for a shard gets `Closed`."""
        self._closed.set()

    def has(self, number: int) -> bool:
        """Whether there is a shard of this number; waits until that is known."""
        if number >= len(self.list.shards) and not self.list.is_finished:
            self._wait_for(number)
        return number < len(self.list.shards)

    def _wait_for(self, number: int) -> None:
        log, path = logging.getLogger("dlm_scale"), list_path(self.prefix)
        began = said = beat_seen = time.monotonic()
        beat, limit = None, STALE_HEARTBEATS * self.list.heartbeat_seconds
        self._refresh()
        while number >= len(self.list.shards) and not self.list.is_finished:
            now = time.monotonic()
            if beat is None or now - said > SAY_SECONDS:
                log.info("waiting for shard %d of %s, which is being prepared (%d s so far)", number, self.prefix,
                         now - began)
                said = now
            found = _beat(path)
            if found != beat:
                beat, beat_seen = found, now
                self._refresh()
            elif now - beat_seen > limit:
                raise UsageError(
                    f"{path}: shard {number} is missing and whoever prepares it has given no sign for {limit:g} s."
                    " Start the preparation again, then this command: both go on where they were"
                )
            if self._closed.wait(POLL_SECONDS):
                raise Closed(f"the run ended while it waited for shard {number} of {self.prefix}")

    def _refresh(self) -> None:
        found, old = read_list(self.prefix), self.list
        is_longer = found.shards[: len(old.shards)] == old.shards
        if not is_longer or (found.content, found.tokenizer) != (old.content, old.tokenizer):
            raise UsageError(
                f"{list_path(self.prefix)} is no continuation of what it was: another dataset is being prepared there."
                " Start a new run on it"
            )
        self.list = found

    def open(self, number: int) -> ShardTokens:
        """A shard that is there, by its own files or its place in the joined ones. Raises UsageError."""
        shard, own = self.list.shards[number], shard_prefix(self.prefix, number)
        try:
            return _checked(shard, own, IndexedDataset(own))
        except UsageError:
            self._refresh()
            if not (self.list.is_finished and Path(self.prefix + ".idx").exists()):
                raise
        return self._joined(number)

    def _joined(self, number: int) -> ShardTokens:
        shards, whole = self.list.shards, IndexedDataset(self.prefix)
        if (len(whole.tokens), whole.num_documents) != (sum(s.tokens for s in shards), sum(s.documents for s in shards)):
            raise UsageError(f"{self.prefix}.idx: other tokens or documents than {list_path(self.prefix)} lists")
        first_token, first = (sum(getattr(s, key) for s in shards[:number]) for key in ("tokens", "documents"))
        shard = shards[number]
        if whole.bounds(first, first + shard.documents)[[0, -1]].tolist() != [first_token, first_token + shard.tokens]:
            raise UsageError(f"{self.prefix}.idx: shard {number} of {list_path(self.prefix)} does not lie where it must")
        tokens = whole.tokens[first_token : first_token + shard.tokens]
        bounds = lambda i, j: whole.bounds(first + i, first + j) - first_token  # noqa: E731
        return ShardTokens(shard_prefix(self.prefix, number), whole.bin_path, tokens, bounds, shard)


@dataclass(frozen=True)
class ShardTokens:
    """The tokens of a shard and where its documents lie in them; `bin_path` is the file to name in errors."""

    prefix: str
    bin_path: str
    tokens: np.ndarray
    bounds: Callable[[int, int], np.ndarray]
    shard: Shard

    def check(self) -> None:
        """Read all of the tokens, which also brings them into memory. Raises UsageError where they are not those that
        were listed."""
        if _hash_of(self.tokens) != self.shard.bin_xxh3:
            raise UsageError(f"{self.bin_path}: not the tokens that were listed for {self.prefix}. Prepare it again")


def _checked(shard: Shard, prefix: str, data: IndexedDataset) -> ShardTokens:
    if (len(data.tokens), data.num_documents, _hash_of(data.index)) != (shard.tokens, shard.documents, shard.idx_xxh3):
        raise UsageError(f"{prefix}.idx: not the shard that was listed: {shard}. Prepare the dataset again")
    return ShardTokens(prefix, data.bin_path, data.tokens, data.bounds, shard)


def _hash_of(array: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(array)


def _beat(path: Path) -> tuple[int, int]:
    """Changes with every sign of life, by the file's own time alone: the clocks of machines may differ."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ino


class StreamProducer:
    """The other half: makes the list, publishes shards in sequence, gives signs of life until it is closed.

    Where the list exists it goes on behind its last shard; a finished list stays as it is. Raises UsageError where the
    list is of other content.
    """

    def __init__(self, prefix: str | Path, tokenizer: TokenizerMeta, content: dict[str, Any],
                 heartbeat_seconds: float = HEARTBEAT_SECONDS):
        self.prefix, self._lock, self._ended = str(prefix), threading.Lock(), threading.Event()
        tokenizer = TokenizerMeta(**{field.name: getattr(tokenizer, field.name) for field in fields(TokenizerMeta)})
        content = json.loads(json.dumps(content))
        self.list = StreamList(FORMAT_VERSION, False, heartbeat_seconds, content, tokenizer, ())
        if list_path(prefix).exists():
            found = read_list(prefix)
            if (found.content, found.tokenizer) != (content, tokenizer):
                raise UsageError(f"{list_path(prefix)} lists shards of other content. Give another place, or remove it")
            self.list = replace(found, heartbeat_seconds=heartbeat_seconds)
        self._write()
        self._thread = threading.Thread(target=self._live, name="stream heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> StreamProducer:
        return self

    def __exit__(self, *_exception) -> None:
        self._ended.set()
        self._thread.join()

    def publish(self, prefix: str | Path) -> None:
        """The indexed pair at `prefix`, complete and on the same file system, becomes the next shard."""
        data, target = IndexedDataset(prefix), shard_prefix(self.prefix, len(self.list.shards))
        shard = Shard(len(data.tokens), data.num_documents, _hash_of(data.tokens), _hash_of(data.index))
        for suffix in (".bin", ".idx"):
            os.replace(f"{prefix}{suffix}", target + suffix)
        self._change(shards=(*self.list.shards, shard))

    def finish(self) -> None:
        """No shard will follow."""
        self._change(is_finished=True)

    def _change(self, **changes: Any) -> None:
        with self._lock:
            self.list = replace(self.list, **changes)
            self._write()

    def _write(self) -> None:
        path = list_path(self.prefix)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self.list), indent=1, sort_keys=True) + "\n")
        os.replace(part, path)

    def _live(self) -> None:
        while not self._ended.wait(self.list.heartbeat_seconds):
            with self._lock:
                os.utime(list_path(self.prefix))

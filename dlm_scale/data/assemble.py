"""The parent's part of preparing: shards, in the order of the source, become the splits of the dataset.

What is kept, and on which side it falls, depends on the records of the shards alone, never on when they were made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlm_scale.data.chat import PROMPTS_SUFFIX
from dlm_scale.data.indexed import FLUSH_TOKENS, IndexedWriter
from dlm_scale.data.shards import SPLITS, Shard
from dlm_scale.data.stream_out import StreamOut
from dlm_scale.errors import UsageError

FEW_DOCUMENTS = 100
TRAIN, VAL, DROPPED = 0, 1, -2


@dataclass(frozen=True)
class Choice:
    """What of a source becomes a dataset; 0: no limit. `chat`: the template of conversations, each answer of which is a
    document of at most `max_length` tokens."""

    val_fraction: float = 0.1
    max_documents: int = 0
    max_tokens: int = 0
    deduplicate: bool = False
    chat: str = ""
    max_length: int = 0


class Seen:
    """Hashes met so far, 16 bytes each: sorted runs, merged like the digits of a binary counter."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, content_N: np.ndarray) -> np.ndarray:
        """bool [N]: whether a hash is met for the first time, in this call too."""
        run, first = np.unique(content_N, return_index=True)
        is_new_N = np.zeros(len(content_N), dtype=bool)
        is_new_N[first] = True
        for known in self._runs:
            at = np.minimum(np.searchsorted(known, run), len(known) - 1)
            is_new_N[first[known[at] == run]] = False
        run = np.sort(content_N[is_new_N])
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)
        return is_new_N


class Chooser:
    """Which documents are taken: each once, up to the limits. Validation that the source names is taken whole."""

    def __init__(self, choice: Choice):
        self._choice, self._seen = choice, Seen()
        self.documents = self.tokens = self.duplicates = 0
        self.is_full = False

    def take(self, documents_N: np.ndarray) -> np.ndarray:
        """bool [N] for records of whole documents. UsageError where the first is longer than all that may be taken."""
        choice, is_free_N = self._choice, documents_N["split"] != VAL
        is_new_N = self._seen.add(documents_N["content"]) if choice.deduplicate else np.ones(len(documents_N), bool)
        self.duplicates += int((~is_new_N).sum())
        counted_N = is_new_N & is_free_N
        documents = self.documents + np.cumsum(counted_N)
        tokens = self.tokens + np.cumsum(np.where(counted_N, documents_N["tokens"], 0))
        fits_N = (documents <= (choice.max_documents or documents)) & (tokens <= (choice.max_tokens or tokens))
        if counted_N.any() and not self.documents and not fits_N[counted_N.argmax()]:
            longest = documents_N["tokens"][counted_N.argmax()]
            raise UsageError(f"--max_tokens {choice.max_tokens}: the first document alone has {longest} tokens, and "
                             "documents are taken whole. Give more, or 0 for all")  # fmt: skip
        taken_N = is_new_N & (~is_free_N | fits_N & (not self.is_full))
        last = int((taken_N & counted_N).sum())
        if last:
            self.documents, self.tokens = self.documents + last, int(tokens[taken_N & counted_N][-1])
        self.is_full |= not fits_N.all()
        return taken_N


class Assembler:
    """Takes shards in order, and copies what is chosen into the two splits below `folder`.

    A shard's ids are removed when they have been copied and synced. So after a kill the same shards, with or without
    their ids, lead to the same files.
    """

    def __init__(self, folder: Path, dtype: np.dtype, choice: Choice, stream: StreamOut | None = None):
        self._folder, self._choice, self.chooser = folder, choice, Chooser(choice)
        self._writers = [IndexedWriter(folder / name, dtype, resume=True) for name in SPLITS]
        self.num_bytes, self._prompts = [0, 0], ([], [])
        self._stream = stream
        self._open: list[Shard] = []  # end inside a document
        self._chosen: list[tuple[Shard, np.ndarray]] = []  # of whose documents the sides are not known yet
        self._few_keys: list[int] = []
        self._limit: float | None = None  # documents whose key is below it are validation

    def add(self, shard: Shard) -> None:
        """The next shard."""
        self._open.append(shard)
        if not len(shard.records) or shard.records["is_end"][-1]:
            self._choose()

    def finish(self) -> None:
        """Write what is left, and the indexes. UsageError where a split would be empty."""
        if self._limit is None:
            self._set_limit()
        for writer in self._writers:
            if not writer.num_tokens:
                raise UsageError(
                    f"the {Path(writer.prefix).name} split came out empty: SOURCE is too short, or its documents are"
                    " all the same. Give more text, or change --val_fraction"
                )
        if self._stream:
            self._stream.finish(self._writers[TRAIN])
        for writer in self._writers:
            writer.close()
        for name, prompts in zip(SPLITS, self._prompts, strict=True):
            if self._choice.chat:
                np.concatenate(prompts).tofile(self._folder / f"{name}{PROMPTS_SUFFIX}")

    def _choose(self) -> None:
        records = np.concatenate([shard.records for shard in self._open])
        starts = np.flatnonzero(np.append(True, records["is_end"][:-1]))[: int(records["is_end"].sum())]
        documents = records[starts].copy()
        documents["tokens"] = np.add.reduceat(records["tokens"], starts) if len(starts) else 0
        side = np.where(self.chooser.take(documents), documents["split"], DROPPED)
        number = np.cumsum(records["is_end"]) - records["is_end"]
        self._chosen += zip(self._open, _split_like(side[number], self._open), strict=True)
        self._open = []
        self._few_keys += documents["key"][side == -1][:FEW_DOCUMENTS].tolist()
        if len(self._few_keys) >= FEW_DOCUMENTS and self._limit is None:
            self._set_limit()
        elif self._limit is not None:
            self._copy_all()

    def _set_limit(self) -> None:
        """The share itself, or with a few documents that of them, at least one."""
        keys, fraction = sorted(self._few_keys[:FEW_DOCUMENTS]), self._choice.val_fraction
        if len(keys) == FEW_DOCUMENTS:
            self._limit = fraction * 2.0**64
        elif keys:
            self._limit = keys[min(max(1, round(len(keys) * fraction)), len(keys) - 1)]
        else:
            self._limit = 0.0
        self._copy_all()

    def _copy_all(self) -> None:
        for shard, sides in self._chosen:
            undecided = sides == -1
            sides[undecided] = np.where(shard.records["key"][undecided] < self._limit, VAL, TRAIN)
            self._copy(shard, sides)
        self._chosen, self._few_keys = [], []

    def _copy(self, shard: Shard, sides: np.ndarray) -> None:
        records, is_there = shard.records, shard.ids_path.exists()
        for side, writer in enumerate(self._writers):
            mine = records[sides == side]
            self.num_bytes[side] += int(mine["bytes"].sum())
            self._prompts[side].append(mine["prompt"].copy())
            if not is_there:
                writer.skip(mine["tokens"], mine["is_end"])
        if is_there:
            self._copy_ids(shard, sides)
            for writer in self._writers:
                writer.sync()
            shard.ids_path.unlink()
        if self._stream:
            self._stream.after(self._writers[TRAIN])

    def _copy_ids(self, shard: Shard, sides: np.ndarray) -> None:
        ends = np.cumsum(shard.records["tokens"])
        first = start = 0
        with open(shard.ids_path, "rb") as file:
            while first < len(ends):
                stop = max(first + 1, int(np.searchsorted(ends, start + FLUSH_TOKENS, side="right")))
                ids = np.fromfile(file, self._writers[0].dtype, int(ends[stop - 1]) - start)
                side_of_token = np.repeat(sides[first:stop], shard.records["tokens"][first:stop])
                for side, writer in enumerate(self._writers):
                    mine = shard.records[first:stop][sides[first:stop] == side]
                    writer.add(ids[side_of_token == side], mine["tokens"], mine["is_end"])
                first, start = stop, int(ends[stop - 1])


def _split_like(values: np.ndarray, shards: list[Shard]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(shard.records) for shard in shards])[:-1])

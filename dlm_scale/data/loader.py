"""Rows of token ids for training and validation, as pure functions of the sample index.

B rows of the batch, L positions of a row, W windows of a file. Window w holds the tokens w*L to (w+1)*L - 1 of the
file, cut across documents; the tail that fills no window is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.meta import DatasetMeta, TokenizerFiles, TokenizerMeta, load_meta
from dlm_scale.data.mixture import mix
from dlm_scale.data.order import locate
from dlm_scale.data.tokenizer import load_tokenizer
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.diffusion.rng import Stream, philox
from dlm_scale.errors import UsageError

SCANNED_TOKENS = 1 << 25  # at open: 20 ms of reading


@dataclass(frozen=True)
class TrainingData:
    """`rows(sample_B)` gives int64 [B, L] for global sample indices, the same on every rank and in every batch.

    `num_windows` is one epoch (summed over the members of a mixture); `fingerprint` identifies the tokens, wherever
    their files lie; `tokenizer_meta` is what a checkpoint keeps; `folder` holds the tokenizer (None: synthetic).
    """

    tokenizer_meta: TokenizerMeta
    folder: Path | None
    fingerprint: str
    num_windows: int
    rows: Callable[[np.ndarray], np.ndarray]

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer_meta.vocabulary


@dataclass(frozen=True)
class Windows:
    """The windows of one split: a [W, L] view of its file, and what its ids must be."""

    bin_path: str
    ids_WL: np.ndarray
    vocabulary: Vocabulary

    def rows(self, window_B: np.ndarray) -> np.ndarray:
        """int64 [B, L]. Raises UsageError on an id that clean text cannot hold: file, token offset, id."""
        ids_BL = self.ids_WL[window_B]
        bad = self.vocabulary.first_invalid(ids_BL)
        if bad is not None:
            row, column = divmod(bad, ids_BL.shape[1])
            offset = int(window_B[row]) * ids_BL.shape[1] + column
            refuse_id(self.bin_path, offset, int(ids_BL[row, column]), self.vocabulary)
        return ids_BL.astype(np.int64)


def open_data(source: str | Sequence[Any], seq_len: int, seed: int) -> TrainingData:
    """Training data of `data.train`: a prefix, `synthetic:VOCAB_SIZE`, or a list of (path, weight). UsageError.

    The members of a list are objects with these attributes, or mappings with these keys.
    """
    if isinstance(source, str):
        kind, _, size = source.partition(":")
        return _synthetic(size, seq_len, seed) if kind == "synthetic" else _indexed([source], [1.0], seq_len, seed)
    members = [m if isinstance(m, Mapping) else vars(m) for m in source]
    return _indexed([m["path"] for m in members], [m["weight"] for m in members], seq_len, seed)


def open_split(prefix: str | Path) -> tuple[DatasetMeta, str, IndexedDataset]:
    """(meta, split name, token file) of a prefix, refused with UsageError where they disagree in any number."""
    meta, name = load_meta(prefix)
    data, split = IndexedDataset(prefix), meta.splits[name]
    found = {
        "tokens": len(data.tokens),
        "documents": data.num_documents,
        "bin_bytes": data.tokens.nbytes,
        "idx_xxh3": xxhash.xxh3_64_hexdigest(data.index),
    }
    for key, value in found.items():
        if value != getattr(split, key):
            raise UsageError(
                f"{data.prefix}: {key} is {value} in the files and {getattr(split, key)} in meta.json: they are not of"
                " one dataset. Copy it again, or prepare it again"
            )
    for start, stop in _scanned_at_open(len(data.tokens)):
        check_ids(data, start, stop, meta.vocabulary)
    return meta, name, data


def _scanned_at_open(num_tokens: int) -> Iterator[tuple[int, int]]:
    """Every token of a small file; of a large one 64 evenly spaced stretches (`dlm data verify` reads all of it)."""
    stretch = SCANNED_TOKENS // 64
    if num_tokens <= SCANNED_TOKENS:
        yield 0, num_tokens
    else:
        for i in range(64):
            start = i * (num_tokens - stretch) // 63
            yield start, start + stretch


def check_ids(data: IndexedDataset, start: int, stop: int, vocabulary: Vocabulary) -> None:
    """UsageError on an id among tokens [start, stop) that clean text cannot hold: file, token offset, id."""
    bad = vocabulary.first_invalid(data.tokens[start:stop])
    if bad is not None:
        refuse_id(data.bin_path, start + bad, int(data.tokens[start + bad]), vocabulary)


def require_same_tokenizer(first: TokenizerMeta, second: TokenizerMeta, first_name: str, second_name: str) -> None:
    """UsageError unless both were made by the same tokenizer with the same ids."""
    if first.tokenizer_dict() != second.tokenizer_dict():
        raise UsageError(
            f"{first_name} and {second_name} have different tokenizers ({first.tokenizer.kind}, {first.vocab_size} ids;"
            f" {second.tokenizer.kind}, {second.vocab_size} ids). Prepare both with the same --tokenizer"
        )


def refuse_id(path: str, offset: int, token: int, vocabulary: Vocabulary) -> None:
    what = "the mask" if token == vocabulary.mask_id else f"not a token of text (vocab_size {vocabulary.size})"
    raise UsageError(f"{path}: token {offset} is id {token}, {what}. The file is damaged: copy or prepare it again")


class ValidationData:
    """Rows of a split in file order, at most `max_rows` (0: all), then evenly spread over the file.

    `bytes_per_token` turns nats per token into bits per byte; `floor` is the exact H_L / L, None where unknown.
    """

    def __init__(self, prefix: str | Path, seq_len: int, max_rows: int = 0):
        self.prefix = str(prefix)
        self.meta, name, data = open_split(prefix)
        self._windows = _windows(data, self.meta, seq_len)
        self._split = self.meta.splits[name]
        num_windows = len(self._windows.ids_WL)
        self.num_rows = min(max_rows, num_windows) if max_rows > 0 else num_windows
        self._window_of_row = np.arange(self.num_rows) * num_windows // self.num_rows
        self._tokens = data.tokens
        self.floor = self.meta.floor.per_token(seq_len) if self.meta.floor else None

    @property
    def vocabulary(self) -> Vocabulary:
        return self.meta.vocabulary

    @property
    def bytes_per_token(self) -> float:
        return self._split.bytes / self._split.tokens

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """int64 [B, L] of the rows 0 ... num_rows - 1."""
        return self._windows.rows(self._window_of_row[row_B])

    def text(self) -> str:
        """The whole split as text, without the separators between documents."""
        made = load_tokenizer(Path(self.prefix).parent, self.meta)
        return made.decode(self._tokens[self._tokens != (-1 if made.eos_id is None else made.eos_id)])


def _windows(data: IndexedDataset, meta: DatasetMeta, seq_len: int) -> Windows:
    num_windows = len(data.tokens) // seq_len
    if not num_windows:
        raise UsageError(
            f"{data.bin_path}: {len(data.tokens)} tokens are fewer than one window of model.seq_len={seq_len}."
            " Prepare more text, or lower seq_len"
        )
    ids_WL = data.tokens[: num_windows * seq_len].reshape(num_windows, seq_len)
    return Windows(data.bin_path, ids_WL, meta.vocabulary)


def _indexed(prefixes: list[str], weights: list[float], seq_len: int, seed: int) -> TrainingData:
    opened = [open_split(prefix) for prefix in prefixes]
    for prefix, (meta, _, _) in zip(prefixes, opened, strict=True):
        require_same_tokenizer(opened[0][0], meta, prefixes[0], prefix)
    members = [_windows(data, meta, seq_len) for meta, _, data in opened]
    sizes, schedule = [len(m.ids_WL) for m in members], mix(weights)

    def rows(sample_B: np.ndarray) -> np.ndarray:
        member_B, own_B = schedule.locate(sample_B)
        out_BL = np.empty((len(member_B), seq_len), dtype=np.int64)
        for k in np.unique(member_B):
            at = member_B == k
            out_BL[at] = members[k].rows(locate(own_B[at], sizes[k], seed, int(k))[1])
        return out_BL

    content = [meta.content(name) for meta, name, _ in opened]
    fingerprint = _hash({"members": content, "weights": schedule.quota_K.tolist()})
    return TrainingData(opened[0][0], Path(prefixes[0]).parent, fingerprint, sum(sizes), rows)


def _synthetic(size: str, seq_len: int, seed: int) -> TrainingData:
    """Uniformly random tokens of a vocabulary whose last id is the mask; an epoch never ends."""
    if not size.isdecimal():
        raise UsageError(f"data.train=synthetic:{size}: give the vocabulary size as a number, as in synthetic:50258")
    vocabulary = Vocabulary(int(size), int(size) - 1)
    column = np.arange(-(-seq_len // 4))

    def rows(sample_B: np.ndarray) -> np.ndarray:
        sample_B1 = np.asarray(sample_B, dtype=np.int64)[:, None]
        words = np.stack(philox(seed, sample_B1, sample_B1 >> 32, column, int(Stream.SYNTHETIC)), axis=-1)
        words_BL = words.reshape(len(sample_B), -1)[:, :seq_len].astype(np.uint64)
        return (words_BL * np.uint64(vocabulary.num_outputs) >> np.uint64(32)).astype(np.int64)

    meta = TokenizerMeta(TokenizerFiles("none", (), ""), vocabulary.size, vocabulary.mask_id, (), None)
    return TrainingData(meta, None, _hash({"synthetic": vocabulary.size}), 1 << 40, rows)


def _hash(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

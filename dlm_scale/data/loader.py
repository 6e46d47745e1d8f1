"""Rows of token ids for training and validation, as pure functions of the sample index.

B rows of the batch, L positions of a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dlm_scale.data.answer_padding import continued
from dlm_scale.data.chat import PROMPTS_SUFFIX
from dlm_scale.data.files import read_regular
from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.meta import DatasetMeta, TokenizerFiles, TokenizerMeta, load_meta
from dlm_scale.data.mixture import Mixture, mix
from dlm_scale.data.order import row_of
from dlm_scale.data.packing import VERSION as packing_version
from dlm_scale.data.packing import one_a_row, open_plan
from dlm_scale.data.rows import PackedDocuments, Windows, assemble, merge, pad_id_of, refuse_id, windows_of
from dlm_scale.data.sharded import ShardedRows
from dlm_scale.data.stream import ShardStream
from dlm_scale.data.tokenizer import load_tokenizer
from dlm_scale.data.vocabulary import EditTokens, Vocabulary
from dlm_scale.diffusion.rng import Stream, philox
from dlm_scale.diffusion.segments import Rows
from dlm_scale.errors import UsageError

SCANNED_TOKENS, STRETCHES, STRETCH_TOKENS = 1 << 25, 64, 1 << 16  # at open: 20 ms of reading


@dataclass(frozen=True)
class TrainingData:
    """`rows(sample_B)` gives int64 [B, L], or where documents are packed `Rows`, for global sample indices, the same on
    every rank and in every batch.

    `num_rows` is one epoch (summed over the members of a mixture; None: not known yet); `fingerprint` identifies the
    tokens and what rows they make, wherever their files lie; `tokenizer_meta` is what a checkpoint keeps; `folder`
    holds the tokenizer (None: synthetic). Where `is_growing`, `rows` may wait for long, until `close` is called.
    `edits`: ids for the edit stage (edit_tokens.py), None in a run without.
    """

    tokenizer_meta: TokenizerMeta
    folder: Path | None
    fingerprint: str
    num_rows: int | None
    rows: Callable[[np.ndarray], np.ndarray | Rows]
    is_growing: bool = False
    close: Callable[[], None] = lambda: None
    edits: EditTokens | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer_meta.vocabulary


def open_data(
    source: str | Sequence[Any], seq_len: int, seed: int, packing: str = "none", order: str = "shuffled",
    answer_padding: str = "none",
) -> TrainingData:  # fmt: skip
    """Training data of `data.train`: a prefix, `synthetic:VOCAB_SIZE`, or a list of (path, weight). UsageError.

    The members of a list are objects with these attributes, or mappings with these keys. `packing` is a key of PACKING,
    `order` of ORDERS; `answer_padding` is `none` or a key of POLICIES, and concerns conversations alone.
    """
    if isinstance(source, str):
        kind, _, size = source.partition(":")
        if kind == "synthetic":
            return _synthetic(size, seq_len, seed)
        source = [{"path": source, "weight": 1.0}]
    members = [m if isinstance(m, Mapping) else vars(m) for m in source]
    options = {"packing": packing, "padding": answer_padding}
    return ORDERS[order]([m["path"] for m in members], mix([m["weight"] for m in members]), seq_len, seed, **options)


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
    data.expect_random_reads(_is_large(data))
    for start, stop in _scanned_at_open(len(data.tokens)):
        check_ids(data, start, stop, meta.vocabulary)
        data.release()
    data.expect_random_reads(False)
    return meta, name, data


def _is_large(data: IndexedDataset) -> bool:
    """Smaller ones are read as a whole when they are opened."""
    return len(data.tokens) > SCANNED_TOKENS


def _scanned_at_open(num_tokens: int) -> Iterator[tuple[int, int]]:
    """Every token of a small file; of a large one evenly spaced stretches (`dlm data verify` reads all of it)."""
    if num_tokens <= SCANNED_TOKENS:
        starts = list(range(0, num_tokens, STRETCH_TOKENS))
    else:
        starts = [i * (num_tokens - STRETCH_TOKENS) // (STRETCHES - 1) for i in range(STRETCHES)]
    for start in starts:
        yield start, min(start + STRETCH_TOKENS, num_tokens)


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


class ValidationData:
    """Windows of a split in file order, or its answers, one a row; at most `max_rows` (0: all), then evenly spread.

    `bytes_per_token` turns nats per token into bits per byte; `floor` is the exact H_L / L, None where unknown.
    """

    def __init__(self, prefix: str | Path, seq_len: int, max_rows: int = 0):
        self.prefix = str(prefix)
        self.meta, name, data = open_split(prefix)
        self._rows = (_answers(data, self.meta, seq_len, "none") if self.meta.is_chat
                      else _windows(data, self.meta, seq_len))  # fmt: skip
        self._split = self.meta.splits[name]
        num_windows = self._rows.num_rows
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

    def rows(self, row_B: np.ndarray) -> np.ndarray | Rows:
        """int64 [B, L] of the rows 0 ... num_rows - 1; of conversations `Rows`, in which the past is not maskable."""
        return assemble(self._rows.take(self._window_of_row[row_B]))

    def text(self) -> str:
        """The whole split as text, without the separators between documents."""
        made = load_tokenizer(Path(self.prefix).parent, self.meta)
        return made.decode(self._tokens[self._tokens != (-1 if made.eos_id is None else made.eos_id)])


def _windows(data: IndexedDataset, meta: DatasetMeta, seq_len: int) -> Windows:
    if len(data.tokens) < seq_len:
        raise UsageError(
            f"{data.bin_path}: {len(data.tokens)} tokens are fewer than one window of model.seq_len={seq_len}."
            " Prepare more text, or lower seq_len"
        )
    return windows_of(data.bin_path, data.tokens, seq_len, meta.vocabulary)


def _answers(data: IndexedDataset, meta: DatasetMeta, seq_len: int, packing: str) -> PackedDocuments:
    """Answers with their past, one a row or packed; the past is never masked. Raises UsageError where one is longer."""
    past_D, bounds_D1 = read_past(data, meta), data.bounds(0, data.num_documents)
    longest = int(np.diff(bounds_D1).max())
    if longest > seq_len:
        raise UsageError(f"{data.prefix}: the longest answer has {longest} tokens with its past, and model.seq_len is "
                         f"{seq_len}. Prepare with --max_length {seq_len}, or raise seq_len")  # fmt: skip
    packed = _packed(data, meta, seq_len) if packing != "none" else PackedDocuments(
        data.bin_path, data.tokens, one_a_row(data.bounds, data.num_documents, seq_len), meta.vocabulary,
        pad_id_of(meta.eos_id, meta.vocabulary),
    )  # fmt: skip
    return replace(packed, past=(bounds_D1[:-1], past_D))


def read_past(data: IndexedDataset, meta: DatasetMeta) -> np.ndarray:
    """int32 [D]: how many tokens of each document are the past of its answer. Raises UsageError."""
    path = Path(f"{data.prefix}{PROMPTS_SUFFIX}")
    hashes = meta.source.get("prompts_xxh3")
    try:
        raw = read_regular(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Copy the dataset again, or prepare it again") from error
    if not isinstance(hashes, dict) or hashes.get(Path(data.prefix).name) != xxhash.xxh3_64_hexdigest(raw):
        raise UsageError(f"{path} is not the one that meta.json names. Copy the dataset again, or prepare it again")
    past_D = np.frombuffer(raw, dtype="<i4")
    length_D = np.diff(data.bounds(0, data.num_documents))
    if past_D.shape != length_D.shape or past_D.min() < 0 or not (past_D < length_D).all():
        raise UsageError(f"{path} does not fit the documents of {data.prefix}. Prepare the dataset again")
    return past_D


def _packed(data: IndexedDataset, meta: DatasetMeta, seq_len: int) -> PackedDocuments:
    plan = open_plan(data.prefix, data.bounds, data.num_documents, xxhash.xxh3_64_hexdigest(data.index), seq_len)
    data.release()
    return PackedDocuments(data.bin_path, data.tokens, plan, meta.vocabulary, pad_id_of(meta.eos_id, meta.vocabulary))


PACKING = {"none": _windows, "best_fit": _packed}


def _shuffled(
    prefixes: list[str], schedule: Mixture, seq_len: int, seed: int, packing: str, padding: str
) -> TrainingData:
    """Each member is passed in its own keyed order over all of its rows."""
    opened = [open_split(prefix) for prefix in prefixes]
    _require_one_tokenizer(prefixes, [meta for meta, _, _ in opened])
    members = [
        _answers(data, meta, seq_len, packing) if meta.is_chat else PACKING[packing](data, meta, seq_len)
        for meta, _, data in opened
    ]
    chats = [meta for meta, _, _ in opened if meta.is_chat]
    if 0 < len(chats) < len(opened) and packing == "none":
        raise UsageError("data.train mixes conversations with text: their rows are alike only with data.packing=best_fit"
                         " and data.answer_padding=none")  # fmt: skip
    for _, _, data in opened:
        data.expect_random_reads(_is_large(data))

    def take(k: int, own_B: np.ndarray) -> tuple[np.ndarray, ...]:
        return members[k].take(row_of(own_B, members[k].num_rows, seed, k))

    content = {"members": [meta.content(name) for meta, name, _ in opened]} | _identity(packing, schedule)
    rows, num_rows = _rows(schedule, [partial(take, k) for k in range(len(members))]), sum(m.num_rows for m in members)
    if chats and padding != "none":
        rows, content = _padded(rows, chats, seed, packing, padding), content | {"answer_padding": padding}
    return TrainingData(opened[0][0], Path(prefixes[0]).parent, _hash(content), num_rows, rows)


def _padded(rows: Callable, chats: list[DatasetMeta], seed: int, packing: str, padding: str) -> Callable:
    """`rows` with answers continued by end tokens. Raises UsageError where rows have no room or no end is known."""
    if packing != "none":
        raise UsageError(f"data.packing={packing} fills rows with conversations, and data.answer_padding={padding} continues "
                         "answers by what a row has left: set data.packing=none, or data.answer_padding=none, with which "
                         "texts end where the canvas does and not where the answer does")  # fmt: skip
    end_ids = {meta.end_id for meta in chats}
    return lambda sample_B: continued(rows(sample_B), padding, seed, sample_B, end_ids)


def _sharded(
    prefixes: list[str], schedule: Mixture, seq_len: int, seed: int, packing: str, padding: str
) -> TrainingData:
    """Each member is passed shard by shard, in a keyed order over the rows of each; the last may not be there yet.
    A stream is text, which has no answers: `padding` is for the other order."""
    members = [ShardedRows(ShardStream(prefix), seq_len, seed, k, packing) for k, prefix in enumerate(prefixes)]
    lists = [member.stream.list for member in members]
    _require_one_tokenizer(prefixes, [found.tokenizer for found in lists])
    declared = [{"content": found.content, **found.tokenizer.tokenizer_dict()} for found in lists]
    content = {"order": "sharded", "members": declared} | _identity(packing, schedule)

    def close() -> None:
        for member in members:
            member.stream.close()

    rows, folder = _rows(schedule, [member.take for member in members]), Path(prefixes[0]).parent
    return TrainingData(lists[0].tokenizer, folder, _hash(content), None, rows, is_growing=True, close=close)


ORDERS = {"shuffled": _shuffled, "sharded": _sharded}


def _require_one_tokenizer(prefixes: list[str], metas: list[TokenizerMeta]) -> None:
    for prefix, meta in zip(prefixes, metas, strict=True):
        require_same_tokenizer(metas[0], meta, prefixes[0], prefix)


def _identity(packing: str, schedule: Mixture) -> dict[str, Any]:
    """What beside the tokens decides which rows there are."""
    packed = {} if packing == "none" else {"packing": [packing, packing_version]}
    return packed | {"weights": schedule.quota_K.tolist()}


def _rows(schedule: Mixture, takes: list[Callable]) -> Callable[[np.ndarray], np.ndarray | Rows]:
    """`takes[k](own_B)` gives rows of member k by their number among its own samples."""

    def rows(sample_B: np.ndarray) -> np.ndarray | Rows:
        if len(takes) == 1:
            return assemble(takes[0](sample_B))
        member_B, own_B = schedule.locate(sample_B)
        places = ((k, np.flatnonzero(member_B == k)) for k in range(len(takes)))
        return assemble(merge([(at, takes[k](own_B[at])) for k, at in places if at.size]))

    return rows


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

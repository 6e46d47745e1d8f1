"""Checking and showing an indexed dataset: `dlm data verify|stats|head`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.loader import check_ids, open_split, read_past
from dlm_scale.data.meta import BLOCK_BYTES, DatasetMeta
from dlm_scale.data.tokenizer import load_tokenizer
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.errors import UsageError

READ_BYTES = 1 << 20


def verify(prefix: str) -> str:
    """Check files, hashes, every id and the tokenizer; returns one line. Raises UsageError at the first fault."""
    meta, name, data = open_split(prefix)
    split = meta.splits[name]
    max_id = max(_check_block(data, i, expected, meta.vocabulary) for i, expected in enumerate(split.bin_xxh3))
    if max_id != split.max_id:
        raise UsageError(f"{data.bin_path}: largest id {max_id}, meta.json says {split.max_id}. Prepare it again")
    load_tokenizer(Path(prefix).parent, meta)
    if meta.is_chat:
        read_past(data, meta)
    return f"{prefix}: {split.tokens:,} tokens in {split.documents:,} documents, {len(split.bin_xxh3)} blocks: all good"


def _check_block(data: IndexedDataset, number: int, expected: str, vocabulary: Vocabulary) -> int:
    """The largest id of one block; read in parts that fit into the processor's cache, for the hash and for the ids."""
    start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, data.tokens.nbytes)
    digest, largest, buffer = xxhash.xxh3_64(), 0, np.empty(READ_BYTES // data.dtype.itemsize, data.dtype)
    with open(data.bin_path, "rb", buffering=0) as file:
        file.seek(start)
        for at in range(start, stop, READ_BYTES):
            ids = buffer[: (min(at + READ_BYTES, stop) - at) // data.dtype.itemsize]
            file.readinto(ids)
            digest.update(ids)
            largest = max(largest, int(ids.view(f"u{ids.itemsize}").max()))
    if digest.hexdigest() != expected:
        where = f"bytes {start} to {stop - 1}"
        raise UsageError(f"{data.bin_path}: {where} have changed since it was prepared. Copy or prepare it again")
    if largest >= vocabulary.num_outputs or vocabulary.num_outputs == vocabulary.size or vocabulary.suppressed_ids:
        check_ids(data, start // data.dtype.itemsize, stop // data.dtype.itemsize, vocabulary)
    return largest


def summary(meta: DatasetMeta, out: str | Path) -> str:
    """What stands in a dataset's folder, and what to do next."""
    lines = [f"{out}/{name}: {split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} text bytes"
             for name, split in meta.splits.items()]  # fmt: skip
    lines.append(f"tokenizer {meta.tokenizer.kind}: {meta.vocab_size} ids, the mask is {meta.mask_id}")
    return "\n".join([*lines, f"train on it with data.train={out}/train data.validation={out}/val"])


def stats(prefix: str) -> dict[str, Any]:
    """Numbers about a split: counts, bytes per token, entropies in nats per token, document lengths in tokens."""
    meta, name, data = open_split(prefix)
    split = meta.splits[name]
    quantiles = np.quantile(np.diff(np.cumsum(np.append(0, data.lengths))[data.document_indices]), (0, 0.5, 1))
    return {
        "tokenizer": f"{meta.tokenizer.kind} ({meta.tokenizer.hash[:12]})",
        "vocab_size": meta.vocab_size,
        "mask_id": meta.mask_id,
        "eos_id": meta.eos_id,
        "tokens": split.tokens,
        "documents": split.documents,
        "text_bytes": split.bytes,
        "bytes_per_token": round(split.bytes / split.tokens, 4),
        "max_id": split.max_id,
        "unigram_entropy": round(split.unigram_entropy, 4),
        "entropy_rate": round(meta.floor.rate, 4) if meta.floor else None,
        "document_length_min_median_max": [int(q) for q in quantiles],
        "source": meta.source,
    }


def head(prefix: str, count: int, seq_len: int, max_characters: int) -> Iterator[str]:
    """The first `count` documents as text, or the first windows of `seq_len` tokens where that is not 0."""
    meta, _, data = open_split(prefix)
    made = load_tokenizer(Path(prefix).parent, meta)
    if seq_len:
        pieces = (data.tokens[start : start + seq_len] for start in range(0, len(data.tokens), seq_len))
    else:
        pieces = (data.document(i) for i in range(data.num_documents))
    for _, ids in zip(range(count), pieces, strict=False):
        text = made.decode(ids[: 8 * max_characters])
        yield text if len(text) <= max_characters else text[:max_characters] + " ..."

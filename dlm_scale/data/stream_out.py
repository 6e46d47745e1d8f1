"""Publishing a dataset while it is still being prepared: the producer's side of stream.py, for `dlm prepare --stream`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlm_scale.data.indexed import IndexedWriter
from dlm_scale.data.stream import StreamProducer, shard_prefix
from dlm_scale.data.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 24


class StreamOut:
    """Publishes what a writer has written as shards of OUT/train, of about `shard_tokens` each.

    Where a shard ends depends on the calls of `after` alone, so a run that continues publishes the same ones; those that
    are listed already are passed over. A context manager: it gives signs of life in between.
    """

    def __init__(self, out: Path, folder: Path, tokenizer: Tokenizer, content: Mapping[str, Any], shard_tokens: int):
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)  # a reader of the list needs it
        self._prefix, self._pair, self._shard_tokens = out / "train", folder / "shard", shard_tokens
        self._producer = StreamProducer(self._prefix, tokenizer.meta, {**content, "shard_tokens": shard_tokens})
        self._number = self._num_tokens = self._num_documents = 0

    def __enter__(self) -> StreamOut:
        self._producer.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._producer.__exit__(*exception)

    def after(self, writer: IndexedWriter) -> None:
        """Some documents more have been written."""
        if not writer.is_inside and writer.num_tokens - self._num_tokens >= self._shard_tokens:
            self._publish(writer)

    def finish(self, writer: IndexedWriter) -> None:
        """All documents have been written."""
        if writer.num_tokens > self._num_tokens:
            self._publish(writer)
        self._producer.finish()

    def remove_shards(self) -> None:
        """OUT/train.bin and .idx are there now, of which the shards are parts."""
        for number in range(self._number):
            for suffix in (".bin", ".idx"):
                Path(shard_prefix(self._prefix, number) + suffix).unlink(missing_ok=True)

    def _publish(self, writer: IndexedWriter) -> None:
        lengths = writer.lengths(self._num_documents)
        if self._number >= len(self._producer.list.shards):
            writer.sync()
            size, dtype = writer.num_tokens - self._num_tokens, writer.dtype
            ids = np.fromfile(f"{writer.prefix}.bin", dtype, size, offset=self._num_tokens * dtype.itemsize)
            pair = IndexedWriter(self._pair, dtype)
            pair.add(ids, lengths, [True] * len(lengths))
            pair.close()
            self._producer.publish(self._pair)
        self._number += 1
        self._num_tokens, self._num_documents = writer.num_tokens, self._num_documents + len(lengths)

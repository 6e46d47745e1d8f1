"""The order `sharded`: an epoch passes the shards of a stream one after the other, the rows of each in a keyed order.

So the first samples need the first shards only, and a run that begins while the last are still being prepared reads the
same rows as one that begins later. B samples, L positions of a row.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dlm_scale.data.order import order_key, permute
from dlm_scale.data.packing import PackingPlan, open_plan
from dlm_scale.data.rows import PackedDocuments, Windows, merge, pad_id_of, windows_of
from dlm_scale.data.stream import ShardStream, ShardTokens
from dlm_scale.errors import UsageError

OPEN_SHARDS = 8  # kept open


class ShardedRows:
    """The rows of one member of a mixture by their number among its own samples. To be used by one thread."""

    def __init__(self, stream: ShardStream, seq_len: int, seed: int, member: int, packing: str):
        self.stream, self._seq_len, self._seed, self._member = stream, seq_len, seed, member
        self._is_packed = packing != "none"
        self._ends = [0]  # rows before each shard known so far, and in all of them
        self._open = lru_cache(OPEN_SHARDS)(self._open_rows)

    def take(self, own_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """What the rows' `take` gives. Waits for shards that are not there yet; raises UsageError as a ShardStream."""
        epoch_B, shard_B, within_B = self._locate(np.asarray(own_B, dtype=np.int64))
        parts = []
        for epoch, shard in sorted(set(zip(epoch_B.tolist(), shard_B.tolist(), strict=True))):
            at = np.flatnonzero((epoch_B == epoch) & (shard_B == shard))
            rows, key = self._open(shard), order_key(self._seed, epoch, self._member, shard)
            parts.append((at, rows.take(permute(within_B[at], rows.num_rows, key))))
        return merge(parts)

    def _locate(self, own_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, shard, number within the shard), int64 [B] each."""
        while self._ends[-1] <= own_B.max() and self.stream.has(len(self._ends) - 1):
            self._ends.append(self._ends[-1] + self._num_rows(len(self._ends) - 1))
        total = self._ends[-1]
        if not total:
            raise UsageError(f"{self.stream.prefix}: its shards hold no row of model.seq_len={self._seq_len}")
        epoch_B, at_B = np.divmod(own_B, total)  # 0 as long as there are shards that have not been asked for
        shard_B = np.searchsorted(self._ends, at_B, side="right") - 1
        return epoch_B, shard_B, at_B - np.take(self._ends, shard_B)

    def _num_rows(self, number: int) -> int:
        if self._is_packed:
            return self._plan(self.stream.open(number)).num_rows
        return self.stream.list.shards[number].tokens // self._seq_len

    def _plan(self, shard: ShardTokens) -> PackingPlan:
        return open_plan(shard.prefix, shard.bounds, shard.shard.documents, shard.shard.idx_xxh3, self._seq_len)

    def _open_rows(self, number: int) -> Windows | PackedDocuments:
        shard, meta = self.stream.open(number), self.stream.list.tokenizer
        shard.check()
        if not self._is_packed:
            return windows_of(shard.bin_path, shard.tokens, self._seq_len, meta.vocabulary)
        pad_id = pad_id_of(meta.eos_id, meta.vocabulary)
        return PackedDocuments(shard.bin_path, shard.tokens, self._plan(shard), meta.vocabulary, pad_id)

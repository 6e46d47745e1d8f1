"""The batch hash sees every id, mask and time, and no split."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.engine.batch_hash import batch_hash, row_hashes
from dlm_scale.ops import Segments

ALONE = SimpleNamespace(data_size=1)


def noised(rows, ids_BL, times_B, seed=1):
    return corrupt(ids_BL[rows], rows, times_B[rows], seed=seed, schedule=SCHEDULES["linear"],
                   weighting=WEIGHTINGS["count"], mask_id=9, denominator=1.0)


def hash_of(ids_BL, times_B, split=1, seed=1):
    batch = [noised(rows, ids_BL, times_B, seed) for rows in np.split(np.arange(len(ids_BL)), split)]
    return batch_hash(batch, ALONE, torch.device("cpu"))


def test_the_hash_does_not_see_the_split_and_sees_everything_else():
    ids_BL, times_B = np.arange(48, dtype=np.int64).reshape(4, 12) % 9, stratified_times(1, 0, 4)
    base = hash_of(ids_BL, times_B)
    assert base == hash_of(ids_BL, times_B, split=2) == hash_of(ids_BL, times_B, split=4)
    seen = {base}
    for position in range(ids_BL.size):  # visible and masked ones alike
        tampered = ids_BL.copy()
        tampered.flat[position] = (tampered.flat[position] + 1) % 9
        seen.add(hash_of(tampered, times_B))
    seen.add(hash_of(ids_BL, times_B, seed=2))
    seen.add(hash_of(ids_BL, np.nextafter(times_B, 0)))
    assert len(seen) == 1 + ids_BL.size + 2


def test_packed_rows_are_hashed_with_their_documents_and_whole_rows_as_ever():
    ids_BL, times_S = np.arange(48, dtype=np.int64).reshape(4, 12) % 9, np.array([0.5, 0.2, 0.9, 0.3, 0.7])

    def hashes(bounds, times, rows=slice(0, 4)):
        index = np.arange(4)[rows]
        attention = Segments(torch.tensor(bounds, dtype=torch.int32))
        packed = corrupt(ids_BL[rows], index, times, seed=1, schedule=SCHEDULES["linear"], attention=attention,
                         weighting=WEIGHTINGS["count"], mask_id=9, denominator=1.0)
        return row_hashes(packed).tolist()

    base = hashes([0, 12, 17, 24, 36, 48], times_S)
    whole = row_hashes(noised(np.arange(4), ids_BL, times_S[[0, 1, 3, 4]])).tolist()
    assert [base[0], *base[2:]] == [whole[0], *whole[2:]] and base[1] != whole[1]
    assert base == hashes([0, 12, 17, 24], times_S[:3], slice(0, 2)) + hashes([0, 12, 24], times_S[3:], slice(2, 4))
    # the same masks, but another document's attention
    same = np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    assert hashes([0, 12, 17, 24, 36, 48], same)[1] != hashes([0, 12, 18, 24, 36, 48], same)[1]

"""What a sampler head is told, against a reading of the rule position by position."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.neighbours import known_neighbours, told_positions
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.ops import Segments


@pytest.mark.parametrize("bounds", [None, [0, 5, 9, 13, 18, 27]])
def test_a_neighbour_is_known_where_it_is_visible_or_told_in_the_same_segment(bounds):
    x0_BL, index = np.random.default_rng(0).integers(0, 50, (3, 9)), np.arange(3)
    attention = bounds and Segments(torch.tensor(bounds, dtype=torch.int32))
    times = np.full(len(bounds or range(4)) - 1, 0.6)
    c = corrupt(x0_BL, index, times, seed=1, schedule=SCHEDULES["linear"], weighting=WEIGHTINGS["elbo"], mask_id=50,
                denominator=1.0, attention=attention)  # fmt: skip
    c = replace(c, told_BL=told_positions(1, index, 9))
    edges, patterns = set(bounds or range(0, 28, 9)), set()
    known = (~c.is_masked_BL | c.told_BL).flatten().tolist()
    for row, *found in zip(c.rows_N.tolist(), *(beside.tolist() for beside in known_neighbours(c))):
        left = -1 if row in edges or not known[row - 1] else x0_BL.flat[row - 1]
        right = -1 if row + 1 in edges or not known[row + 1] else x0_BL.flat[row + 1]
        assert found == [left, right]
        patterns.add((left < 0, right < 0))
    assert len(patterns) == 4


def test_half_is_told_whatever_the_batch():
    told_BL = told_positions(7, np.arange(200) + 2**33, 100)
    assert told_BL.double().mean() == pytest.approx(0.5, abs=0.01)
    assert told_BL[5:7].equal(told_positions(7, np.array([5, 6]) + 2**33, 100))

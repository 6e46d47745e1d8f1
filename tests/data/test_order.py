"""The keyed order is a permutation of each epoch, looks uniform, and needs nothing but (seed, sample)."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from dlm_scale.data.mixture import MAX_PERIOD, mix
from dlm_scale.data.order import BLOCK, locate, order_key, permute, row_of
from dlm_scale.errors import UsageError


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 65_536, 100_003])
def test_a_permutation_for_every_key(n):
    for seed, epoch, member in ((0, 0, 0), (2**64 - 1, 3, 1), (7, 2**33, 0)):
        image = permute(np.arange(n), n, order_key(seed, epoch, member))
        assert np.array_equal(np.sort(image), np.arange(n))


def test_huge_domains_stay_injective_and_inside():
    n = 2**40
    rng = np.random.default_rng(0)
    index = np.unique(np.concatenate([np.arange(5000), n - 1 - np.arange(5000), rng.integers(0, n, 10_000)]))
    for size in (n, n - 12_345):
        inside = index[index < size]
        image = permute(inside, size, order_key(1, 0))
        assert len(np.unique(image)) == len(inside) and image.min() >= 0 and image.max() < size
        assert abs(image[:5000].mean() / size - 0.5) < 5 / math.sqrt(12 * 5000)  # neighbours are scattered evenly


@pytest.mark.parametrize("n", [3, 5])
def test_all_permutations_are_equally_likely(n):
    all_permutations, expected = math.factorial(n), 15
    counts = Counter(tuple(permute(np.arange(n), n, order_key(3, e))) for e in range(expected * all_permutations))
    chi_square = sum((counts[p] - expected) ** 2 / expected for p in itertools.permutations(range(n)))
    assert chi_square < all_permutations - 1 + 4 * math.sqrt(2 * (all_permutations - 1))


def test_neighbours_do_not_stay_neighbours():
    n, epochs = 1000, 200
    kept = sum((np.diff(permute(np.arange(n), n, order_key(3, epoch))) == 1).sum() for epoch in range(epochs))
    assert abs(kept / epochs - 1) < 4 / math.sqrt(epochs)  # one in a random permutation, on average


def test_keys_differ_by_seed_epoch_member_and_round():
    keys = [order_key(s, e, m) for s, e, m in itertools.product((0, 1), (0, 1, 2**32), (0, 1, 2))]
    words = np.concatenate(keys)
    assert len(np.unique(words)) == len(words)


def test_the_order_is_pinned():
    """A change here would give every resumed run another order of its data."""
    assert permute(np.arange(8), 10, order_key(1, 0)).tolist() == [5, 2, 9, 6, 1, 4, 8, 0]
    assert locate(np.array([0, 9, 10, 10**12]), 10, 1)[1].tolist() == [5, 7, 1, 9]


def test_every_epoch_holds_each_window_once_however_it_is_split():
    n, seed = 37, 5
    epoch_S, window_S = locate(np.arange(3 * n), n, seed)
    for epoch in range(3):
        assert sorted(window_S[epoch_S == epoch]) == list(range(n))
    orders = {tuple(window_S[epoch_S == epoch]) for epoch in range(3)}
    assert len(orders) == 3
    for ranks in (1, 2, 4, 8):  # any rank finds its own samples alone
        for rank in range(ranks):
            mine = np.arange(rank, 3 * n, ranks)
            assert np.array_equal(locate(mine, n, seed)[1], window_S[mine])


def samples_of(ranks: int, rank: int, accumulation: int, micro: int, steps: int) -> np.ndarray:
    """Every sample that a rank asks for, micro-batch by micro-batch, as the train step does."""
    per_step = np.arange(steps * accumulation * ranks * micro).reshape(steps, accumulation, ranks, micro)
    return per_step[:, :, rank].reshape(-1, micro)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_three_epochs_of_a_million_windows_lose_and_repeat_none(ranks, accumulation):
    n, seed, batch = 10**6, 3, 100_000
    visits = np.zeros(3 * n, dtype=bool)
    for rank in range(ranks):
        for sample_B in samples_of(ranks, rank, accumulation, batch // (ranks * accumulation), 3 * n // batch):
            visits[sample_B // n * n + row_of(sample_B, n, seed)] = True
    assert visits.all()  # by 3 n samples: each by one


def test_places_found_in_blocks_are_those_of_the_law():
    for n in (3, BLOCK - 1, BLOCK, 3 * BLOCK + 17, 10**12):
        for first in (0, BLOCK - 3, BLOCK, 2 * BLOCK + 5, 10**13):
            sample_B = np.arange(first, first + 40)
            for index_B in (sample_B, sample_B[::-3], sample_B + 7 * BLOCK):
                assert np.array_equal(row_of(index_B, n, 5, 2), locate(index_B, n, 5, 2)[1])


def test_a_mixture_of_a_million_samples_is_exact_to_one_on_any_ranks():
    weights, num_samples = [0.7, 0.2, 0.1], 10**6
    schedule = mix(weights)
    counts = np.zeros(3, dtype=int)
    seen = np.zeros((3, num_samples), dtype=bool)
    for rank in range(4):
        member, own = schedule.locate(np.arange(rank, num_samples, 4))
        assert not seen[member, own].any()
        seen[member, own] = True
        counts += np.bincount(member, minlength=3)
    assert np.abs(counts - np.array(weights) * num_samples).max() <= 1
    assert all(seen[k, : counts[k]].all() for k in range(3))


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [0.7, 0.2, 0.1], [3, 1, 1, 1, 1, 1], [0.99, 0.01], [1 / 3, math.pi, 1e-2], [1] * 10 + [90]]
)
def test_mixture_is_within_one_sample_of_its_shares_at_every_prefix(weights):
    schedule = mix(weights)
    period = len(schedule.member_P)
    member, local = schedule.locate(np.arange(2 * period + 5))
    share = schedule.quota_K / period
    assert np.abs(share - np.array(weights) / sum(weights)).max() <= 1 / MAX_PERIOD
    for k, s in enumerate(share):
        counts = np.cumsum(member == k)
        assert np.abs(counts - s * np.arange(1, len(member) + 1)).max() < 1
        assert local[member == k].tolist() == list(range(counts[-1]))  # its own samples in sequence, none left out


def test_simple_weights_are_exact():
    assert mix([0.7, 0.2, 0.1]).quota_K.tolist() == [7, 2, 1]
    assert mix([3, 1]).quota_K.tolist() == [3, 1]


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, math.nan], [1, math.inf], [1, 1e-9]])
def test_weights_that_make_no_mixture(weights):
    with pytest.raises(UsageError, match="data.train"):
        mix(weights)

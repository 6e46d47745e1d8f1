"""Where: scores and extents against their definitions."""

import math
from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, Sampler
from dlm_scale.sampling.selectors import SELECTORS, Candidates

PROBS = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.45, 0.05, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
IDS = torch.tensor([1, 2, 0])


def scores(name, sampler=Sampler(), uniform=0.5, remaining=0.5):
    ids_N = IDS if SELECTORS[name].reads_tokens else None
    uniform_N, remaining_N = (torch.full((3,), value, dtype=torch.float64) for value in (uniform, remaining))
    return SELECTORS[name].score(Candidates(PROBS.log(), ids_N, uniform_N, remaining_N), sampler).tolist()


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def test_scores():
    assert scores("max_prob") == pytest.approx([math.log(0.5), math.log(0.45), 0])
    assert scores("margin") == pytest.approx([0.1, 0.2, 1.0])
    expected = [-entropy(0.5, 0.4, 0.1), -entropy(0.45, 0.05, 0.25, 0.25), 0]
    assert scores("entropy") == pytest.approx(expected) == scores("entropy_bounded")
    assert scores("sampled_confidence") == pytest.approx([math.log(0.4), math.log(0.25), 0])


def test_gumbel_noise_fades_and_is_finite():
    noisy = scores("sampled_confidence", SAMPLERS["maskgit"], uniform=0.3, remaining=0.2)
    expected = math.log(0.4) + 4.5 * 0.2 * -math.log(-math.log(0.3))
    assert noisy[0] == pytest.approx(expected)
    assert scores("sampled_confidence", SAMPLERS["maskgit"], remaining=0.0) == scores("sampled_confidence")
    for extreme in (0.0, 1 - 2.0**-53):
        assert all(map(math.isfinite, scores("sampled_confidence", SAMPLERS["maskgit"], uniform=extreme)))


@pytest.mark.parametrize("gamma, counts", [(0.0, [1, 3]), (0.11, [2, 3]), (0.29, [2, 3]), (0.31, [3, 3]), (9.0, [4, 3])])
def test_entropy_bound_leaves_out_the_largest(gamma, counts):
    score_BL = -torch.tensor([[0.1, 0.2, 0.4, 0.5, math.inf], [0.0, 0.0, 0.0, math.inf, math.inf]], dtype=torch.float64)
    extent = SELECTORS["entropy_bounded"].extent
    assert extent(score_BL, replace(SAMPLERS["entropy_bounded"], gamma=gamma)).tolist() == counts


def test_threshold_counts_the_sure_ones():
    score_BL = torch.tensor([[0.99, 0.9, 0.89, 0.0]], dtype=torch.float64).log()
    for threshold, count in ((0.9, 2), (0.5, 3), (1.1, 0)):
        sampler = replace(SAMPLERS["threshold"], threshold=threshold)
        assert SELECTORS["threshold"].extent(score_BL, sampler).tolist() == [count]


@pytest.mark.parametrize("factor, counts", [(0.0, [0, 2]), (0.05, [1, 2]), (0.4, [2, 2]), (1.0, [3, 2]), (4.0, [4, 2])])
def test_the_factor_asks_more_of_more_positions(factor, counts):
    """The largest n with p_(n) >= 1 - factor/(n+1), by trying every n."""
    rows = [[0.98, 0.9, 0.8, 0.3], [1.0, 1.0, 0.0, 0.0]]
    score_BL = torch.tensor(rows, dtype=torch.float64).log()
    for row, count in zip(rows, counts):
        holds = [n for n in range(1, 5) if row[n - 1] > 0 and row[n - 1] >= 1 - factor / (n + 1)]
        assert max(holds, default=0) == count
    sampler = replace(SAMPLERS["factor"], factor=factor)
    assert SELECTORS["factor"].extent(score_BL, sampler).tolist() == counts

"""Guidance and biases against their formulas."""

import math
from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, generate
from dlm_scale.sampling.passes import biased, guided
from dlm_scale.sampling.samplers import resolve
from tests.sampling.test_engine import REMASKING, ROWS, L, V, predict, sample


@pytest.mark.parametrize("sampler", [*SAMPLERS, REMASKING], ids=[*SAMPLERS, "remasking"])
def test_guidance_of_zero_is_no_guidance(sampler):
    assert sample(sampler, ROWS, guidance=0.0).ids_BL.equal(sample(sampler, ROWS).ids_BL)


def test_guidance_mixes_logits():
    given, blind = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given[:, 3] = blind[:, 3] = -torch.inf
    blind[0, 4] = -torch.inf
    given[0, 4] = -torch.inf
    log_probs = guided(given.log_softmax(-1), blind.log_softmax(-1), 1.5)
    possible = [0, 1, 2, 5, 6, 7]
    expected = (blind + 2.5 * (given - blind))[:, possible].log_softmax(-1)  # of logits, whatever their normalisation
    assert torch.allclose(log_probs[0, possible], expected[0])
    assert (log_probs[:, 3] == -torch.inf).all() and not log_probs.isnan().any()
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("settings", [{}, {"block_size": 4, "context": 8}])
def test_the_blind_pass_sees_all_but_the_prompt_and_counts(settings):
    x_BL = torch.randint(V, (7, L), generator=torch.Generator().manual_seed(0))
    is_fixed_BL = torch.zeros_like(x_BL, dtype=torch.bool)
    is_fixed_BL[:, :2] = is_fixed_BL[:, 8] = True
    looks = []

    def looking(x_BW, rows_N):
        given, blind = x_BW.chunk(2)
        looks.append(len(given))
        assert rows_N.chunk(2)[1].equal(rows_N.chunk(2)[0] + given.numel())
        assert (blind[given != blind] == V).all()
        assert ((given != blind).sum(1) <= 3).all() and ((given != blind).sum(1) >= 1).all()
        return predict(x_BW, rows_N)

    made = sample(
        "entropy", ROWS, L, x_BL=x_BL, is_fixed_BL=is_fixed_BL, predict=looking, guidance=2.0, **settings
    )
    assert int(made.nfe_B.sum()) == 2 * sum(looks) and (made.nfe_B == 14).all()
    plain = sample("entropy", ROWS, L, x_BL=x_BL, is_fixed_BL=is_fixed_BL, **settings)
    assert not made.ids_BL.equal(plain.ids_BL) and (plain.nfe_B == 7).all()


def test_a_guided_sample_does_not_depend_on_its_batch():
    x_BL = torch.ones(7, L, dtype=torch.long)
    is_fixed_BL = torch.arange(L).expand(7, L) < 3
    whole = sample("ancestral", ROWS, x_BL=x_BL, is_fixed_BL=is_fixed_BL, guidance=1.0)
    for number, row in enumerate(ROWS):
        alone = sample("ancestral", [row], x_BL=x_BL[:1], is_fixed_BL=is_fixed_BL[:1], guidance=1.0)
        assert alone.ids_BL[0].equal(whole.ids_BL[number])


def test_a_logit_bias_shifts_the_law():
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    moved = biased(log_probs, {1: 1.0, 2: -torch.inf})
    weights = torch.tensor([0.5, 0.3 * torch.e, 0.0])
    assert torch.allclose(moved.exp()[0], weights / weights.sum())
    assert biased(log_probs, {}) is log_probs
    made = sample("random", ROWS * 20, logit_bias={token: -torch.inf for token in (0, 1, 3)})
    assert set(made.ids_BL.unique().tolist()) == {2, 4, 5}


@pytest.mark.parametrize("sampler", ["low_confidence", "margin", "entropy", "threshold", "factor", "entropy_bounded"])
@pytest.mark.parametrize("bias, first", [({}, 0), ({2: -math.inf}, 1), ({2: -9.0}, 1), ({0: 9.0}, 0)])
def test_a_confidence_bias_makes_positions_of_an_id_wait(sampler, bias, first):
    """Id 2 is likeliest at the even positions, which are the surest; with a bias against it all odd ones go first."""
    order = []

    def even_says_2(x_BL, rows_N):
        odd, even = torch.tensor([[0.1, 0.7, 0.2, 0.0], [0.06, 0.06, 0.88, 0.0]]).log()
        return torch.where((rows_N % 2 == 0)[:, None], even, odd)

    generate(
        even_says_2, torch.zeros(1, 10, dtype=torch.long), torch.zeros(1, 10, dtype=torch.bool), temperature=0.0,
        sampler=replace(resolve(sampler), factor=0.2), num_steps=10, seed=0, request_hashes=[0], sample_indices=[0],
        mask_id=3, confidence_bias=bias,
        on_step=lambda state: order.extend((state.is_fresh_BL[0].nonzero().flatten() % 2).tolist()),
    )  # fmt: skip
    assert order == [first] * 5 + [1 - first] * 5

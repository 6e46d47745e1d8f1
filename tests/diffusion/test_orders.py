"""Exact likelihoods of deterministic orders, against the law of the sampler itself, enumerated draw by draw."""

import math

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.likelihood import duel_nll, left_to_right_nll, ordered_nll
from dlm_scale.sampling.engine import generate
from dlm_scale.sampling.samplers import Sampler

V, L = 3, 5
MASK_ID = V


def predictor(net):
    """Signature 3 of a network on the chain."""

    def predict(x_BL, rows_N):
        return net(x_BL).log().flatten(0, 1)[rows_N]

    return predict


def max_prob(log_probs_NV):
    return log_probs_NV.amax(-1)


def negative_entropy(log_probs_NV):
    return (log_probs_NV.exp() * log_probs_NV).sum(-1)


def at_least_half_sure(sorted_BL):
    return (sorted_BL > math.log(0.5)).sum(1)


def law_of_sampler(net, score, k, extent=None):
    """{x: p} by following every draw of the sampler from the empty canvas: nothing is teacher-forced."""
    law, open_states = {}, [((MASK_ID,) * L, 1.0)]
    while open_states:
        x, p = open_states.pop()
        masked = [i for i in range(L) if x[i] == MASK_ID]
        if not masked:
            law[x] = law.get(x, 0.0) + p
            continue
        log_probs_LV = net(torch.tensor([x]))[0].log()
        scores = score(log_probs_LV[masked]).tolist()
        ranked = sorted(range(len(masked)), key=lambda j: (-scores[j], j))
        count = k if extent is None else max(k, int(extent(torch.tensor([sorted(scores, reverse=True)]))))
        chosen = [masked[j] for j in ranked[:count]]
        options = [(x, p)]
        for i in chosen:
            options = [(y[:i] + (v,) + y[i + 1 :], q * log_probs_LV[i, v].exp().item())
                       for y, q in options for v in range(V)]
        open_states += options
    return law


@pytest.mark.parametrize("score, k, extent", [
    (max_prob, 1, None), (max_prob, 2, None), (negative_entropy, 1, None), (negative_entropy, 3, None),
    (max_prob, 1, at_least_half_sure), (negative_entropy, 5, None),
])  # fmt: skip
def test_duel_is_the_law_of_the_sampler(chain, score, k, extent):
    net = chain.random_net()
    nll_X, nfe_X = duel_nll(predictor(net), chain.x_XL, score=score, mask_id=MASK_ID, tokens_per_step=k, extent=extent)
    law = law_of_sampler(net, score, k, extent)
    expected = torch.tensor([law[tuple(x)] for x in chain.x_XL.tolist()], dtype=torch.float64)
    assert (nll_X + expected.log()).abs().max() < 1e-12
    assert nll_X.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (nfe_X == -(-L // k)).all() if extent is None else (nfe_X.min() < L and nfe_X.max() <= L)


def test_duel_is_what_the_sampling_engine_draws(chain, chi_square_p):
    net, num_rows = chain.random_net(), 40_000
    x_BL = torch.full((num_rows, L), MASK_ID)
    made = generate(predictor(net), x_BL, x_BL != MASK_ID, sampler=Sampler(selector="max_prob"), num_steps=L,
                    seed=3, request_hashes=[7] * num_rows, sample_indices=range(num_rows), mask_id=MASK_ID)
    index = (made.ids_BL * torch.tensor([V ** (L - 1 - i) for i in range(L)])).sum(-1)
    nll_X, _ = duel_nll(predictor(net), chain.x_XL, score=max_prob, mask_id=MASK_ID)
    expected = num_rows * nll_X.neg().exp().numpy()
    observed = np.bincount(index.numpy(), minlength=V**L)
    usual = expected > 5
    pooled = [np.append(counts[usual], counts[~usual].sum()) for counts in (observed, expected)]
    assert chi_square_p(*pooled) > 1e-4


def test_one_token_a_step_of_the_oracle_is_the_exact_law_in_any_order(chain):
    predict = predictor(chain.oracle)
    for nll_X in (duel_nll(predict, chain.x_XL, score=max_prob, mask_id=MASK_ID)[0],
                  left_to_right_nll(predict, chain.x_XL, mask_id=MASK_ID),
                  ordered_nll(predict, chain.x_XL, torch.tensor([3, 0, 4, 1, 2]).expand(V**L, L), mask_id=MASK_ID)):
        assert (nll_X + chain.log_p_X).abs().max() < 1e-9


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_fixed_order_is_the_law_of_its_sampler(chain, k):
    net, order = chain.random_net(2), [3, 0, 4, 1, 2]  # rank of each position
    nll_X = ordered_nll(predictor(net), chain.x_XL, torch.tensor(order).expand(V**L, L), mask_id=MASK_ID,
                        tokens_per_step=k)
    for x, nll in zip(chain.x_XL[::17].tolist(), nll_X[::17].tolist()):
        total = 0.0
        for step in range(-(-L // k)):
            seen = [x[i] if order[i] < step * k else MASK_ID for i in range(L)]
            p_LV = net(torch.tensor([seen]))[0]
            total -= sum(math.log(p_LV[i, x[i]]) for i in range(L) if order[i] // k == step)
        assert nll == pytest.approx(total, abs=1e-12)
    assert nll_X.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_a_given_prefix_costs_nothing(chain):
    """Left to right: the whole is the prefix and the rest given the prefix. DUEL: normalised over the rest."""
    predict, maskable_BL = predictor(chain.random_net()), torch.arange(L) >= 2
    rest_X = left_to_right_nll(predict, chain.x_XL, mask_id=MASK_ID, maskable_BL=maskable_BL.expand(V**L, L))
    only = chain.x_XL[:, :2] == torch.tensor([2, 1])
    same_X = only.all(-1)
    assert rest_X[same_X].neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    duel_X, nfe_X = duel_nll(predict, chain.x_XL, score=max_prob, mask_id=MASK_ID, tokens_per_step=2,
                             maskable_BL=maskable_BL.expand(V**L, L))
    assert duel_X[same_X].neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (nfe_X == 2).all()
    whole_X = left_to_right_nll(predict, chain.x_XL, mask_id=MASK_ID)
    assert (whole_X >= rest_X).all()


def test_rows_of_different_lengths_stand_in_one_batch(chain):
    predict, length_B = predictor(chain.random_net()), torch.tensor([0, 3, 5])
    maskable_BL = torch.arange(L) < length_B[:, None]
    nll_B, nfe_B = duel_nll(predict, chain.x_XL[:3], score=max_prob, mask_id=MASK_ID, tokens_per_step=2,
                            maskable_BL=maskable_BL)
    alone = [duel_nll(predict, chain.x_XL[i : i + 1], score=max_prob, mask_id=MASK_ID, tokens_per_step=2,
                      maskable_BL=maskable_BL[i : i + 1])[0].item() for i in range(3)]
    assert nll_B.tolist() == alone and nfe_B.tolist() == [0, 2, 3] and alone[0] == 0

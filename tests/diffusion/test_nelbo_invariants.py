"""The weightings against enumeration (invariants I2-I5, I11, I12): all estimate one NELBO, the exact one."""

import itertools
import math

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS

V, L = 3, 5
NODES, NODE_WEIGHTS = (torch.from_numpy(a / 2) for a in np.polynomial.legendre.leggauss(300))
NODES = NODES + 0.5
PAIRS = [(w, s) for w in WEIGHTINGS for s in SCHEDULES if s == "linear" or not WEIGHTINGS[w].requires_linear]


def sets_by_time(chain, schedule):
    """[T, M] probability of each mask set at each quadrature time."""
    m_T1, n_M = schedule.mask_ratio(NODES)[:, None], chain.masks_ML.sum(-1)
    return m_T1**n_M * (1 - m_T1) ** (L - n_M)


def expected_loss(chain, ce_XML, weighting, schedule):
    """[X] the weighting's mean: quadrature over t, enumeration over mask sets."""
    n_M = chain.masks_ML.sum(-1).double()
    t_TM, n_TM, length_TM = torch.broadcast_tensors(NODES[:, None], n_M, torch.tensor(float(L), dtype=torch.float64))
    weight_TM = weighting.fn(schedule, t_TM, n_TM, length_TM)
    return ce_XML.sum(-1) @ (NODE_WEIGHTS[:, None] * sets_by_time(chain, schedule) * weight_TM).sum(0)


def nelbo_between(chain, ce_XML, schedule):
    """[X] the exact NELBO's part with m between m(0) and m(1), integrated over m itself."""
    low, high = schedule.mask_ratio(torch.tensor([0.0, 1.0], dtype=torch.float64))
    m_T1, n_M = low + (high - low) * NODES[:, None], chain.masks_ML.sum(-1)
    share_M = ((high - low) * NODE_WEIGHTS[:, None] * m_T1 ** (n_M - 1.0) * (1 - m_T1) ** (L - n_M)).sum(0)
    return ce_XML.sum(-1)[:, 1:] @ share_M[1:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_elbo_is_minus_log_p_for_every_sequence_under_the_oracle(chain, name):
    expected = expected_loss(chain, chain.ce_table(chain.oracle), WEIGHTINGS["elbo"], SCHEDULES[name])
    tolerance = 1e-10 if name not in ("loglinear", "geometric") else 2e-2
    assert (expected + chain.log_p_X).abs().max() < tolerance


def test_count_is_minus_log_p_for_every_sequence_under_the_oracle(chain):
    expected = expected_loss(chain, chain.ce_table(chain.oracle), WEIGHTINGS["count"], SCHEDULES["linear"])
    assert (expected + chain.log_p_X).abs().max() < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_net_has_one_nelbo_under_every_schedule(chain, name):
    ce_XML = chain.ce_table(chain.random_net())
    expected = expected_loss(chain, ce_XML, WEIGHTINGS["elbo"], SCHEDULES[name])
    assert (expected - nelbo_between(chain, ce_XML, SCHEDULES[name])).abs().max() < 1e-10
    if name not in ("loglinear", "geometric"):
        assert (expected - chain.exact_nelbo(ce_XML)).abs().max() < 1e-10


def test_any_net_has_the_mean_over_all_orders_as_its_nelbo(chain):
    ce_XML = chain.ce_table(chain.random_net())
    index = {tuple(m): j for j, m in enumerate(chain.masks_ML.tolist())}
    total = torch.zeros(len(chain.x_XL), dtype=torch.float64)
    for order in itertools.permutations(range(L)):
        masked = [True] * L
        for position in order:
            total += ce_XML[:, index[tuple(masked)], position]
            masked[position] = False
    assert (total / math.factorial(L) - chain.exact_nelbo(ce_XML)).abs().max() < 1e-12


def test_count_and_exact_have_the_exact_nelbo_of_any_net_as_their_mean(chain):
    ce_XML, linear = chain.ce_table(chain.random_net()), SCHEDULES["linear"]
    exact = chain.exact_nelbo(ce_XML)
    assert (expected_loss(chain, ce_XML, WEIGHTINGS["count"], linear) - exact).abs().max() < 1e-12
    n_M = chain.masks_ML.sum(-1).double()
    weight_M = WEIGHTINGS["exact"].fn(linear, torch.ones_like(n_M), n_M, torch.full_like(n_M, L))
    law_M = torch.tensor([0.0 if n == 0 else 1 / (L * math.comb(L, int(n))) for n in n_M], dtype=torch.float64)
    assert (ce_XML.sum(-1) @ (weight_M * law_M) - exact).abs().max() < 1e-12


def test_nelbo_is_at_least_the_entropy_and_equal_only_for_the_oracle(chain):
    p_X = chain.log_p_X.exp()
    assert (p_X @ chain.exact_nelbo(chain.ce_table(chain.oracle))).item() == pytest.approx(chain.entropy, abs=1e-12)
    for seed in range(5):
        assert (p_X @ chain.exact_nelbo(chain.ce_table(chain.random_net(seed)))).item() > chain.entropy + 0.1


def row_losses(x0_BL, ce_fn, weighting, schedule, field="weight_N"):
    """[B] weighted sum of cross-entropies of each row, at globally stratified times."""
    num_rows = len(x0_BL)
    c = corrupt(
        x0_BL, np.arange(num_rows), stratified_times(9, 0, num_rows), seed=4, schedule=SCHEDULES[schedule],
        weighting=WEIGHTINGS[weighting], mask_id=int(x0_BL.max()) + 1, denominator=1.0,
    )  # fmt: skip
    terms_N = getattr(c, field).double() * ce_fn(c).double()
    return torch.zeros(num_rows, dtype=torch.float64).index_add(0, c.rows_N // x0_BL.shape[1], terms_N)


@pytest.mark.parametrize("weighting, schedule", PAIRS)
def test_drawn_masks_have_the_enumerated_nelbo_as_their_mean(chain, weighting, schedule):
    ce_XML = chain.ce_table(chain.random_net())
    which = torch.arange(400_000) % len(chain.x_XL)
    losses = row_losses(chain.x_XL[which], chain.ce_fn(ce_XML), weighting, schedule, "elbo_weight_N")
    expected = nelbo_between(chain, ce_XML, SCHEDULES[schedule])[which]
    error, scale = losses - expected, expected.mean()
    standard_error = error.std() / len(which) ** 0.5
    assert abs(error.mean()) < 4 * standard_error < 0.02 * scale


def uniform_ce(vocab):
    return lambda c: torch.full((c.rows_N.numel(),), math.log(vocab), dtype=torch.float64)


def test_uniform_predictor_costs_log_v(chain):
    length, vocab = 16, 10
    x0_BL = np.full((40_000, length), vocab - 1)
    loss = {w: row_losses(x0_BL, uniform_ce(vocab), w, "linear") / length for w in ("exact", "count", "elbo")}
    assert (loss["exact"] - math.log(vocab)).abs().max() < 1e-6
    with_any = (1 + 1 / length) * math.log(vocab)
    assert ((loss["count"] - with_any).abs() < 1e-6).logical_or(loss["count"] == 0).all()
    assert (loss["count"] == 0).double().mean() == pytest.approx(1 / (length + 1), abs=0.005)
    for values in (loss["count"], loss["elbo"]):
        assert abs(values.mean() - math.log(vocab)) < 4 * values.std() / 200
    # the three estimate the same; what the time-free weights are for is their variance
    assert loss["exact"].var() < 0.1 * loss["count"].var() < 0.1 * loss["elbo"].var()


def test_unigram_oracle_on_an_iid_source_costs_the_entropy():
    q_V = torch.softmax(torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64), -1)
    entropy = -(q_V * q_V.log()).sum().item()
    x0_BL = torch.multinomial(q_V, 40_000 * 12, True, generator=torch.Generator().manual_seed(3)).view(-1, 12)
    for weighting, schedule in PAIRS:
        if WEIGHTINGS[weighting].is_elbo and schedule not in ("loglinear", "geometric"):
            loss = row_losses(x0_BL, lambda c: -q_V.log()[c.target_N], weighting, schedule) / 12
            assert abs(loss.mean() - entropy) < 4 * loss.std() / 200, (weighting, schedule)


def test_weightings_declare_what_they_are():
    declared = {w.name: (w.is_elbo, w.exact_count, w.requires_linear) for w in WEIGHTINGS.values()}
    assert declared == {
        "count": (True, False, True), "elbo": (True, False, False),
        "exact": (True, True, True), "simple": (False, False, False),
    }  # fmt: skip

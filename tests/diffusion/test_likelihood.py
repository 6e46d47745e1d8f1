"""The NELBO estimator: unbiased, honest about its error, and the same for every split of the rows."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.draws import ESTIMATORS, evaluation_draws
from dlm_scale.diffusion.likelihood import (
    RowSums,
    bits_per_byte,
    difference,
    estimate_nelbo,
    perplexity,
    row_sums,
    summarise,
)

V, L = 3, 5
MASK_ID = V


def rows_of(chain, num_rows, seed=0):
    which = torch.multinomial(chain.log_p_X.exp(), num_rows, True, generator=torch.Generator().manual_seed(seed))
    return which, chain.x_XL[which]


def estimate(ce_fn, x0_BL, seed=0, num_draws=4, maskable_BL=None, first=0, estimator="exact"):
    batch = (x0_BL, np.arange(first, first + len(x0_BL), dtype=np.int64), maskable_BL)
    return estimate_nelbo(ce_fn, [batch], seed=seed, num_draws=num_draws, mask_id=MASK_ID, estimator=estimator)


def mean_over_offsets(chain, ce_XML, estimator, num_passes, length=L):
    """[X] the exact mean of one replicate: its plan at every offset of a grid on which the sizes' law is exact, and all
    subsets of each size."""
    edges = np.unique(np.concatenate([[0.0, 1.0], _changes(estimator, num_passes, length)]))
    middle, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    size_M, share = chain.masks_ML.sum(-1), torch.zeros(len(chain.masks_ML), dtype=torch.float64)
    for count_B, weight_B in ESTIMATORS[estimator].plan(middle, np.full(len(middle), length), num_passes):
        for count, weight, part in zip(count_B.tolist(), weight_B.tolist(), width.tolist()):
            share += (size_M == count).double() * weight * part / math.comb(length, count)
    return ce_XML.sum(-1) @ share / num_passes


def _changes(estimator, num_passes, length):
    """Offsets in (0, 1) at which a size changes, found by bisection."""
    found, fine = [], np.linspace(0, 1, 2001)[:-1] + 1e-7
    sizes = np.stack([count for count, _ in ESTIMATORS[estimator].plan(fine, np.full(2000, length), num_passes)])
    for at in np.flatnonzero((np.diff(sizes) != 0).any(0)):
        low, high = fine[at], fine[at + 1]
        for _ in range(60):
            middle = (low + high) / 2
            plan = ESTIMATORS[estimator].plan(np.array([middle]), np.array([length]), num_passes)
            same = [int(count[0]) for count, _ in plan] == sizes[:, at].tolist()
            low, high = (middle, high) if same else (low, middle)
        found.append(high)
    return found


@pytest.mark.parametrize("estimator, num_passes", [("exact", 1), ("exact", 4), ("pairs", 2), ("pairs", 4)])
def test_an_estimators_mean_over_all_its_masks_is_the_exact_nelbo(chain, estimator, num_passes):
    ce_XML = chain.ce_table(chain.random_net())
    found = mean_over_offsets(chain, ce_XML, estimator, num_passes)
    assert (found - chain.exact_nelbo(ce_XML)).abs().max() < 1e-12


def test_the_quadrature_is_the_rule_on_the_curve_over_the_sizes(chain):
    """Between two sizes the curve is a straight line: so a curve that is one has no error but at its ends."""
    ce_XML = chain.ce_table(chain.random_net())
    exact, size_M = chain.exact_nelbo(ce_XML), chain.masks_ML.sum(-1)
    curve_XL = torch.stack([ce_XML.sum(-1)[:, size_M == n].mean(1) / n for n in range(1, L + 1)], 1)
    nodes, weights = np.polynomial.legendre.leggauss(4)
    place_D = np.clip((nodes + 1) / 2 * L + 0.5, 1, L)
    rule_X = sum(w / 2 * torch.lerp(curve_XL[:, int(s) - 1], curve_XL[:, min(int(s), L - 1)], s - int(s))
                 for w, s in zip(weights, place_D))
    found = mean_over_offsets(chain, ce_XML, "quadrature", 4)
    assert (found - L * rule_X).abs().max() < 1e-9
    spread = curve_XL.amax(1) - curve_XL.amin(1)
    assert 1e-3 < (found - exact).abs().max() and ((found - exact).abs() < spread).all()
    for length in (32, 500):  # on a straight line the error is that of the ends alone
        sizes = np.linspace(0, 1, 4001)[:-1] + 1e-5
        total = sum(((1 + 2 * count / length) * count * weight / length).mean() / 4
                    for count, weight in ESTIMATORS["quadrature"].plan(sizes, np.full(4000, length), 4))
        assert total == pytest.approx(np.mean(1 + 2 * np.arange(1, length + 1) / length), abs=1e-4)


def test_the_usual_weights_on_pairs_would_be_biased_below(chain):
    """l on 1..L with weights L/l and L/(L-l) never masks the full set on the complement's side."""
    ce_XML = chain.ce_table(chain.random_net())
    size_M, share = chain.masks_ML.sum(-1), torch.zeros(len(chain.masks_ML), dtype=torch.float64)
    for n in range(1, L + 1):
        for m in filter(None, (n, L - n)):
            share += (size_M == m).double() * (L / m) / math.comb(L, m) / L / 2
    assert (ce_XML.sum(-1) @ share < chain.exact_nelbo(ce_XML) - 1e-3).all()


@pytest.mark.parametrize("estimator", ["pairs", "quadrature"])
def test_a_pair_masks_every_maskable_token_once_and_one_of_them_twice(estimator):
    x0_BL, length_B = np.zeros((60, 9), np.int64), np.arange(60) % 10
    maskable_BL = np.arange(9) < length_B[:, None]
    options = dict(seed=0, num_draws=8, mask_id=1, maskable_BL=maskable_BL, estimator=estimator)
    draws = list(evaluation_draws(x0_BL, np.arange(60), **options))
    for one, other in zip(draws[::2], draws[1::2], strict=True):
        assert np.array_equal((one.is_masked_BL | other.is_masked_BL).numpy(), maskable_BL)
        assert (one.is_masked_BL & other.is_masked_BL).sum(1).tolist() == (length_B > 0).tolist()
        ratio = one.weight_N * one.is_masked_BL.sum(1)[one.rows_N // 9] / torch.from_numpy(length_B)[one.rows_N // 9]
        assert torch.allclose(ratio, ratio[:1])  # a share for the stratum, and L/l
    sizes_KB = np.stack([draw.is_masked_BL.sum(1).numpy() for draw in draws])
    assert (sizes_KB[0, length_B > 0] <= 2).all() and (sizes_KB[0] + sizes_KB[1] == length_B + (length_B > 0)).all()


def test_both_sets_of_a_pair_are_uniform(chi_square_p):
    """Given its size, every subset is as likely, of the mirror too."""
    draws = list(evaluation_draws(np.zeros((60_000, 4), np.int64), np.arange(60_000), seed=3, num_draws=4, mask_id=1,
                                  estimator="pairs"))
    for draw in draws:
        number_B = (draw.is_masked_BL * torch.tensor([8, 4, 2, 1])).sum(1).numpy()
        for size in range(1, 4):
            of_size = [n for n in range(16) if bin(n).count("1") == size]
            observed = np.array([(number_B == n).sum() for n in of_size])
            if observed.sum():
                assert chi_square_p(observed, np.full(len(of_size), observed.sum() / len(of_size))) > 1e-4


@pytest.mark.parametrize("estimator, num_draws", [("exact", 2), ("exact", 8), ("pairs", 4)])
def test_interval_of_the_monte_carlo_part_covers_the_exact_value(chain, estimator, num_draws):
    ce_XML = chain.ce_table(chain.random_net())
    which, x0_BL = rows_of(chain, 150)
    exact = chain.exact_nelbo(ce_XML)[which].sum().item() / (150 * L)
    options = dict(num_draws=num_draws, estimator=estimator)
    estimates = [estimate(chain.ce_fn(ce_XML), x0_BL, seed, **options) for seed in range(400)]
    error = np.array([e.nelbo - exact for e in estimates])
    se = np.array([e.nelbo_se_mc for e in estimates])
    covered = (np.abs(error) < 1.96 * se).mean()
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 400) ** 0.5
    assert abs(error.mean()) < 4 * error.std() / 20 and error.std() > 1e-3
    # the reported variance is the true one: chi-square spread of 400 estimates
    assert (se**2).mean() == pytest.approx(error.var(), rel=4 * (2 / 400) ** 0.5)


def test_row_interval_covers_the_mean_of_the_source(chain):
    ce_XML = chain.ce_table(chain.random_net())
    population = (chain.log_p_X.exp() @ chain.exact_nelbo(ce_XML)).item() / L
    estimates = [
        estimate(chain.ce_fn(ce_XML), rows_of(chain, 80, seed)[1], seed=1, num_draws=10, first=80 * seed)
        for seed in range(300)
    ]
    covered = np.mean([abs(e.nelbo - population) < 1.96 * e.nelbo_se for e in estimates])
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 300) ** 0.5
    variance, variance_mc = (np.mean([getattr(e, k) ** 2 for e in estimates]) for k in ("nelbo_se", "nelbo_se_mc"))
    assert 0 < variance_mc < variance / 1.5  # the rows' own spread is a part of the one, not of the other


def test_ragged_rows_use_the_ratio_estimator(chain):
    ce_XML = chain.ce_table(chain.random_net())
    maskable_BL = np.arange(L) < np.random.default_rng(0).integers(0, L + 1, 120)[:, None]
    _, x0_BL = rows_of(chain, 120)
    options = dict(seed=3, num_draws=4, mask_id=MASK_ID, maskable_BL=maskable_BL)
    sums = row_sums(chain.ce_fn(ce_XML), x0_BL, np.arange(120), **options)
    e = summarise([sums])
    row_R, length_R = sums.weighted_ce_RK.mean(1), maskable_BL.sum(1)
    assert e.tokens == maskable_BL.sum() and e.rows == 120 and (row_R[length_R == 0] == 0).all()
    assert e.nelbo == pytest.approx(row_R.sum() / length_R.sum(), rel=1e-12)
    leave_out = (row_R.sum() - row_R) / (length_R.sum() - length_R)  # jackknife, an independent formula
    jackknife = math.sqrt(119 / 120 * ((leave_out - leave_out.mean()) ** 2).sum())
    assert e.nelbo_se == pytest.approx(jackknife, rel=0.03)


def test_oracle_estimate_is_minus_log_p_also_given_a_visible_prefix(chain):
    ce_fn = chain.ce_fn(chain.ce_table(chain.oracle))
    x_L = chain.x_XL[100]
    x0_BL = x_L.expand(20_000, L).contiguous()
    e = estimate(ce_fn, x0_BL, num_draws=10)
    assert abs(e.nelbo * L + chain.log_p_X[100].item()) < 4 * L * e.nelbo_se_mc < 0.1
    prefix_log_p = chain.log_p_X[(chain.x_XL[:, :2] == x_L[:2]).all(-1)].logsumexp(0)
    conditional = estimate(ce_fn, x0_BL, num_draws=10, maskable_BL=np.arange(L) >= 2 + np.zeros((20_000, 1)))
    expected = (prefix_log_p - chain.log_p_X[100]).item()
    assert abs(conditional.nelbo * 3 - expected) < 4 * 3 * conditional.nelbo_se_mc < 0.1


def test_a_difference_is_of_the_same_rows_and_masks(chain):
    """Two nearly equal nets: the paired interval covers their exact difference, and is far shorter than either's."""
    _, x0_BL = rows_of(chain, 100)
    which = (x0_BL * torch.tensor([V ** (L - 1 - i) for i in range(L)])).sum(-1)
    tables = [chain.ce_table(chain.random_net())]
    tables.append(tables[0] * (1 + 0.02 * torch.rand(tables[0].shape, generator=torch.Generator().manual_seed(3))))
    exact = [chain.exact_nelbo(table)[which].sum().item() / 100 / L for table in tables]
    covered, options = [], dict(num_draws=4, mask_id=MASK_ID, estimator="pairs")
    for seed in range(200):
        sums = [row_sums(chain.ce_fn(t), x0_BL, np.arange(100), seed=seed, **options) for t in tables]
        found = difference([sums[0]], [sums[1]])
        covered.append(abs(found.nelbo - (exact[0] - exact[1])) < 1.96 * found.nelbo_se_mc)
    assert abs(np.mean(covered) - 0.95) < 3 * (0.95 * 0.05 / 200) ** 0.5
    alone = summarise([sums[0]])
    assert found.nelbo == pytest.approx(alone.nelbo - summarise([sums[1]]).nelbo)
    assert found.nelbo_se < alone.nelbo_se / 10 and found.nelbo_se_mc < alone.nelbo_se_mc / 10
    with pytest.raises(ValueError, match="same rows"):
        difference([sums[0]], [dataclasses.replace(sums[1], row_index_R=np.arange(1, 101))])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_split_and_order_of_the_rows_gives_the_same_bits(chain, estimator):
    ce_fn = chain.ce_fn(chain.ce_table(chain.random_net()))
    _, x0_BL = rows_of(chain, 23)
    options = dict(seed=5, num_draws=8, mask_id=MASK_ID, estimator=estimator)
    whole = summarise([row_sums(ce_fn, x0_BL, np.arange(23), **options)])
    for world in (2, 3, 8):
        parts = [row_sums(ce_fn, x0_BL[r::world], np.arange(r, 23, world), **options) for r in range(world)]
        assert summarise(reversed(parts)) == whole
    filler = row_sums(ce_fn, x0_BL[:2], np.array([-1, -1]), **options)
    assert summarise([filler, row_sums(ce_fn, x0_BL, np.arange(23), **options)]) == whole


def test_draws_depend_on_seed_row_and_draw_alone(chain):
    _, x0_BL = rows_of(chain, 40)
    index_B = np.arange(2**32 - 20, 2**32 + 20)
    options = dict(seed=1, num_draws=4, mask_id=MASK_ID)
    whole = list(evaluation_draws(x0_BL, index_B, **options))
    for i in (0, 19, 20, 39):
        alone = list(evaluation_draws(x0_BL[i : i + 1], index_B[i : i + 1], **options))
        assert all(torch.equal(a.xt_BL[0], b.xt_BL[i]) for a, b in zip(alone, whole, strict=True))
    other_seed = list(evaluation_draws(x0_BL, index_B, **options | {"seed": 2}))
    assert len({tuple(c.is_masked_BL.flatten().tolist()) for c in whole + other_seed}) == 8


def test_draws_are_stratified_over_the_sizes_in_each_replicate():
    x0_BL, length = np.zeros((50, 10), np.int64), 10
    draws = list(evaluation_draws(x0_BL, np.arange(50), seed=0, num_draws=40, mask_id=1))
    sizes_KB = np.stack([c.is_masked_BL.sum(1).numpy() for c in draws])
    for half in (sizes_KB[:20], sizes_KB[20:]):
        assert all((np.bincount(half[:, b], minlength=11)[1:] == 2).all() for b in range(50))
    for c in draws:
        size_B = c.is_masked_BL.sum(1)
        row_of_N = c.rows_N // length
        assert torch.equal(c.weight_N, (length / size_B.double()).float()[row_of_N])
        assert torch.equal(c.weight_N, c.elbo_weight_N) and c.denominator == 1.0
        assert torch.equal(c.m_B, (size_B / length).float())


def test_replicates_are_independent(chain):
    ce_XML = chain.ce_table(chain.random_net())
    x0_BL = chain.x_XL[7].expand(20_000, L).contiguous()
    sums = row_sums(chain.ce_fn(ce_XML), x0_BL, np.arange(20_000), seed=2, num_draws=6, mask_id=MASK_ID)
    a_R, b_R = sums.weighted_ce_RK[:, :3].mean(1), sums.weighted_ce_RK[:, 3:].mean(1)
    assert abs(np.corrcoef(a_R, b_R)[0, 1]) < 4 / 20_000**0.5
    assert a_R.var() == pytest.approx(b_R.var(), rel=0.05)


def test_uniform_predictor_costs_log_v_in_every_draw_and_bin():
    x0_BL = np.zeros((7, 20), np.int64)
    e = estimate_nelbo(
        lambda c: torch.full((c.rows_N.numel(),), math.log(V)), [(x0_BL, np.arange(7), None)],
        seed=0, num_draws=40, mask_id=MASK_ID,
    )  # fmt: skip
    assert e.nelbo == pytest.approx(math.log(V), rel=1e-6) and max(e.nelbo_se, e.nelbo_se_mc) < 1e-6
    assert e.ce_by_mask_ratio == pytest.approx([math.log(V)] * 10, rel=1e-6)
    # each size 1..20 twice a row; bin k holds sizes 2k+1 and 2k+2
    assert e.num_by_mask_ratio == tuple(7 * 2 * (4 * k + 3) for k in range(10))
    assert (e.tokens, e.rows) == (140, 7)


def test_ce_curve_is_the_mean_over_masked_tokens():
    sums = RowSums(
        row_index_R=np.array([1, 0]),
        weighted_ce_RK=np.array([[20.0, 8.0], [3.0, 40.0]]),
        ce_RK=np.array([[2.0, 8.0], [0.15, 2.0]]),
        num_masked_RK=np.array([[1, 10], [1, 1]]),
        num_maskable_R=np.array([10, 20]),
    )
    e = summarise([sums])
    assert e.num_by_mask_ratio == (3, 0, 0, 0, 0, 0, 0, 0, 0, 10)
    assert e.ce_by_mask_ratio[0] == pytest.approx((20 / 10 + 3 / 20 + 40 / 20) / 3)
    assert e.ce_by_mask_ratio[9] == pytest.approx(8 / 10) and e.ce_by_mask_ratio[1:9] == (None,) * 8
    assert e.nelbo == pytest.approx((14 + 21.5) / 30)
    assert e.nelbo_se_mc == pytest.approx(math.sqrt(6**2 + 18.5**2) / 30)


def test_one_row_has_no_row_error(chain):
    _, x0_BL = rows_of(chain, 1)
    e = estimate(chain.ce_fn(chain.ce_table(chain.oracle)), x0_BL)
    assert math.isnan(e.nelbo_se) and math.isfinite(e.nelbo_se_mc) and math.isfinite(e.nelbo)


def test_units():
    assert bits_per_byte(math.log(2), 30, 10) == pytest.approx(3.0)
    assert perplexity(math.log(7)) == pytest.approx(7.0) and perplexity(1e4) == math.inf


def test_misuse_is_refused(chain):
    x0_BL = chain.x_XL[:2]
    for num_draws in (0, 1, 3):
        with pytest.raises(ValueError, match="num_draws"):
            next(evaluation_draws(x0_BL, np.arange(2), seed=0, num_draws=num_draws, mask_id=MASK_ID))
    for options in (dict(num_draws=6, estimator="pairs"), dict(num_draws=4, estimator="best")):
        with pytest.raises(ValueError, match="multiple of 4|unknown estimator"):
            next(evaluation_draws(x0_BL, np.arange(2), seed=0, mask_id=MASK_ID, **options))
    sums = row_sums(lambda c: torch.zeros(c.rows_N.numel()), x0_BL, np.arange(2), seed=0, num_draws=2, mask_id=MASK_ID)
    with pytest.raises(ValueError, match="twice"):
        summarise([sums, sums])
    with pytest.raises(ValueError, match="maskable"):
        summarise([dataclasses.replace(sums, num_maskable_R=np.zeros(2, np.int64))])
    with pytest.raises(ValueError, match="indices"):
        next(evaluation_draws(x0_BL, np.arange(3), seed=0, num_draws=2, mask_id=MASK_ID))

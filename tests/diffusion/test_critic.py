"""The critic's loss against enumeration, and what it must leave alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.corruption import assemble, corrupt
from dlm_scale.diffusion.corruption import replace as masked_rows
from dlm_scale.diffusion.critic import Critic, critic_loss, doubted_weights
from dlm_scale.diffusion.fill import FILL_ROWS, categorical, fill_uniforms, one_shot_fill
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.segments import Rows, row_bounds
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.ops import Segments

V, L = 2, 3


class Head:
    """Hidden states are the critic's logits, or log-probabilities."""

    def __init__(self, hidden_ND):
        self.hidden_ND = hidden_ND

    def over(self, hidden_ND):
        return Head(hidden_ND)

    def critic(self):
        return self.hidden_ND[:, 0]

    def log_probs(self):
        return self.hidden_ND


def network(logit_BL):
    """A critic whose logits are a table; looks at the text without masks, as one whose mask ratio is 0."""

    def hidden_fn(y_BL, *, m_B, rows_N, readout, attention=None):
        assert (m_B == 0).all() and y_BL.max() < V
        return readout(Head(logit_BL.flatten()[rows_N, None]))

    return hidden_fn


def every_outcome():
    """All (clean row, masks, fill) of a chain with exact one-shot fills, and the probability of each, mask sets of n
    positions as likely in all as those of any other n."""
    start, step = torch.tensor([0.7, 0.3]).double(), torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()
    x_XL = torch.tensor(list(itertools.product(range(V), repeat=L)))
    p_X = start[x_XL[:, 0]] * step[x_XL[:, :-1], x_XL[:, 1:]].prod(1)
    rows = []
    for (x, p), mask in itertools.product(zip(x_XL, p_X), itertools.product([False, True], repeat=L)):
        mask_L = torch.tensor(mask)
        if not mask_L.any():
            continue
        fits_X = ((x_XL == x) | mask_L).all(1) * p_X
        p_LV = torch.stack([torch.stack([(fits_X * (x_XL[:, i] == v)).sum() for v in range(V)]) for i in range(L)])
        p_LV = p_LV / fits_X.sum()
        chosen = p / {1: 9, 2: 9, 3: 3}[int(mask_L.sum())]
        for y in x_XL[((x_XL == x) | mask_L).all(1)]:
            rows.append((x, mask_L, y, chosen * p_LV[torch.arange(L), y][mask_L].prod()))
    x_BL, mask_BL, y_BL = (torch.stack(part) for part in list(zip(*rows))[:3])
    return x_BL, mask_BL, y_BL, torch.stack([row[3] for row in rows])


def batch_of(x_BL, mask_BL):
    bounds, ones = row_bounds(*x_BL.shape), torch.ones(len(x_BL))
    made = assemble(
        masked_rows(x_BL.numpy(), mask_BL.numpy(), bounds, V), weight_S=ones, elbo_weight_S=ones,
        m_S=mask_BL.float().mean(1).numpy(), t_S=np.ones(len(x_BL)), num_maskable_S=np.full(len(x_BL), L), denominator=1.0,
    )  # fmt: skip
    return replace(made, maskable_BL=torch.ones(x_BL.shape, dtype=torch.bool))


@pytest.mark.parametrize("scope", ["masked_only", "masked_and_visible"])
def test_the_best_logit_is_the_log_odds_of_an_error_given_the_filled_text(scope):
    """At the log-odds found by enumeration the expected gradient is 0, at every filled text and position; rows count as
    means over their scope."""
    x_BL, mask_BL, y_BL, p_B = every_outcome()
    assert float(p_B.sum()) == pytest.approx(1.0)
    share_BL = mask_BL / mask_BL.sum(1, keepdim=True) if scope == "masked_only" else torch.full_like(mask_BL.double(), 1 / L)
    code_B = (y_BL * V ** torch.arange(L)).sum(1)
    sums = lambda value_BL: torch.zeros(V**L, L).double().index_add(0, code_B, value_BL)  # noqa: E731
    mass_BL = p_B[:, None] * share_BL
    wrong, all_ = sums(mass_BL * (y_BL != x_BL)), sums(mass_BL)
    log_odds = (wrong / (all_ - wrong)).log()
    assert log_odds.isfinite().all() and log_odds.std() > 0.1
    corrupted = batch_of(x_BL, mask_BL)
    ids_N = y_BL.flatten()[corrupted.rows_N]
    for shift, is_best in ((0.0, True), (0.2, False)):
        logit_BL = (log_odds + shift)[code_B].requires_grad_()
        loss_sum, stats, logit_N = critic_loss(network(logit_BL), corrupted, ids_N, Critic(1.0, scope=scope))
        (gradient_BL,) = torch.autograd.grad(loss_sum, logit_BL)  # rows do not mix: weigh each row's by its probability
        gradient = sums(p_B[:, None] * gradient_BL)
        assert (float(gradient.abs().max()) < 1e-9) == is_best
        assert torch.equal(logit_N, logit_BL.detach().flatten()[corrupted.rows_N])
    scored = mask_BL if scope == "masked_only" else torch.ones_like(mask_BL)
    assert stats["critic_errors"].tolist() == [float((y_BL != x_BL).sum()), float(scored.sum())]
    assert stats["critic_bce"][1] == scored.sum() and stats["critic_bce"].dtype == torch.float64


@pytest.mark.parametrize("scope", ["masked_only", "masked_and_visible"])
def test_a_split_of_the_batch_changes_nothing_and_segments_are_rows(scope):
    """Three rows with prompts, of documents: a micro-batch each gives the sum; a segment counts as a row does."""
    rng = np.random.default_rng(0)
    maskable_BL = np.ones((3, 8), bool)
    maskable_BL[0, :3] = maskable_BL[2, 6:] = False
    bounds_S1 = np.array([0, 8, 12, 16, 24], np.int32)
    options = {"seed": 1, "schedule": SCHEDULES["linear"], "weighting": WEIGHTINGS["count"], "mask_id": V,
               "denominator": 1.0}  # fmt: skip
    x0_BL, t_S, critic = rng.integers(0, V, (3, 8)), np.array([0.8, 0.5, 0.9, 0.6]), Critic(1.0, scope=scope)

    def made(rows, t_S, bounds):
        rows = np.asarray(rows)
        given = Rows(x0_BL[rows], maskable_BL[rows], bounds)
        one = corrupt(given.ids_BL, rows, t_S, maskable_BL=given.maskable_BL,
                      attention=Segments(torch.from_numpy(bounds)), **options)  # fmt: skip
        uniform_BL = fill_uniforms(1, rows, 8)
        return replace(one, uniform_BL=uniform_BL, maskable_BL=torch.from_numpy(given.maskable_BL))

    def loss(corrupted, logit_BL):
        ids_N = (corrupted.uniform_BL.flatten()[corrupted.rows_N] * V).long()
        return critic_loss(network(logit_BL), corrupted, ids_N, critic)[0]

    logit_BL = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    whole = loss(made([0, 1, 2], t_S, bounds_S1), logit_BL)
    parts = [([0], t_S[:1], [0, 8]), ([1], t_S[1:3], [0, 4, 8]), ([2], t_S[3:], [0, 8])]
    alone = [loss(made(rows, t, np.array(bounds, np.int32)), logit_BL[rows]) for rows, t, bounds in parts]
    assert float(whole) == pytest.approx(float(sum(alone)), rel=1e-12) and float(whole) > 0
    first = made([0], t_S[:1], np.array([0, 8], np.int32))
    ids_N = (first.uniform_BL.flatten()[first.rows_N] * V).long()
    is_wrong = torch.zeros(8).index_copy(0, first.rows_N, (ids_N != first.target_N).float()).double()
    bce_L = torch.nn.functional.binary_cross_entropy_with_logits(logit_BL[0], is_wrong, reduction="none")
    scope_L = first.is_masked_BL[0] if scope == "masked_only" else first.maskable_BL[0]
    assert float(alone[0]) == pytest.approx(5 * float(bce_L[scope_L].mean()), rel=1e-12)  # five maskable positions


def test_doubted_weights_keep_the_mean_of_each_row():
    x_BL, mask_BL, _, _ = every_outcome()
    corrupted = batch_of(x_BL, mask_BL)
    corrupted = replace(corrupted, weight_N=1.0 + corrupted.segment_N.float())
    logit_N = 3 * torch.randn(len(corrupted.rows_N), generator=torch.Generator().manual_seed(0))
    logit_N[0] = -200.0
    weight_N = doubted_weights(corrupted, logit_N)
    for row in range(len(x_BL)):
        own = corrupted.segment_N == row
        doubt = logit_N[own].double().sigmoid().clamp(min=1e-30)
        torch.testing.assert_close(weight_N[own].double(), (1.0 + row) * doubt / doubt.mean(), rtol=1e-6, atol=1e-12)
    same = doubted_weights(corrupted, torch.full_like(logit_N, -500.0))
    torch.testing.assert_close(same, corrupted.weight_N)


def test_fills_are_drawn_from_the_law_by_the_batch_s_own_uniforms():
    p_V = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3]).double()
    uniform_N = fill_uniforms(3, np.arange(40), 500).flatten()
    ids_N = one_shot_fill(Head(p_V.log().expand(len(uniform_N), 5)), uniform_N)
    torch.testing.assert_close(torch.bincount(ids_N, minlength=5) / len(ids_N), p_V.float(), rtol=0, atol=0.012)
    assert len(uniform_N) > FILL_ROWS and ids_N.equal(categorical(p_V.expand(len(uniform_N), 5), uniform_N))
    assert categorical(p_V[None].expand(4, 5), torch.tensor([0.0, 0.19, 0.2, 0.71]).double()).tolist() == [1, 1, 2, 4]
    assert fill_uniforms(3, np.array([2**33 + 5]), 500).equal(fill_uniforms(3, np.array([7, 2**33 + 5]), 500)[1:])
    assert one_shot_fill(Head(torch.full((2, 5), torch.nan)), uniform_N[:2]).max() < 5
    assert one_shot_fill(Head(torch.zeros(0, 5)), uniform_N[:0]).shape == (0,)


def test_the_weight_rises_from_start_to_end_and_rests_between():
    critic = Critic(0.5, start=4, end=8, every=2)
    found = {step: critic.alpha_at(step) for step in range(11)}
    assert {step: alpha for step, alpha in found.items() if alpha} == {6: 0.25, 8: 0.5, 10: 0.5}
    assert Critic(0.5, start=3).alpha_at(2) == 0 and Critic(0.5, start=3).alpha_at(3) == 0.5
    assert Critic(0.0).alpha_at(9) == 0

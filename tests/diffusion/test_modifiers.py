"""Loss modifiers against their formulas, written out row by row in float64, with a table of logits for a network."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dlm_scale.diffusion.corruption import KIND_VISIBLE, corrupt
from dlm_scale.diffusion.fill import fill_uniforms
from dlm_scale.diffusion.fill import draw, filled
from dlm_scale.diffusion.modifiers import ENTROPY_WEIGHT, Modifiers, judge_factors, modified_weights
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS

V, B, L = 6, 8, 12
BOUNDS = np.concatenate([[row * L, row * L + 5] for row in range(B)] + [[B * L]]).astype(np.int32)


class Packed:
    cu_seqlens = torch.from_numpy(BOUNDS)

    def to(self, *_):
        return self


class TableHead:
    """The head contract over given logits: the hidden states are the logits themselves."""

    def __init__(self, hidden_ND):
        self.hidden_ND = hidden_ND

    def cross_entropy(self, target_N, weight_N, z_loss=0.0, label_smoothing=0.0):
        ce_N = F.cross_entropy(self.hidden_ND, target_N, reduction="none")
        smooth_N = F.cross_entropy(self.hidden_ND, target_N, reduction="none", label_smoothing=label_smoothing)
        return (weight_N.double() * smooth_N).sum(), ce_N, self.hidden_ND.argmax(-1) == target_N

    def wrong_entropy(self, target_N):
        found = [wrong_entropy(z, t) for z, t in zip(self.hidden_ND.tolist(), target_N.tolist())]
        return torch.tensor(found, dtype=torch.float64)

    def log_probs(self):
        return torch.log_softmax(self.hidden_ND, 1)

    def over(self, hidden_ND):
        return TableHead(hidden_ND)


def wrong_entropy(z: list[float], target: int) -> float:
    wrong = [math.exp(value) for i, value in enumerate(z) if i != target]
    return -sum(w / sum(wrong) * math.log(w / sum(wrong)) for w in wrong) / math.log(V - 1)


def network(logits_BLV):
    return lambda xt_BL, *, m_B, rows_N, readout, attention=None: readout(TableHead(logits_BLV.flatten(0, 1)[rows_N]))


def batch(rows=np.arange(B), weighting="simple", packed=False):
    x0_BL = np.random.default_rng(0).integers(0, V, (B, L))[rows]
    t_S = stratified_times(1, 0, 2 * B)[: len(rows) * (1 + packed)] if packed else stratified_times(1, 0, B)[rows]
    made = corrupt(x0_BL, np.asarray(rows, np.int64), t_S, seed=1, schedule=SCHEDULES["linear"],
                   weighting=WEIGHTINGS[weighting], mask_id=V, denominator=B * L,
                   attention=Packed() if packed else None)  # fmt: skip
    return dataclasses.replace(made, uniform_BL=fill_uniforms(1, np.asarray(rows), L))


def logits() -> torch.Tensor:
    return 2 * torch.randn(B, L, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def judge(ids_BL, attention):
    """Wrongness of a segment: the mean of its ids by V."""
    bounds = BOUNDS if attention is not None else np.arange(0, ids_BL.numel() + 1, L)
    flat = ids_BL.flatten().double() / V
    return torch.stack([flat[a:b].mean() for a, b in zip(bounds, bounds[1:])])


def expected_weights(corrupted, table, power, threshold, exponent, use_judge) -> tuple[list[float], list[float]]:
    """(weight of each masked token, entropy weight u of each segment that has one), segment by segment."""
    bounds = BOUNDS if corrupted.attention is not None else np.arange(0, B * L + 1, L)
    flat, weights, u_S = table.flatten(0, 1), corrupted.weight_N.double().clone(), []
    ids = corrupted.xt_BL.flatten().clone()
    for n, row in enumerate(corrupted.rows_N.tolist()):
        cdf = np.cumsum(torch.softmax(flat[row], 0).numpy())
        ids[row] = int(np.argmax(cdf > float(corrupted.uniform_BL.flatten()[row])))
    for a, b in zip(bounds, bounds[1:]):
        mine = [n for n, row in enumerate(corrupted.rows_N.tolist()) if a <= row < b]
        if not mine:
            continue
        ratio = len(mine) / (b - a)
        if power:
            factor = min(10.0, max(0.1, (1 / (ratio + 1e-8)) ** power))
            weights[mine] = factor * (b - a) / len(mine)
        if threshold:
            logits_n = flat[corrupted.rows_N[mine]].tolist()
            entropy = np.mean([wrong_entropy(z, int(corrupted.target_N[n])) for z, n in zip(logits_n, mine)])
            u_S.append(1 / (max(entropy, threshold) + 1e-8))
            weights[mine] *= u_S[-1]
        if use_judge:
            y = 1 - (-(ratio**4) + 2 * ratio**3 - 2 * ratio + 1)
            wrong = float(ids[a:b].double().mean()) / V
            weights[mine] *= min(10.0, max(0.1, (wrong / max(y, 1e-6)) ** exponent))
    return weights.tolist(), u_S


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("power, threshold, use_judge", [
    (0.5, 0.0, False), (2.0, 0.0, False), (0.0, 0.65, False), (0.0, 0.0, True), (0.5, 0.65, True),
])  # fmt: skip
def test_weights_and_gradient_are_the_formula(power, threshold, use_judge, packed):
    c, table = batch(packed=packed), logits().requires_grad_()
    modifiers, found = Modifiers(power, threshold, 1.5), {}

    def weigh(head, corrupted):
        weight_N, means = modified_weights(head, corrupted, modifiers, judge if use_judge else None)
        found.update(means)
        return weight_N

    loss_sum, stats = masked_diffusion(network(table), c, weigh=weigh, label_smoothing=0.1)
    expected, u_S = expected_weights(c, table.detach(), power, threshold, 1.5, use_judge)
    log_p = torch.log_softmax(table.flatten(0, 1)[c.rows_N], -1)
    ce_N = -log_p.gather(1, c.target_N[:, None])[:, 0]
    smooth_N = 0.9 * ce_N - 0.1 * log_p.mean(1)
    wanted = (torch.tensor(expected, dtype=torch.float64) * smooth_N).sum()
    assert loss_sum.item() == pytest.approx(wanted.item(), rel=1e-6)
    gradients = [torch.autograd.grad(each, table, retain_graph=True)[0] for each in (loss_sum, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert stats["ce_sum"].item() == pytest.approx(ce_N.sum().item(), rel=1e-12)  # unsmoothed, unweighted
    nelbo = (c.elbo_weight_N.double() * ce_N).sum().item()
    assert stats["nelbo_sum"].item() == pytest.approx(nelbo, rel=1e-12)
    if threshold:
        assert found[ENTROPY_WEIGHT].tolist() == pytest.approx([sum(u_S), len(u_S)], rel=1e-12)
        assert max(u_S) == pytest.approx(1 / threshold, rel=1e-7)  # the threshold acts on some, not on all
        assert min(u_S) < 0.95 * max(u_S)


def test_mask_ratio_compensation_is_the_mean_over_rows_of_row_means():
    c, table = batch(), logits()
    weigh = lambda head, corrupted: modified_weights(head, corrupted, Modifiers(0.5))[0]  # noqa: E731
    loss_sum, _ = masked_diffusion(network(table), c, weigh=weigh)
    clean_BL = torch.from_numpy(np.random.default_rng(0).integers(0, V, (B, L)))
    ce_BL = F.cross_entropy(table.flatten(0, 1), clean_BL.flatten(), reduction="none").view(B, L)
    rows = [(len(c.xt_BL[b]) / n) ** 0.5 * ce_BL[b][c.is_masked_BL[b]].mean().item()
            for b in range(B) if (n := int(c.is_masked_BL[b].sum()))]  # fmt: skip
    assert loss_sum.item() / c.denominator == pytest.approx(sum(rows) / B, rel=1e-6)


def test_factors_of_a_row_do_not_depend_on_its_batch():
    whole, table = batch(), logits()
    modifiers = Modifiers(0.5, 0.65, 1.0)
    head_of = lambda c, rows: TableHead(table[rows].flatten(0, 1)[c.rows_N])  # noqa: E731
    weights = lambda c, rows: modified_weights(head_of(c, rows), c, modifiers, judge)  # noqa: E731
    together, means = weights(whole, np.arange(B))
    parts = [weights(batch(rows), rows) for rows in np.arange(B).reshape(4, 2)]
    assert torch.equal(torch.cat([weight_N for weight_N, _ in parts]), together)
    for name, pair in means.items():
        torch.testing.assert_close(sum(found[name] for _, found in parts), pair, rtol=1e-14, atol=0)


def test_what_is_expected_of_a_share_of_masks():
    """y(0) = 0 and y(1) = 1, rising; a wrongness of y has factor 1, and the clamps hold."""
    ratio_S = torch.linspace(0, 1, 101, dtype=torch.float64)
    y_S = 1 - (-(ratio_S**4) + 2 * ratio_S**3 - 2 * ratio_S + 1)
    assert y_S[0] == 0 and y_S[-1] == 1 and bool((y_S.diff() > 0).all())
    torch.testing.assert_close(judge_factors(y_S[1:], ratio_S[1:], 2.0), torch.ones(100, dtype=torch.float64))
    edge = judge_factors(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 1.0]), 1.0)
    assert edge.tolist() == pytest.approx([10.0, 0.1, 0.5])


def test_a_judge_reads_the_visible_ids_and_fills_of_the_masked():
    c, table = batch(), logits()
    made = filled(c, draw(TableHead(table.flatten(0, 1)[c.rows_N]), c))
    assert torch.equal(made[~c.is_masked_BL], c.xt_BL[~c.is_masked_BL]) and made.max() < V
    some = torch.arange(len(c.rows_N)) % 3 == 0  # rows that carry loss and are not masked keep what they have
    mixed = dataclasses.replace(c, kind_N=c.kind_N.masked_fill(some, KIND_VISIBLE))
    kept = filled(mixed, draw(TableHead(table.flatten(0, 1)[c.rows_N]), mixed)).flatten()[c.rows_N]
    assert bool((kept[some] == V).all()) and torch.equal(kept[~some], made.flatten()[c.rows_N][~some])

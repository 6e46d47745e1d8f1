"""Invariant I13 and the objective's sums, with a table of logits in place of a network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.objective import cross_entropy_by_bin, masked_diffusion, mean_stat
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS

V, B, L = 6, 8, 12


class TableHead:
    """The head contract of docs/design.md over given logits."""

    def __init__(self, logits_NV):
        self.logits_NV = logits_NV

    def cross_entropy(self, target_N, weight_N, z_loss=0.0, label_smoothing=0.0):
        ce_N = F.cross_entropy(self.logits_NV, target_N, reduction="none")
        smooth_N = F.cross_entropy(self.logits_NV, target_N, reduction="none", label_smoothing=label_smoothing)
        loss_sum = (weight_N * smooth_N).sum() + z_loss * torch.logsumexp(self.logits_NV, -1).square().sum()
        return loss_sum, ce_N, self.logits_NV.argmax(-1) == target_N


def network(logits_BLV):
    def hidden_fn(xt_BL, *, m_B, rows_N, readout, attention=None):
        assert m_B.shape == xt_BL.shape[:1]
        return readout(TableHead(logits_BLV.flatten(0, 1)[rows_N]))

    return hidden_fn


def batch(rows, weighting="count", t_B=None):
    x0_BL = np.random.default_rng(0).integers(0, V, (B, L))[rows]
    t_B = stratified_times(1, 0, B, rows) if t_B is None else t_B
    return corrupt(
        x0_BL, np.asarray(rows, np.int64), t_B, seed=1, schedule=SCHEDULES["linear"], weighting=WEIGHTINGS[weighting],
        mask_id=V, denominator=B * L,
    )  # fmt: skip


def logits() -> torch.Tensor:
    return torch.randn(B, L, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradient_is_weight_times_softmax_minus_one_hot_on_masked_rows_only(weighting):
    table, c = logits(), batch(np.arange(B), weighting)
    loss_sum, _ = masked_diffusion(network(table), c)
    (loss_sum / c.denominator).backward()
    expected = torch.zeros(B * L, V, dtype=torch.float64)
    residual = torch.softmax(table.detach().flatten(0, 1)[c.rows_N], -1) - F.one_hot(c.target_N, V)
    expected[c.rows_N] = c.weight_N.double()[:, None] * residual / (B * L)
    torch.testing.assert_close(table.grad.flatten(0, 1), expected, rtol=1e-12, atol=0)
    assert table.grad[~c.is_masked_BL].abs().max() == 0 and 0 < c.rows_N.numel() < B * L


def test_stats_are_plain_sums_over_masked_tokens():
    table, c = logits(), batch(np.arange(B), "simple")
    loss_sum, stats = masked_diffusion(network(table), c)
    log_prob = torch.log_softmax(table.detach(), -1).flatten(0, 1)[c.rows_N]
    ce_N = -log_prob.gather(1, c.target_N[:, None])[:, 0]
    assert set(stats) == {"nelbo_sum", "ce_sum", "num_masked", "num_correct", "ce_sum_bins", "num_masked_bins"}
    assert all(s.dtype == torch.float64 and not s.requires_grad for s in stats.values())
    assert {name: len(s) for name, s in stats.items() if s.ndim} == {"ce_sum_bins": 10, "num_masked_bins": 10}
    bin_N = np.ceil(10 * c.m_B.double().numpy()[c.rows_N // L]).astype(int) - 1
    np.testing.assert_allclose(stats["ce_sum_bins"], np.bincount(bin_N, ce_N.numpy(), 10), rtol=1e-12)
    assert stats["num_masked_bins"].tolist() == np.bincount(bin_N, minlength=10).tolist()
    assert stats["ce_sum"].item() == pytest.approx(ce_N.sum().item(), rel=1e-12) == loss_sum.item()
    assert stats["nelbo_sum"].item() == pytest.approx((c.elbo_weight_N.double() * ce_N).sum().item(), rel=1e-12)
    assert stats["num_masked"].item() == c.rows_N.numel()
    assert stats["num_correct"].item() == (log_prob.argmax(-1) == c.target_N).sum().item() > 0


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole(micro_batch_size):
    whole_table, table = logits(), logits()
    whole_loss, whole_stats = masked_diffusion(network(whole_table), batch(np.arange(B)))
    whole_loss.backward()
    total = 0.0
    for rows in np.arange(B).reshape(-1, micro_batch_size):
        loss_sum, stats = masked_diffusion(network(table[torch.from_numpy(rows)]), batch(rows))
        loss_sum.backward()
        total += loss_sum.item()
        whole_stats = {k: v - stats[k] for k, v in whole_stats.items()}
    assert total == pytest.approx(whole_loss.item(), rel=1e-12)
    torch.testing.assert_close(table.grad, whole_table.grad, rtol=1e-12, atol=0)
    assert all(v.abs().max() < 1e-9 for v in whole_stats.values())


def test_a_batch_without_masked_tokens_still_has_a_gradient_of_zero():
    table, c = logits(), batch(np.arange(B), t_B=np.full(B, 1e-12))
    loss_sum, stats = masked_diffusion(network(table), c)
    loss_sum.backward()
    assert loss_sum.item() == 0 and table.grad.abs().max() == 0
    assert all(not v.any() for v in stats.values())


def test_z_loss_is_in_the_loss_and_not_in_the_statistics():
    table, c = logits(), batch(np.arange(B))
    loss_sum, stats = masked_diffusion(network(table), c)
    with_z, same = masked_diffusion(network(table), c, z_loss=0.25)
    lse_N = torch.logsumexp(table.flatten(0, 1)[c.rows_N], -1)
    assert (with_z - loss_sum).item() == pytest.approx(0.25 * lse_N.square().sum().item(), rel=1e-12)
    assert all(torch.equal(stats[name], same[name]) for name in stats)


def test_cross_entropy_by_bin():
    ce_N, m_N = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.001, 0.25, 0.2500001, 1.0])
    assert cross_entropy_by_bin(ce_N, m_N, 4).tolist() == [[3.0, 4.0, 0.0, 8.0], [2.0, 1.0, 0.0, 1.0]]
    assert cross_entropy_by_bin(ce_N[:0], m_N[:0], 4).tolist() == [[0.0] * 4] * 2


def test_other_weights_and_added_terms():
    """`weigh` replaces the weights of the loss alone; a term adds its loss and its statistics."""
    table, c = logits(), batch(np.arange(B))
    plain_sum, plain = masked_diffusion(network(table), c)
    term = lambda head, corrupted: (head.logits_NV.sum(), {"extra": mean_stat(corrupted.weight_N)})  # noqa: E731
    loss_sum, stats = masked_diffusion(network(table), c, weigh=lambda head, _: 2 * c.weight_N, terms=[term])
    assert loss_sum.item() == pytest.approx(2 * plain_sum.item() + table.flatten(0, 1)[c.rows_N].sum().item(), rel=1e-12)
    assert stats.pop("extra").tolist() == [c.weight_N.double().sum().item(), c.rows_N.numel()]
    assert stats.keys() == plain.keys() and all(torch.equal(stats[name], plain[name]) for name in plain)


def test_statistics_count_masked_tokens_alone():
    """Rows of another kind carry loss, and nothing of them is in the statistics."""
    table, c = logits(), batch(np.arange(B))
    visible = torch.arange(c.rows_N.numel()) % 3 == 0
    kinds = c.kind_N.masked_fill(visible, 3)
    mixed = replace(c, kind_N=kinds, elbo_weight_N=c.elbo_weight_N.masked_fill(visible, 0.0))
    few = replace(c, rows_N=c.rows_N[~visible], target_N=c.target_N[~visible], weight_N=c.weight_N[~visible],
                  elbo_weight_N=c.elbo_weight_N[~visible], kind_N=c.kind_N[~visible])  # fmt: skip
    (whole_sum, whole), (few_sum, alone) = (masked_diffusion(network(table), each) for each in (mixed, few))
    assert whole_sum > few_sum
    for name in alone:
        torch.testing.assert_close(whole[name], alone[name], rtol=1e-12, atol=0)

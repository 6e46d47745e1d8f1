"""Replaced tokens: which, by what, and what the two objectives of them say."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.corruption import KIND_SUBSTITUTED, KIND_VISIBLE
from dlm_scale.diffusion.labels import sequence_scoring, token_classification
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.substitution import other_ids, replaceable_ids, substitute

SIZE, MASK, L = 12, 11, 32
IDS = replaceable_ids(SIZE, (MASK, 4, 0))  # 4: never predicted; 0: the separator


def made(num_rows=8, t=0.5, bounds=None, **options):
    x0_BL = np.random.default_rng(1).integers(0, MASK, (num_rows, L))
    x0_BL[x0_BL == 4] = 5
    attention = None if bounds is None else SimpleNamespace(cu_seqlens=torch.from_numpy(bounds), to=lambda _: attention)
    t_S = np.full(num_rows if bounds is None else len(bounds) - 1, t)
    c = substitute(x0_BL, np.arange(num_rows), t_S, seed=3, schedule=SCHEDULES["linear"], ids_K=IDS, mask_id=MASK,
                   denominator=1.0, attention=attention, **options)  # fmt: skip
    return x0_BL, c


def test_each_position_is_replaced_with_probability_m_by_another_id_of_text():
    x0_BL, c = made(1000, 0.3)
    is_other_BL = (c.xt_BL != torch.from_numpy(x0_BL)).numpy()
    assert np.array_equal(is_other_BL, c.is_masked_BL.numpy())  # never its own
    assert abs(is_other_BL.mean() - 0.3) < 4 * math.sqrt(0.21 / is_other_BL.size)
    assert set(np.unique(c.xt_BL.numpy()[is_other_BL])) == set(IDS.tolist())
    assert c.kind_N.tolist() == np.where(is_other_BL, KIND_SUBSTITUTED, KIND_VISIBLE).flatten().tolist()
    assert np.array_equal(c.target_N.numpy(), x0_BL.flatten()) and len(c.rows_N) == x0_BL.size


def test_the_other_id_is_uniform(chi_square_p):
    for x0, others in ((7, [i for i in IDS if i != 7]), (0, list(IDS)), (10, [i for i in IDS if i != 10])):
        word_BL = np.random.default_rng(0).integers(0, 2**32, (100, 200), dtype=np.uint32)
        found = np.bincount(other_ids(np.full((100, 200), x0), word_BL, IDS).flatten(), minlength=SIZE)
        assert found.sum() == found[others].sum()
        assert chi_square_p(found[others], np.full(len(others), 20_000 / len(others))) > 1e-3
    edge = np.array([[0, 2**32 - 1]], dtype=np.uint32)
    assert other_ids(np.array([[IDS[0], IDS[-1]]]), edge, IDS).tolist() == [[IDS[1], IDS[-2]]]


def test_noise_is_a_function_of_sample_and_column_and_of_nothing_else():
    x0_BL, c = made()
    part = substitute(x0_BL[5:7], np.arange(5, 7), np.full(2, 0.5), seed=3, schedule=SCHEDULES["linear"], ids_K=IDS,
                      mask_id=MASK, denominator=1.0)  # fmt: skip
    assert torch.equal(part.xt_BL, c.xt_BL[5:7])


class Head:
    def __init__(self, values):
        self.labels = self.score = lambda: values


def test_objectives_are_their_formulas():
    """Packed documents, some positions without loss; cross-entropy of two classes, and of the segment's share."""
    maskable_BL = np.arange(L) < np.array([[L], [L - 3]])
    bounds = np.array([0, 10, 32, 61, 64], np.int32)  # the last segment is padding
    x0_BL, c = made(2, 0.4, bounds, maskable_BL=maskable_BL)
    generator = torch.Generator().manual_seed(0)
    logits_N2 = torch.randn(2 * L, 2, generator=generator, dtype=torch.float64).requires_grad_()
    score_N = torch.randn(2 * L, generator=generator, dtype=torch.float64).requires_grad_()
    run = lambda values: lambda xt_BL, *, m_B, rows_N, readout, attention: readout(Head(values[rows_N]))  # noqa: E731
    label_N = (c.xt_BL.flatten().numpy() != x0_BL.flatten()).astype(int)
    loss, stats = token_classification(run(logits_N2), c)
    p_N = torch.softmax(logits_N2.detach(), 1).numpy()[np.arange(2 * L), label_N]
    kept_N = maskable_BL.flatten()
    assert loss.item() == pytest.approx(-np.log(p_N[kept_N]).sum(), rel=1e-6)
    right = (logits_N2.argmax(1).numpy() == label_N)[kept_N].sum()
    assert stats["label_accuracy"].tolist() == [right, kept_N.sum()] and stats["num_masked"] == 0
    loss.backward()
    assert not logits_N2.grad[~kept_N].any() and logits_N2.grad[kept_N].all()

    loss, stats = sequence_scoring(run(score_N), c)
    wanted, errors = 0.0, []
    for a, b in zip(bounds[:3], bounds[1:4]):
        share = label_N[a:b].sum() / kept_N[a:b].sum()
        p = 1 / (1 + math.exp(-score_N[a:b].mean().item()))
        wanted -= kept_N[a:b].sum() * (share * math.log(p) + (1 - share) * math.log(1 - p))
        errors.append(abs(p - share))
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert stats["score_error"].tolist() == pytest.approx([sum(errors), 3], rel=1e-6)
    assert 0 < label_N.sum() < len(label_N)

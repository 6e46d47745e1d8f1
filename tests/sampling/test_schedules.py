"""How many and when: reveal times against closed forms."""

import math
from dataclasses import replace

import pytest
import torch

from dlm_scale.diffusion.schedule import SCHEDULES as NOISE_SCHEDULES
from dlm_scale.sampling import SAMPLERS, Sampler
from dlm_scale.sampling.schedules import REVISERS, SCHEDULES, timetable, waiting_step

CPU = torch.device("cpu")


def grid(count):
    """`count` evenly spread uniforms: an inverse CDF maps them to exact proportions, up to 1/count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("mask_ratio", NOISE_SCHEDULES)
def test_reveal_times_follow_the_mask_ratio(mask_ratio):
    table = timetable(Sampler(schedule="independent", mask_ratio=mask_ratio), 16, CPU)
    step_N = waiting_step(table.log_masked_T1, torch.zeros(100_000, dtype=torch.long), grid(100_000))
    share_T = torch.bincount(step_N, minlength=17)[1:] / 100_000
    assert table.m_T1[0] == 1 and table.m_T1[-1] == 0
    assert share_T.tolist() == pytest.approx((table.m_T1[:-1] - table.m_T1[1:]).tolist(), abs=2e-5)


@pytest.mark.parametrize("reviser", ["cap", "rescale"])
def test_masking_again_keeps_the_share_of_masked_positions(reviser):
    table = timetable(Sampler(schedule="independent", reviser=reviser, eta=0.3, mask_ratio="cosine"), 20, CPU)
    masked = 1.0
    for step in range(1, 21):
        stays, kept = (waits(log_T1, step) for log_T1 in (table.log_masked_T1, table.log_kept_T1))
        masked = masked * stays + (1 - masked) * (1 - kept)
        assert masked == pytest.approx(float(table.m_T1[step]), abs=2e-4)
    assert float(table.log_kept_T1[-1]) < -0.1  # something is masked again at all


def waits(log_survival_T1, step, count=10_000):
    """Share of those waiting since step - 1 that see no event at `step`."""
    since_N = torch.full((count,), step - 1)
    return float((waiting_step(log_survival_T1, since_N, grid(count)) > step).double().mean())


def test_waiting_ends_at_the_last_step_or_never():
    extreme_N = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    table = timetable(Sampler(schedule="independent", reviser="cap", eta=0.5), 8, CPU)
    # at step 6 of 8 eta exceeds (1/4)/(5/8), the largest probability that keeps the marginals: all are revealed there
    assert waiting_step(table.log_masked_T1, torch.tensor([0, 0]), extreme_N).tolist() == [6, 1]
    assert waiting_step(table.log_masked_T1, torch.tensor([7, 7]), extreme_N).tolist() == [8, 8]
    never = timetable(Sampler(schedule="independent"), 8, CPU).log_kept_T1
    assert waiting_step(never, torch.tensor([3, 3]), extreme_N).tolist() == [9, 9]


@pytest.mark.parametrize("mask_ratio", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 3, 7, 50, 1000])
def test_counts_are_rounded_cumulatively_in_each_row(mask_ratio, num_steps):
    is_masked_BL = torch.arange(50) < torch.tensor([[50], [33], [7], [1], [0]])
    uniform_BL = torch.rand(5, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = timetable(Sampler(mask_ratio=mask_ratio), num_steps, CPU)
    due_BL = SCHEDULES["even"](is_masked_BL, uniform_BL, table)
    assert (due_BL > 0).equal(is_masked_BL) and int(due_BL.max()) <= num_steps
    for step in range(num_steps + 1):
        open_B = (due_BL > step).sum(1)
        assert ((open_B - table.m_T1[step] * is_masked_BL.sum(1)).abs() <= 0.5 + 1e-9).all()
    if mask_ratio == "linear" and num_steps >= 50:
        assert all(row[row > 0].unique().numel() == (row > 0).sum() for row in due_BL)


def test_slots_are_in_random_order():
    """Each of 6 positions is first, and last, equally often."""
    uniform_BL = torch.rand(60_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    due_BL = SCHEDULES["even"](torch.ones(60_000, 6, dtype=torch.bool), uniform_BL, timetable(Sampler(), 6, CPU))
    for step in (1, 6):
        assert ((due_BL == step).double().mean(0) - 1 / 6).abs().max() < 0.006


def test_revisers_need_a_schedule_that_knows_positions():
    with pytest.raises(ValueError, match="schedule 'independent'"):
        Sampler(reviser="cap", eta=0.1)
    with pytest.raises(ValueError, match="eta"):
        Sampler(schedule="independent", reviser="cap", eta=1.0)
    with pytest.raises(ValueError, match="eta"):
        Sampler(schedule="independent", reviser="confidence", eta=1.1)
    with pytest.raises(ValueError, match="belong together"):
        Sampler(schedule="independent", reviser="loop", eta=0.1)
    assert set(REVISERS) == {"none", "cap", "rescale", "confidence", "loop", "critic"}


def test_the_loop_falls_stands_still_and_falls_again():
    """ReMDM-loop: nine tenths are revealed by time .55, then the share of masks stands until .05."""
    table = timetable(replace(SAMPLERS["remdm_loop"], eta=0.05), 40, CPU)
    time_T1 = 1 - torch.arange(41, dtype=torch.float64) / 40
    assert table.m_T1[(time_T1 <= 0.55 + 1e-9) & (time_T1 >= 0.05)].tolist() == pytest.approx([0.1] * 21)
    assert float(table.m_T1[9]) == pytest.approx(1 - 0.9 * 9 / 18) and float(table.m_T1[39]) == pytest.approx(0.05)
    masked, undone = 1.0, []
    for step in range(1, 41):
        stays, kept = (waits(log_T1, step) for log_T1 in (table.log_masked_T1, table.log_kept_T1))
        masked = masked * stays + (1 - masked) * (1 - kept)
        assert masked == pytest.approx(float(table.m_T1[step]), abs=4e-4)
        undone.append(1 - kept)
    on_plateau = [step for step in range(1, 41) if table.m_T1[step] == table.m_T1[step - 1]]
    assert len(on_plateau) == 20
    expected = [0.05 if step in on_plateau else 0.0 for step in range(1, 41)]
    assert undone == pytest.approx(expected, abs=2e-4)


def test_the_least_probable_share_the_most_of_the_revision():
    confidence_BL = torch.tensor([[0.2, 0.9, 0.5, 0.0], [0.3, 0.3, 0.0, 0.0]], dtype=torch.float64)
    is_revealed_BL = torch.tensor([[True, True, True, False], [True, True, False, False]])
    share_BL = REVISERS["confidence"].share(confidence_BL, is_revealed_BL)
    weights = [math.exp(-0.2), math.exp(-0.9), math.exp(-0.5), 0]
    assert share_BL[0].tolist() == pytest.approx([weight / sum(weights) for weight in weights])
    assert share_BL[1].tolist() == [0.5, 0.5, 0, 0]
    nothing_BL = REVISERS["confidence"].share(confidence_BL, torch.zeros_like(is_revealed_BL))
    assert nothing_BL.eq(0).all()
    table = timetable(SAMPLERS["remdm_conf"], 8, CPU)
    assert table.log_kept_T1.eq(0).all() and table.sigma_T[-1] == 0
    assert table.sigma_T.tolist() == pytest.approx([1, 1, 1, 1, 0.75, 0.4, 1 / 6, 0])  # min(1, m_b / (1 - m_a))

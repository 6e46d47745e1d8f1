"""Invariant I1: end points, monotone, w = m'/m against autograd, the inverse, and the integral of w * m."""

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.schedule import SCHEDULES

ENDS = {"loglinear": (0.0, 0.999), "geometric": (-np.expm1(-1e-4), -np.expm1(-20.0))}
# the survival probabilities of the papers, which the closed forms must equal where nothing cancels
ALPHA = {
    "linear": lambda t: 1 - t,
    "loglinear": lambda t: 1 - (1 - 1e-3) * t,
    "poly": lambda t: 1 - t**2,
    "cosine": lambda t: 1 - torch.cos(torch.pi / 2 * (1 - t)),
    "cosine2": lambda t: torch.cos(torch.pi / 2 * t) ** 2,
    "cos": lambda t: torch.cos(torch.pi / 2 * t),
    "geometric": lambda t: torch.exp(-(1e-4 ** (1 - t)) * 20.0**t),
}
pytestmark = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=lambda s: s.name)


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_names_and_formulas_are_the_papers(schedule):
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    assert SCHEDULES[schedule.name] is schedule and set(SCHEDULES) == set(ALPHA)
    torch.testing.assert_close(schedule.mask_ratio(t), 1 - ALPHA[schedule.name](t), rtol=0, atol=1e-14)
    assert schedule.is_linear == (schedule.name == "linear")


def test_end_points(schedule):
    start, end = ENDS.get(schedule.name, (0.0, 1.0))
    ends = schedule.mask_ratio(f64(0.0, 1.0)).tolist()
    if schedule.name == "geometric":
        assert ends == pytest.approx([start, end], rel=1e-13)
    else:
        assert ends == [start, end]


def test_strictly_increasing_and_within_the_unit_interval(schedule):
    m = schedule.mask_ratio(torch.linspace(0, 1, 10_001, dtype=torch.float64))
    assert (m.diff() > 0).all() and m.min() >= 0 and m.max() <= 1


def test_weight_is_the_logarithmic_derivative(schedule):
    t = torch.cat([torch.logspace(-9, -1, 33, dtype=torch.float64), torch.linspace(0.1, 0.999, 60).double()])
    t.requires_grad_()
    (slope,) = torch.autograd.grad(schedule.mask_ratio(t).sum(), t)
    torch.testing.assert_close(schedule.weight(t) * schedule.mask_ratio(t), slope, rtol=1e-7, atol=0)


def test_time_inverts_the_mask_ratio(schedule):
    t = torch.cat([torch.logspace(-6, -1, 20, dtype=torch.float64), torch.linspace(0.1, 0.99, 60).double()])
    torch.testing.assert_close(schedule.time(schedule.mask_ratio(t)), t, rtol=1e-9, atol=0)


def test_weight_times_ratio_integrates_to_the_range_of_the_ratio(schedule):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = torch.from_numpy((nodes + 1) / 2)
    integral = (torch.from_numpy(weights / 2) * schedule.weight(t) * schedule.mask_ratio(t)).sum().item()
    start, end = schedule.mask_ratio(f64(0.0, 1.0)).tolist()
    assert integral == pytest.approx(end - start, abs=1e-12)


def test_small_times_give_finite_numbers_without_cancellation(schedule):
    t = f64(1e-300, 1e-30, 1e-12, 1e-8)
    mass = schedule.weight(t) * schedule.mask_ratio(t)
    assert torch.isfinite(mass[1:]).all() and (schedule.weight(t) > 0).all()
    if schedule.name in ("linear", "loglinear", "cosine"):
        assert (schedule.mask_ratio(t) > 0).all()


def test_a_value_does_not_depend_on_its_place_in_the_tensor(schedule):
    t = torch.linspace(0.001, 1, 67, dtype=torch.float64)
    for fn in (schedule.mask_ratio, schedule.weight):
        assert torch.equal(fn(t), torch.cat([fn(t[i : i + 1]) for i in range(67)]))
        assert torch.equal(fn(t), torch.cat([fn(t[:5]), fn(t[5:])]))

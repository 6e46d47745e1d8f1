"""Gaussian diffusion against closed forms: schedules, conversions, reverse steps, noise, and the bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.gaussian import (
    SCHEDULES,
    Process,
    alpha_bars,
    eps_from_v,
    eps_from_x0,
    guided,
    noised,
    reverse_step,
    reverse_variance,
    row_noise,
    x0_from_eps,
    x0_from_v,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [2, 5, 100, 1000])
def test_schedules_fall_from_clean_to_noise(schedule, num_steps):
    abar = alpha_bars(schedule, num_steps)
    assert abar.shape == (num_steps + 1,) and (abar.diff() < 0).all()
    assert abar[0] == pytest.approx(0.99 if schedule == "sqrt" else 1.0) and 0 < abar[-1] < 0.01
    assert (abar[1:] / abar[:-1]).min() >= 0.001 - 1e-12


def test_schedules_have_their_closed_forms():
    t = np.arange(1000) / 1000  # the last step is clipped
    cosine = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bars("cosine", 1000)[:-1], cosine, rtol=1e-9)
    np.testing.assert_allclose(alpha_bars("sqrt", 1000)[:-1], 1 - np.sqrt(t + 1e-4), rtol=1e-9)
    np.testing.assert_allclose(alpha_bars("linear", 1000)[1:], np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    exponent = 1000 * (1e-4 * t + (2e-2 - 1e-4) * t**2 / 2)  # the limit of many steps
    np.testing.assert_allclose(alpha_bars("linear", 200_000)[:-1][::200], np.exp(-exponent), rtol=1e-3)


def parts(num=64, dim=5):
    generator = torch.Generator().manual_seed(0)
    x0, eps, guess = torch.randn(3, num, dim, dtype=torch.float64, generator=generator)
    abar = torch.rand(num, 1, dtype=torch.float64, generator=generator) * 0.98 + 0.01
    return x0, eps, guess, abar, abar.sqrt(), (1 - abar).sqrt()


def test_predictions_are_one_another():
    x0, eps, guess, abar, alpha, sigma = parts()
    z, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
    torch.testing.assert_close(x0_from_v(z, v, alpha, sigma), x0)
    torch.testing.assert_close(eps_from_v(z, v, alpha, sigma), eps)
    torch.testing.assert_close(x0_from_eps(z, eps, alpha, sigma), x0)
    torch.testing.assert_close(eps_from_x0(z, x0, alpha, sigma), eps)
    snr = (abar / (1 - abar))[:, 0]
    error = (x0_from_v(z, guess, alpha, sigma) - x0).square().sum(1)
    torch.testing.assert_close((v - guess).square().sum(1), (snr + 1) * error)
    assert guided(x0, guess, 0.0).equal(x0) and guided(x0, x0, 3.0).allclose(x0)


def test_error_factors_turn_each_error_into_that_of_x0():
    process = {name: Process("cosine", 50, name, 5) for name in ("x0_softmax", "v", "eps")}
    x0, eps, guess, *_ = parts()
    for step in (2, 25, 49):
        alpha, sigma = process["v"].scales(torch.tensor(step), x0)
        z = alpha * x0 + sigma * eps
        true = {"v": alpha * eps - sigma * x0, "eps": eps, "x0_softmax": x0}
        for name, own in process.items():
            error = (own.x0(z, guess, alpha, sigma) - x0).square().sum(1)
            raw = (true[name] - guess).square().sum(1)
            torch.testing.assert_close(error, raw * own.error_factor()[step])


def test_eta_one_is_the_posterior_of_ddpm_and_eta_zero_adds_nothing():
    abar = alpha_bars("cosine", 10)
    x0, eps, _, *_ = parts()
    for t, s in ((10, 9), (7, 3), (2, 1)):
        beta = 1 - abar[t] / abar[s]
        posterior = beta * (1 - abar[s]) / (1 - abar[t])
        assert reverse_variance(abar[t], abar[s], 1.0) == pytest.approx(float(posterior), rel=1e-12)
        z = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
        mean = (abar[s].sqrt() * beta * x0 + (abar[t] / abar[s]).sqrt() * (1 - abar[s]) * z) / (1 - abar[t])
        torch.testing.assert_close(reverse_step(z, x0, abar[t], abar[s], 1.0, torch.zeros_like(z)), mean)
        exact = abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps
        torch.testing.assert_close(reverse_step(z, x0, abar[t], abar[s], 0.0, torch.full_like(z, 7.0)), exact)


def test_noise_is_normal_and_knows_its_row_and_column_alone():
    noise = row_noise(3, np.arange(400), 16, 6)
    assert noise.shape == (400, 16, 6) and abs(float(noise.mean())) < 0.02 and abs(float(noise.var()) - 1) < 0.02
    assert noise.flatten().unique().numel() > 0.999 * noise.numel()
    assert row_noise(3, np.array([7, 2]), 16, 6).equal(noise[[7, 2]])
    assert row_noise(3, np.array([7]), 9, 6).equal(noise[7:8, :9])


def test_what_is_given_is_clean():
    x_BL, maskable_BL = np.tile(np.arange(6), (4000, 1)), np.tile(np.arange(6) > 1, (4000, 1))
    process = Process("cosine", 10, "v", 4)
    step_B = process.steps((np.arange(4000) + 0.5) / 4000)
    corrupted = noised(x_BL, np.arange(4000), step_B, seed=1, process=process, mask_id=9, denominator=None, maskable_BL=maskable_BL)  # fmt: skip
    assert (corrupted.xt_BL == torch.arange(6)).all() and not corrupted.is_masked_BL[:, :2].any()
    assert not (corrupted.rows_N % 6 < 2).any() and corrupted.rows_N.numel() == 4 * 4000
    assert abs(float(corrupted.reads_guess_B.float().mean()) - 0.5) < 0.03
    assert process.step_of(corrupted.t_B).bincount().tolist() == [0] + [400] * 10


def test_the_bound_is_one_and_tight_for_an_exact_network():
    """V=2, L=1, E=1, x = +-1: -log p by quadrature over chains' last states is bounded, and nearly reached at T = 200."""
    law = torch.tensor([0.8, 0.2], dtype=torch.float64)
    vectors = torch.tensor([1.0, -1.0], dtype=torch.float64)
    gaps = []
    for num_steps, max_snr in ((5, math.inf), (200, math.inf), (200, 50.0)):
        process = Process("cosine", num_steps, "x0_softmax", 1, max_snr=max_snr)
        nodes, shares = np.polynomial.hermite_e.hermegauss(60)
        eps, share = torch.from_numpy(nodes), torch.from_numpy(shares / shares.sum())
        total = 0.0
        for token, probability in enumerate(law):
            bound = float(process.prior(vectors[token : token + 1, None])[0])
            for step in range(process.first, num_steps + 1):
                alpha, sigma = process.scales(torch.tensor(step), eps)
                z = alpha * vectors[token] + sigma * eps
                posterior = torch.softmax(law.log() - (z[:, None] - alpha * vectors) ** 2 / (2 * sigma**2), dim=1)
                if step == process.first:
                    bound -= float((share * posterior[:, token].log()).sum())
                else:
                    error = ((posterior @ vectors) - vectors[token]) ** 2
                    bound += float(process.bound_weights()[step] * (share * error).sum())
            total += float(probability) * bound
        gaps.append(total - float((law * -law.log()).sum()))
    assert 0 < gaps[1] < 0.02 and gaps[1] < gaps[0] < 0.8 and 0 < gaps[2] < gaps[1]


def test_rows_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="mask id"):
        noised(np.full((1, 4), 9), np.arange(1), np.ones(1), seed=1, process=Process("cosine", 10, "v", 4), mask_id=9,
               denominator=None)  # fmt: skip

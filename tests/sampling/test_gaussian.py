"""DDPM and DDIM with the exact network of an enumerable source: they reach its law, by the rows' own noise alone."""

from __future__ import annotations

import math

import pytest
import torch

from dlm_scale.diffusion.gaussian import Process
from dlm_scale.sampling.gaussian import grid, one_by_one, stream

ANGLES = torch.arange(3) * (2 * math.pi / 3)
VECTORS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # on the unit circle
PROCESS = Process("cosine", 1000, "x0_softmax", 2, max_snr=30.0)


def exact_denoise(chain):
    codes = torch.arange(chain.V**chain.L)
    x_SL = torch.stack([codes // chain.V ** (chain.L - 1 - i) % chain.V for i in range(chain.L)], dim=1)
    one_hot_SX = torch.nn.functional.one_hot(x_SL, chain.V).float().flatten(1)
    log_law_S = chain.law_S.float().log()

    def denoise(z_BLE, step, guess_BLE, temperature):
        abar = PROCESS.abar[step].float()
        evidence_BX = (z_BLE @ VECTORS.T * abar.sqrt() / (1 - abar)).flatten(1)
        posterior_BS = torch.softmax(evidence_BX @ one_hot_SX.T + log_law_S, dim=1)
        p_BLV = (posterior_BS @ one_hot_SX).view(len(z_BLE), chain.L, chain.V)
        return p_BLV @ VECTORS, p_BLV.argmax(-1)

    return denoise


def draw(chain, num_rows, denoise=None, first=0, x_BL=None, is_fixed_BL=None, **settings):
    x_BL = torch.zeros(num_rows, chain.L, dtype=torch.long) if x_BL is None else x_BL
    is_fixed_BL = torch.zeros_like(x_BL, dtype=torch.bool) if is_fixed_BL is None else is_fixed_BL
    rows = {"request_hashes": [5] * num_rows, "sample_indices": range(first, first + num_rows)}
    *_, last = stream(denoise or exact_denoise(chain), lambda ids_BL: VECTORS[ids_BL], PROCESS, x_BL, is_fixed_BL, seed=2,
                      **rows, **settings)  # fmt: skip
    return last


@pytest.mark.parametrize("sampler, most", [("ddpm", (0.085, 0.045, 0.04)), ("ddim", (0.065, 0.045, 0.04))])
def test_samples_reach_the_law_as_steps_grow(chain, sampler, most):
    """10,000 draws of the law itself are 0.026 from it."""
    found = [chain.distance(draw(chain, 10_000, sampler=sampler, num_steps=steps).x_BL) for steps in (5, 20, 40)]
    assert found[0] > 1.5 * found[2] and all(distance < limit for distance, limit in zip(found, most)), found


def test_eta_one_of_ddim_is_ddpm_bit_for_bit(chain):
    one = draw(chain, 50, sampler="ddim", eta=1.0, num_steps=7).x_BL
    assert one.equal(draw(chain, 50, sampler="ddpm", num_steps=7).x_BL)
    assert not one.equal(draw(chain, 50, sampler="ddim", num_steps=7).x_BL)


def test_a_sample_does_not_depend_on_its_neighbours(chain):
    apart = one_by_one(exact_denoise(chain))
    many = draw(chain, 9, denoise=apart, sampler="ddpm", num_steps=6)
    some = draw(chain, 2, denoise=apart, first=4, sampler="ddpm", num_steps=6)
    assert many.x_BL[4:6].equal(some.x_BL) and many.nfe_B.tolist() == [6] * 9 and bool(many.is_done_B.all())


def test_fixed_positions_stay_and_steer_the_rest(chain):
    x_BL, is_fixed_BL = torch.zeros(4000, 4, dtype=torch.long), torch.zeros(4000, 4, dtype=torch.bool)
    x_BL[:, 0], is_fixed_BL[:, 0] = 2, True
    made = draw(chain, 4000, x_BL=x_BL, is_fixed_BL=is_fixed_BL, sampler="ddpm", num_steps=60).x_BL
    assert (made[:, 0] == 2).all()
    law = chain.law_S.view(3, 3, 3, 3)
    exact = law[2].sum((1, 2)) / law[2].sum()
    free = law.sum((0, 2, 3))
    got = torch.bincount(made[:, 1], minlength=3) / len(made)
    assert 0.5 * (got - exact).abs().sum() < 0.5 * 0.5 * (free - exact).abs().sum()


def test_guidance_looks_a_second_time_without_the_prompt(chain):
    """A network trained on prompts reads them without noise; in the second look the mask's vector stands there."""
    with pytest.raises(ValueError, match="trained on prompts"):
        draw(chain, 2, sampler="ddim", num_steps=3, guidance=1.0)
    x_BL, is_fixed_BL = torch.full((20, 4), 2), torch.arange(4).expand(20, 4) < 2
    seen, exact = [], exact_denoise(chain)

    def denoise(z_BLE, step, guess_BLE, temperature):
        seen.append((z_BLE.clone(), guess_BLE))
        return exact(z_BLE, step, guess_BLE, temperature)

    options = {"x_BL": x_BL, "is_fixed_BL": is_fixed_BL, "denoise": denoise, "sampler": "ddim", "num_steps": 5, "is_told": True}
    plain = draw(chain, 20, **options)
    assert len(seen) == 5
    held = torch.stack([z_BLE[:, :2] for z_BLE, _ in seen])
    assert held.equal(held[:1, :1].expand_as(held)) and not any(guess[:, :2].any() for _, guess in seen)
    seen.clear()
    pushed = draw(chain, 20, guidance=2.0, mask_id=1, **options)
    assert len(seen) == 10 and pushed.nfe_B.tolist() == [10] * 20 and plain.nfe_B.tolist() == [5] * 20
    told, blind = torch.stack([z for z, _ in seen[::2]]), torch.stack([z for z, _ in seen[1::2]])
    assert told[..., 2:, :].equal(blind[..., 2:, :]) and not told[..., :2, :].equal(blind[..., :2, :])
    assert draw(chain, 20, guidance=0.0, **options).x_BL.equal(plain.x_BL)


def test_the_grid_ends_at_the_first_step():
    assert grid(4, 40, 1000) == [1000, 680, 360, 40] and grid(5000, 2, 4) == [4, 3, 2] and grid(1, 2, 4) == [4]
    assert PROCESS.snr[PROCESS.first - 1] > 30 >= PROCESS.snr[PROCESS.first] and PROCESS.first > 50

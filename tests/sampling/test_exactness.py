"""Every sampler against the exact law of an enumerable chain (V = 3, L = 4), with the exact denoiser."""

from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, Sampler

ROWS = 150_000  # two exact samples of this size are 0.007 apart in total variation; `slow` takes 200,000

EXACT = {
    "first_hitting": "first_hitting",
    "random": "random",
    "entropy": "entropy",
    "margin": "margin",
    "entropy_bounded with gamma 0": replace(SAMPLERS["entropy_bounded"], gamma=0.0),
    "threshold above 1": replace(SAMPLERS["threshold"], threshold=1.1),
    "factor of 0": replace(SAMPLERS["factor"], factor=0.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_one_token_a_pass_samples_the_exact_law(chain, name):
    made = chain.sample(ROWS, EXACT[name], num_steps=4)
    assert chain.distance(made.ids_BL) < 0.01
    assert made.nfe_B.unique().tolist() == [4]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"block_size": 2}, {"block_size": 3}], ids=["whole", "blocks", "uneven"])
@pytest.mark.parametrize("name", EXACT)
def test_one_token_a_pass_samples_the_exact_law_in_blocks_too(chain, name, settings):
    for seed in (3, 4):
        made = chain.sample(200_000, EXACT[name], num_steps=4, seed=seed, **settings)
        assert chain.distance(made.ids_BL) < 0.01
        assert made.nfe_B.unique().tolist() == [4]


def test_the_law_is_far_from_what_a_broken_sampler_could_give(chain):
    uniform_BL = torch.randint(3, (20_000, 4), generator=torch.Generator().manual_seed(0))
    assert chain.distance(uniform_BL) > 0.3


def test_the_error_of_ancestral_falls_as_one_over_the_number_of_steps(chain):
    expected = {1: 0.443, 2: 0.232, 4: 0.121, 16: 0.031, 64: 0.0094}
    measured = {steps: chain.distance(chain.sample(ROWS, "ancestral", steps).ids_BL) for steps in expected}
    assert measured == pytest.approx(expected, abs=0.004)
    assert measured[4] * 4 == pytest.approx(measured[16] * 16, rel=0.15)


@pytest.mark.parametrize("steps, expected", [(16, 0.034), (64, 0.0148)])
def test_masking_again_keeps_the_law_in_the_limit(chain, steps, expected):
    made = chain.sample(100_000, replace(SAMPLERS["remdm"], eta=0.04), steps)
    assert chain.distance(made.ids_BL) == pytest.approx(expected, abs=0.004)
    assert float(made.nfe_B.double().mean()) > 4.2


@pytest.mark.parametrize("name, eta, expected", [("remdm_rescale", 0.3, 0.048), ("remdm_loop", 0.02, 0.048),
                                                 ("remdm_conf", 1.0, 0.086)])  # fmt: skip
def test_the_other_revisions_are_near_the_law_in_16_steps(chain, name, eta, expected):
    made = chain.sample(40_000, replace(SAMPLERS[name], eta=eta), 16)
    assert chain.distance(made.ids_BL) == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name, expected", [("remdm_rescale", 0.01), ("remdm_loop", 0.01), ("remdm_conf", 0.022)])
def test_the_other_revisions_reach_the_law(chain, name, expected):
    made = chain.sample(100_000, name, 256)
    assert chain.distance(made.ids_BL) < 1.2 * expected and float(made.nfe_B.double().mean()) > 7


@pytest.mark.parametrize(
    "name, sampler, expected",
    [
        ("confidence of the sampled token", SAMPLERS["low_confidence"], 0.537),
        ("with annealed Gumbel noise", replace(SAMPLERS["maskgit"], mask_ratio="linear"), 0.081),
        ("several tokens within an entropy of 1 nat", replace(SAMPLERS["entropy_bounded"], gamma=1.0), 0.177),
    ],
)
def test_the_documented_bias_of_the_inexact(chain, name, sampler, expected):
    assert chain.distance(chain.sample(100_000, sampler, 4).ids_BL) == pytest.approx(expected, abs=0.01)


def test_identities_between_samplers(chain):
    def ids(sampler, steps=4):
        return chain.sample(2000, sampler, steps).ids_BL

    assert ids(replace(SAMPLERS["threshold"], threshold=1.1)).equal(ids(Sampler(selector="max_prob")))
    assert ids(replace(SAMPLERS["factor"], factor=0.0)).equal(ids(Sampler(selector="max_prob")))
    assert ids(replace(SAMPLERS["entropy_bounded"], gamma=0.0)).equal(ids("entropy"))
    assert ids(replace(SAMPLERS["remdm"], eta=0.0), 16).equal(ids("ancestral", 16))
    for name in ("remdm_rescale", "remdm_conf"):
        assert ids(replace(SAMPLERS[name], eta=0.0), 16).equal(ids("ancestral", 16))
        assert not ids(name, 16).equal(ids("ancestral", 16))
    assert not ids(replace(SAMPLERS["remdm"], eta=0.3), 16).equal(ids("ancestral", 16))
    assert not ids("entropy").equal(ids("margin"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_reveals_all_at_once(chain, name):
    made = chain.sample(20_000, name, num_steps=1)
    assert made.nfe_B.unique().tolist() == [1]
    marginal_LV = chain.table[-1, :, :3].exp()  # the state of masks only
    for position in range(chain.L):
        share_V = torch.bincount(made.ids_BL[:, position], minlength=3) / 20_000
        assert share_V.tolist() == pytest.approx(marginal_LV[position].tolist(), abs=0.015)

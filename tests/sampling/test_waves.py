"""Waves against their definition, and against what they are for: what stands side by side is drawn together."""

from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, Sampler
from dlm_scale.sampling.waves import next_wave
from tests.sampling.test_engine import ROWS, sample

ONE_STEP = 20_000


@pytest.mark.parametrize(("before", "waves"), [  # k known, x unknown and not asked for, . to be drawn
    ("k..k", ["k1.k", "k21k"]),
    ("k...k", ["k1.1k", "k121k"]),
    ("....", ["1...", "21..", "321.", "4321"]),
    ("x..x.x", ["x1.x1x", "x21x1x"]),
    ("..k....", [".1k1...", "12k21..", "12k321.", "12k4321"]),
    ("k.....k.", ["k1...1k1", "k12.21k1", "k12321k1"]),
    ("xk.x", ["xk1x"]),
])  # fmt: skip
def test_a_wave_is_what_touches_a_known_id_and_never_two_neighbours(before, waves):
    pending_BL = torch.tensor([[char == "." for char in before]])
    known_BL, drawn = torch.tensor([[char == "k" for char in before]]), []
    while pending_BL.any():
        drawn.append(next_wave(pending_BL, known_BL))
        pending_BL, known_BL = pending_BL & ~drawn[-1], known_BL | drawn[-1]
    assert len(drawn) == len(waves)
    for wave_BL, shown, last in zip(drawn, waves, [before, *waves]):
        fresh = [a == "." and b != "." for a, b in zip(last, shown)]
        assert wave_BL[0].tolist() == fresh


def test_rows_do_not_see_each_other():
    """The last position of a row is no neighbour of the first one of the next."""
    now_BL = next_wave(torch.tensor([[True, True], [True, True]]), torch.zeros(2, 2, dtype=torch.bool))
    assert now_BL.tolist() == [[True, False]] * 2


def test_two_masks_side_by_side_are_drawn_from_their_joint_law(chain):
    """Between known ends one pass of the plain sampler gives the product of the marginals; waves give the joint."""
    x_BL = torch.tensor([[0, 3, 3, 2]]).expand(ONE_STEP, 4)
    is_fixed_BL = torch.tensor([[True, False, False, True]]).expand(ONE_STEP, 4)
    joint = (chain.law_S.view(3, 3, 3, 3)[0, :, :, 2] / chain.law_S.view(3, 3, 3, 3)[0, :, :, 2].sum()).flatten()
    found = {}
    for name in ("ancestral", "local_waves"):
        made = chain.sample(ONE_STEP, name, 1, x_BL=x_BL, is_fixed_BL=is_fixed_BL)
        assert made.nfe_B.unique().tolist() == [1]
        shares = torch.bincount(made.ids_BL[:, 1] * 3 + made.ids_BL[:, 2], minlength=9).double() / ONE_STEP
        found[name] = 0.5 * float((shares - joint).abs().sum())
    assert found["local_waves"] < 0.015 < 0.15 < found["ancestral"], found


def test_an_order_1_source_is_exact_in_one_pass(chain):
    """From nothing the waves go from left to right, and a position's neighbours are all that an order-1 chain needs."""
    assert chain.distance(chain.sample(ONE_STEP, "local_waves", 1).ids_BL) < 0.03
    assert chain.distance(chain.sample(ONE_STEP, "ancestral", 1).ids_BL) > 0.4


def test_an_order_by_score_chooses_and_waves_fill(chain):
    by_entropy = Sampler(selector="entropy", token_sampler="local_waves")
    assert chain.distance(chain.sample(ONE_STEP, by_entropy, 4).ids_BL) < 0.03
    assert chain.distance(chain.sample(ONE_STEP, by_entropy, 1).ids_BL) < 0.03


@pytest.mark.parametrize("changes", [{"selector": "sampled_confidence", "schedule": "even"}, {"reviser": "cap"}])
def test_parts_that_do_not_go_with_waves_are_refused(changes):
    with pytest.raises(ValueError, match="local_waves"):
        replace(SAMPLERS["local_waves"], **changes)


@pytest.mark.parametrize("settings", [{"guidance": 1.0}, {"predict": lambda x_BL, rows_N, cache=None: None, "cache": "dual"}])
def test_settings_that_do_not_go_with_waves_are_refused(settings):
    if "predict" in settings:
        settings["predict"].local = lambda: None
    with pytest.raises(ValueError, match="neither guidance nor"):
        sample("local_waves", ROWS, **settings)

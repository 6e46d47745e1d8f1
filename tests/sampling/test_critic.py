"""The critic's sampler: what it doubts is masked again, by the schedule's counts; each of its looks counts."""

from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, Sampler
from tests.sampling.test_engine import ROWS, L, V, critique, predict, sample


class Watched:
    """The made-up denoiser, and a critic whose scores are remembered."""

    def __init__(self, score=critique):
        self.score, self.judged = score, []

    def __call__(self, x_BL, rows_N):
        return predict(x_BL, rows_N)

    def critique(self, x_BL, rows_N):
        self.judged.append((x_BL.clone(), rows_N.clone()))
        return self.score(x_BL, rows_N)


def test_all_is_drawn_and_the_most_doubted_are_masked_again_by_the_schedule():
    watched, states, num_steps = Watched(), [], 4
    is_fixed_BL = torch.arange(L).expand(7, L) < 2
    x_BL = torch.ones(7, L, dtype=torch.long)
    made = sample("critic", ROWS, num_steps, x_BL=x_BL, is_fixed_BL=is_fixed_BL, predict=watched, on_step=states.append)
    assert (made.nfe_B == 2 * num_steps - 1).all() and len(watched.judged) == num_steps - 1
    assert [int(state.is_masked_BL.sum(1).unique()) for state in states] == [8, 6, 4, 2, 0]
    for (seen_BL, rows_N), state in zip(watched.judged, states[1:]):
        assert (seen_BL != V).all() and rows_N.tolist() == (~is_fixed_BL).flatten().nonzero()[:, 0].tolist()
        score_BL = critique(seen_BL, rows_N).view(7, L - 2)
        masked_BL = state.is_masked_BL[:, 2:]
        kept, again = score_BL.masked_fill(masked_BL, -9e9).amax(1), score_BL.masked_fill(~masked_BL, 9e9).amin(1)
        assert (again >= kept).all()
        assert state.x_BL[~state.is_masked_BL].equal(seen_BL[~state.is_masked_BL])
    was_open = [~state.is_masked_BL for state in states[1:]]
    assert any((a & b.logical_not()).any() for a, b in zip(was_open, was_open[1:]))  # also what an earlier pass revealed
    for before, state in zip(states, states[1:]):
        gone_BL = ~before.is_masked_BL & state.is_masked_BL
        assert (state.is_revised_BL == (before.is_revised_BL | gone_BL)).all()
        assert (state.is_fresh_BL == (before.is_masked_BL & ~state.is_masked_BL)).all()


def test_steps_without_a_reveal_cost_nothing():
    is_fixed_BL = torch.arange(L).expand(7, L) >= 3
    made = sample("critic", ROWS, 60, x_BL=torch.ones(7, L, dtype=torch.long), is_fixed_BL=is_fixed_BL)
    assert (made.nfe_B == 2 * 3 - 1).all()


def test_no_number_of_a_critic_is_too_large_or_too_small():
    made = sample("critic", ROWS, 3, predict=Watched(lambda x_BL, rows_N: torch.full(rows_N.shape, -torch.inf)))
    assert (made.ids_BL < V).all()


@pytest.mark.parametrize("name", ["critic", "local_waves"])
def test_a_predict_without_the_head_is_refused(name):
    with pytest.raises(ValueError, match="this sampler needs a predict that offers"):
        sample(name, ROWS, predict=lambda x_BL, rows_N: predict(x_BL, rows_N))


def test_parts_that_do_not_belong_together_are_refused():
    for changes in ({"selector": "entropy"}, {"schedule": "independent"}, {"reviser": "none"}):
        with pytest.raises(ValueError, match="belong together"):
            replace(SAMPLERS["critic"], **changes)
    with pytest.raises(ValueError, match="needs schedule 'independent'"):
        Sampler(reviser="cap")
    with pytest.raises(ValueError, match="confidence_bias"):
        sample("critic", ROWS, confidence_bias={1: 1.0})

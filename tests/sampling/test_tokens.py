"""What: inverse CDF, temperature, top-k and top-p against their definitions."""

import math

import pytest
import torch

from dlm_scale.sampling import Sampler, generate
from dlm_scale.sampling.tokens import _is_nucleus, argmax, inverse_cdf, sample_tokens

PROBS = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3])


def shares(temperature=1.0, top_k=0, top_p=1.0, probs=PROBS, count=20_000):
    """Frequencies of the ids over an even grid of uniforms: the exact law up to 1/count."""
    uniform_N = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    log_probs_NV = probs.log().expand(count, -1)
    ids_N = inverse_cdf(log_probs_NV, uniform_N, temperature, top_k, top_p)
    return torch.bincount(ids_N, minlength=len(probs)) / count


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.1, 0.4, 0, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 0, 4 / 30, 9 / 30]),
        ({"temperature": 1e-3}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_k": 100}, [0.1, 0.4, 0, 0.2, 0.3]),
        ({"top_p": 0.4}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 0, 2 / 9, 3 / 9]),
        ({"top_p": 0.5, "top_k": 2}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.6, "top_k": 2}, [0, 4 / 7, 0, 0, 3 / 7]),
    ],
)
def test_law_of_the_drawn_ids(settings, expected):
    if settings == {"top_p": 0.4}:
        expected = shares(top_k=1).tolist()  # float32 0.4 reaches the nucleus alone
    assert shares(**settings).tolist() == pytest.approx(expected, abs=1e-3)


def test_ids_equal_in_probability_are_kept_in_vocabulary_order():
    assert shares(top_k=2, probs=torch.full((5,), 0.2)).tolist() == pytest.approx([0.5, 0.5, 0, 0, 0], abs=1e-3)
    tied = torch.tensor([[0.2, 0.4, 0.4]]).log()
    assert argmax(tied, torch.zeros(1), 0.0, 0, 1.0).tolist() == [1]


def test_an_impossible_id_is_never_drawn():
    extremes_N = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    log_probs_NV = torch.tensor([-math.inf, 0.0, -math.inf]).expand(3, 3)
    assert inverse_cdf(log_probs_NV, extremes_N, 1.0, 0, 1.0).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="possible id"):
        sample_tokens(argmax, torch.full((1, 3), math.nan), torch.zeros(1), 0.0, 0, 1.0)


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_the_nucleus_of_a_large_vocabulary_is_exact_in_float32(top_p):
    """Zipf over 126,464 ids in any order: the fewest likeliest ids that reach top_p, as float64 counts them."""
    zipf_V = 1 / torch.arange(1, 126_465, dtype=torch.float64)
    reached_V = (zipf_V / zipf_V.sum()).cumsum(0)
    order_V = torch.randperm(126_464, generator=torch.Generator().manual_seed(0))
    log_probs_1V = (zipf_V / zipf_V.sum()).log().float()[order_V][None]
    kept = _is_nucleus((log_probs_1V - log_probs_1V.amax()).exp(), top_p)
    expected = int((reached_V < top_p).sum()) + 1
    assert abs(int(kept.sum()) - expected) <= 2
    assert kept[0][order_V <= expected - 3].all()


def test_blocks_of_rows_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    log_probs_NV = torch.log_softmax(torch.randn(37, 11, generator=generator), -1)
    uniform_N = torch.rand(37, generator=generator, dtype=torch.float64)
    whole_N = sample_tokens(inverse_cdf, log_probs_NV, uniform_N, 0.7, 5, 0.9)
    monkeypatch.setattr("dlm_scale.sampling.tokens._MAX_ELEMENTS", 44)
    assert sample_tokens(inverse_cdf, log_probs_NV, uniform_N, 0.7, 5, 0.9).equal(whole_N)


def test_rare_tokens_and_rare_reveals_keep_their_share():
    """Where a float32 Gumbel-max over 'stay masked with 0.999' and a Zipf vocabulary of 5000 loses its tail."""
    zipf_V = 1 / torch.arange(1, 5001, dtype=torch.float64)
    zipf_V /= zipf_V.sum()
    log_probs_V = torch.cat([zipf_V, torch.zeros(1, dtype=torch.float64)]).log().float()
    first_steps, num_rows, length = [], 16, 1024

    def on_step(state):
        first_steps.append(torch.where(state.is_fresh_BL, state.step_B[:, None], 0))

    made = generate(
        lambda x_BL, rows_N: log_probs_V.expand(len(rows_N), -1),
        torch.zeros(num_rows, length, dtype=torch.long),
        torch.zeros(num_rows, length, dtype=torch.bool),
        sampler=Sampler(schedule="independent"),
        num_steps=1000,
        seed=11,
        request_hashes=[5] * num_rows,
        sample_indices=range(num_rows),
        mask_id=5000,
        on_step=on_step,
    )
    count = num_rows * length
    for ids, mass in ((slice(0, 50), zipf_V[:50].sum()), (slice(500, 5000), zipf_V[500:].sum())):
        share = ((made.ids_BL >= ids.start) & (made.ids_BL < ids.stop)).double().mean()
        assert abs(share - mass) < 3 * math.sqrt(mass * (1 - mass) / count)
    step_N = torch.stack(first_steps).amax(0).flatten()
    for first, last in ((1, 10), (451, 550), (991, 1000)):
        rate = ((step_N >= first) & (step_N <= last)).double().mean()
        expected = (last - first + 1) / 1000
        assert abs(rate - expected) < 3 * math.sqrt(expected * (1 - expected) / count)

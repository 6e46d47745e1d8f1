"""Masking in torch, the kernel's specification, against the numpy path; and the law of its counts (I6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlm_scale import ops
from dlm_scale.diffusion.corruption import row_words
from dlm_scale.diffusion.rng import Stream, philox, uniform24
from dlm_scale.kernels import philox as kernel_philox
from dlm_scale.kernels.masking import Noise, mask_tokens_ref
from tests.kernels.oracles import MASK_ID, assert_same_masks, assert_split_gives_the_same, masking_case


def run(case):
    x0_BL, index_B, noise, maskable_BL = case.rows(0, len(case.x0_BL))
    return mask_tokens_ref(x0_BL, index_B, noise, mask_id=MASK_ID, maskable_BL=maskable_BL)


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 1, 2**63 + 5, 2**64 - 1])
def test_philox_is_the_numpy_one(seed):
    counter = np.random.default_rng(0).integers(0, 2**32, (4, 1000))
    wanted = philox(seed, *counter)
    found = kernel_philox.philox_ref(seed, *map(torch.from_numpy, counter))
    assert all((f.numpy() == w.astype(np.int64)).all() for f, w in zip(found, wanted))


def test_philox_known_answers():
    """Of the authors' Random123."""
    ones, pi = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for key, counter, answer in (
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x299F31D0A4093822, pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert [int(word) for word in kernel_philox.philox_ref(key, *counter)] == answer


def test_streams_are_those_of_the_counter_table():
    found = [kernel_philox.MASK_STREAM, kernel_philox.REPLACEMENT_STREAM, kernel_philox.EDIT_STREAM]
    assert found == [Stream.MASK, Stream.REPLACEMENT, Stream.EDIT]


@pytest.mark.parametrize("weighting, schedule", [("count", "linear"), ("elbo", "cosine"), ("simple", "loglinear")])
@pytest.mark.parametrize("ragged", [False, True])
def test_equals_the_numpy_path_in_every_field(weighting, schedule, ragged):
    case = masking_case(9, 257, weighting, schedule, ragged=ragged, seed=2**64 - 1)
    assert_same_masks(run(case), case.numpy)


def test_a_million_positions_and_any_split_over_ranks():
    case = masking_case(128, 8192)
    assert_same_masks(run(case), case.numpy)
    for num_ranks in (2, 4):
        assert_split_gives_the_same(mask_tokens_ref, case, num_ranks)


def test_segments_have_their_own_mask_ratio_count_and_weight():
    """Two rows of 10 with documents of 3 + 7 and 10: thresholds differ, the random words are the rows'."""
    x0_BL, index_B = torch.arange(20).view(2, 10), torch.tensor([5, 2**35])
    bounds, ratio_S = torch.tensor([0, 3, 10, 20], dtype=torch.int32), torch.tensor([1.0, 0.4, 0.7])
    found = mask_tokens_ref(x0_BL, index_B, Noise(ratio_S, None, 3), mask_id=99, cu_seqlens=bounds)
    segment = np.repeat([0, 1, 2], [3, 7, 10])
    words = uniform24(row_words(3, index_B.numpy(), 10, Stream.MASK)).reshape(-1)
    hit = words < np.ceil(ratio_S.double().numpy() * 2**24)[segment]
    masked, size = np.bincount(segment[hit], minlength=3), np.array([3, 7, 10])
    assert found.is_masked_BL.flatten().tolist() == hit.tolist() and masked[0] == 3
    assert found.num_masked_S.tolist() == masked.tolist() and found.num_maskable_S.tolist() == size.tolist()
    np.testing.assert_allclose(found.weight_N, ((size + 1) / masked)[segment[hit]], rtol=1e-7)


def test_masked_counts_are_uniform_and_pairs_have_probability_one_third():
    """I6: t uniform and linear gives counts uniform on 0..L; chi-square, 3.5 standard deviations for the pair."""
    num_rows, length = 100_000, 16
    t_B = torch.from_numpy(1 - np.random.default_rng(5).random(num_rows))
    x0_BL = torch.zeros(num_rows, length, dtype=torch.int64)
    found = mask_tokens_ref(x0_BL, torch.arange(num_rows), Noise(t_B, None, 1), mask_id=1)
    counts = np.bincount(found.num_masked_S, minlength=length + 1)
    expected = num_rows / (length + 1)
    assert ((counts - expected) ** 2 / expected).sum() < 39.3  # the 0.999 quantile at 16 degrees of freedom
    both = (found.is_masked_BL[:, 3] & found.is_masked_BL[:, 11]).double().mean().item()
    assert abs(both - 1 / 3) < 3.5 * (2 / 9 / num_rows) ** 0.5


def test_ops_masks_on_the_host_by_the_reference():
    case = masking_case(3, 40)
    x0_BL, index_B, noise, _ = case.rows(0, 3)
    assert_same_masks(ops.mask_tokens(x0_BL, index_B, noise, mask_id=MASK_ID), case.numpy)


def test_where_training_masks(monkeypatch):
    for requested in ("auto", "reference"):
        assert ops.choose_masking(requested, "cuda")[0] == ops.choose_masking(requested, "cpu")[0] == "numpy"
    assert ops.masks_on(torch.device("cpu")) is None
    with pytest.raises(ops.BackendError, match="masking cannot run here: it needs a CUDA device"):
        ops.choose_masking("triton", "cpu")
    with pytest.raises(ops.BackendError, match="unknown"):
        ops.choose_masking("cuda", "cpu")
    monkeypatch.setattr(ops, "REQUESTED_KERNELS", "triton")
    monkeypatch.setattr(ops, "_kernel_obstacle", lambda op, device: None)
    ops.choose_kernels.cache_clear()
    assert ops.masks_on(torch.device("cuda", 0)).func is ops.mask_on_device
    ops.choose_kernels.cache_clear()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"x0_BL": torch.zeros(2, 3, dtype=torch.int32)}, "int64"),
        ({"sample_index_B": torch.zeros(3, dtype=torch.int64)}, "sample indices"),
        ({"noise": Noise(torch.ones(3), None, 0)}, "each of 2 segments needs one mask ratio"),
        ({"noise": Noise(torch.ones(2), torch.ones(1), 0)}, "each of 2 segments needs one rate"),
        ({"maskable_BL": torch.ones(2, 3)}, "bool"),
        ({"cu_seqlens": torch.tensor([0, 2, 3, 6], dtype=torch.int32)}, "each of 3 segments"),
    ],
)
def test_what_does_not_fit_is_refused(change, complaint):
    good = {"x0_BL": torch.zeros(2, 3, dtype=torch.int64), "sample_index_B": torch.zeros(2, dtype=torch.int64),
            "noise": Noise(torch.ones(2), None, 0), "mask_id": 9}  # fmt: skip
    mask_tokens_ref(**good)
    with pytest.raises(ValueError, match=complaint):
        mask_tokens_ref(**(good | change))


def test_a_key_outside_64_bits_is_refused():
    assert kernel_philox.signed_key(2**64 - 1) == -1 and kernel_philox.signed_key(5) == 5
    with pytest.raises(ValueError, match="64"):
        kernel_philox.signed_key(2**64)

"""The forward process: the law of the masks (I6), its independence of the batch (I7), and every field of Corrupted."""

import dataclasses

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.corruption import KIND_MASKED, corrupt, exact_count, smallest_words
from dlm_scale.diffusion.rng import Stream, counter_of, philox
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.ops import Segments

MASK_ID = 1  # inside the vocabulary: nothing may assume that it is the last id


def clean(num_rows: int, length: int, vocab: int = 9) -> np.ndarray:
    x0_BL = np.random.default_rng(0).integers(0, vocab - 1, (num_rows, length))
    return x0_BL + (x0_BL >= MASK_ID)


def uniform_times(num_rows: int, seed: int = 0) -> np.ndarray:
    return 1 - np.random.default_rng(seed).random(num_rows)


def noised(x0_BL, t_B, first: int = 0, weighting: str = "count", schedule: str = "linear", **options):
    index_B = np.arange(first, first + len(x0_BL), dtype=np.int64)
    options = {"seed": 42, "mask_id": MASK_ID, "denominator": 1.0, **options}
    return corrupt(x0_BL, index_B, t_B, schedule=SCHEDULES[schedule], weighting=WEIGHTINGS[weighting], **options)


def assert_same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y, field.name


def test_every_field_follows_from_the_masks():
    x0_BL, t_B = clean(6, 16), np.array([0.1, 0.5, 1.0, 0.9, 0.3, 1e-9])
    maskable_BL = np.random.default_rng(1).random((6, 16)) < 0.8
    c = noised(x0_BL, t_B, maskable_BL=maskable_BL, denominator=77)
    masked = c.is_masked_BL.numpy()
    assert not masked[~maskable_BL].any() and (masked[2] == maskable_BL[2]).all() and not masked[5].any()
    assert (c.xt_BL.numpy() == np.where(masked, MASK_ID, x0_BL)).all()
    assert c.rows_N.tolist() == np.flatnonzero(masked).tolist()
    assert c.target_N.tolist() == x0_BL[masked].tolist()
    assert c.num_maskable_B.tolist() == maskable_BL.sum(1).tolist()
    assert c.t_B.tolist() == t_B.tolist() and c.m_B.tolist() == t_B.astype(np.float32).tolist()
    weight_B = (maskable_BL.sum(1) + 1) / np.maximum(masked.sum(1), 1)
    np.testing.assert_allclose(c.weight_N, weight_B[np.nonzero(masked)[0]], rtol=1e-7)
    assert torch.equal(c.weight_N, c.elbo_weight_N) and (c.kind_N == KIND_MASKED).all()
    assert c.denominator == 77.0 and c.attention is None
    types = [torch.int64, torch.bool, torch.int64, torch.int64, torch.float32, torch.float32, torch.uint8]
    types += [torch.float32, torch.float64, torch.int64]
    assert [getattr(c, f.name).dtype for f in dataclasses.fields(c)[: len(types)]] == types


def test_masks_are_the_integer_compare_of_the_counter_table():
    t_B = uniform_times(4)
    c = noised(clean(4, 33), t_B, first=2**32 - 2, schedule="cosine", weighting="elbo")
    low, high = counter_of(np.arange(2**32 - 2, 2**32 + 2))
    word = philox(42, low[:, None], high[:, None], np.arange(33), Stream.MASK)[0]
    threshold = [int(np.ceil(np.sin(np.pi / 2 * t) * 2**24)) for t in t_B]
    expected = [[int(w) >> 8 < k for w in row] for row, k in zip(word, threshold)]
    assert c.is_masked_BL.tolist() == expected


def test_threshold_is_rounded_up_to_the_next_integer():
    word = int(philox(42, 0, 0, 0, Stream.MASK)[0]) >> 8
    for t, masked in ((word, False), (word + 0.5, True), (word + 1, True)):
        assert noised(clean(1, 1), np.array([t / 2**24])).is_masked_BL.item() is masked


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("cuts", [[], [1], [5, 6], [2, 4, 6, 8, 10]])
def test_rows_are_noised_alike_in_any_split(weighting, cuts):
    x0_BL, t_B = clean(12, 20), uniform_times(12)
    maskable_BL = np.random.default_rng(3).random((12, 20)) < 0.7
    whole = noised(x0_BL, t_B, 100, weighting, maskable_BL=maskable_BL)
    bounds = [0, *cuts, 12]
    parts = [
        noised(x0_BL[a:b], t_B[a:b], 100 + a, weighting, maskable_BL=maskable_BL[a:b])
        for a, b in zip(bounds, bounds[1:])
    ]
    for name in ("xt_BL", "is_masked_BL", "target_N", "weight_N", "elbo_weight_N", "m_B", "t_B", "num_maskable_B"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts])), name


def test_numpy_and_torch_rows_give_the_same_and_stay_untouched():
    x0_BL, t_B = clean(5, 8), uniform_times(5)
    tensor, times = torch.from_numpy(x0_BL.copy()), t_B.copy()
    assert_same(noised(x0_BL, t_B), noised(tensor, torch.from_numpy(times)))
    assert (tensor.numpy() == x0_BL).all() and (times == t_B).all()


def test_right_padding_changes_no_mask_and_no_weight():
    x0_BL, t_B = clean(8, 12), uniform_times(8)
    padded = np.concatenate([x0_BL, np.full((8, 5), MASK_ID)], 1)  # padding may even be the mask id
    maskable_BL = np.arange(17) < 12 + np.zeros((8, 1))
    for weighting in WEIGHTINGS:
        a, b = noised(x0_BL, t_B, 0, weighting), noised(padded, t_B, 0, weighting, maskable_BL=maskable_BL)
        assert torch.equal(a.is_masked_BL, b.is_masked_BL[:, :12]) and not b.is_masked_BL[:, 12:].any()
        assert torch.equal(a.weight_N, b.weight_N) and torch.equal(a.target_N, b.target_N)


def test_masked_counts_are_uniform_and_positions_exchangeable(chi_square_p):
    num_rows, length = 200_000, 32
    c = noised(np.zeros((num_rows, length), np.int64), uniform_times(num_rows), first=2**40)
    masked = c.is_masked_BL.float()
    counts = torch.bincount(c.is_masked_BL.sum(1), minlength=length + 1).numpy()
    assert chi_square_p(counts, np.full(length + 1, num_rows / (length + 1))) > 1e-4
    sigma = num_rows**-0.5
    assert (masked.mean(0) - 1 / 2).abs().max() < 5 * sigma / 2
    pair = (masked.T @ masked / num_rows)[~torch.eye(length, dtype=torch.bool)]
    assert (pair - 1 / 3).abs().max() < 5 * sigma * (2 / 9) ** 0.5


def test_given_the_time_positions_are_independent_of_each_other_and_of_the_step():
    c = noised(np.zeros((100_000, 6), np.int64), np.full(100_000, 0.3))
    masked = c.is_masked_BL.double()
    assert (masked.mean(0) - 0.3).abs().max() < 5 * (0.21 / 100_000) ** 0.5
    correlation = torch.corrcoef(torch.cat([masked.T[:, :-1], masked.T[:, 1:]]))  # with the next row as well
    assert (correlation - torch.eye(12)).abs().max() < 5 / 100_000**0.5


def test_exact_count_masks_a_uniform_subset_of_a_uniform_size(chi_square_p):
    num_rows, length = 120_000, 5
    c = noised(np.zeros((num_rows, length), np.int64), uniform_times(num_rows), weighting="exact")
    masked = c.is_masked_BL.numpy()
    code = masked @ (1 << np.arange(length))
    size = np.array([bin(s).count("1") for s in range(1, 32)])
    expected = num_rows / length / np.array([0, 5, 10, 10, 5, 1])[size]
    assert chi_square_p(np.bincount(code, minlength=32)[1:], expected) > 1e-4 and (code > 0).all()
    assert c.m_B.tolist() == (masked.sum(1) / length).astype(np.float32).tolist()
    np.testing.assert_allclose(c.weight_N, (length / masked.sum(1))[np.nonzero(masked)[0]], rtol=1e-7)


def test_exact_count_at_the_ends():
    assert exact_count(np.array([1e-12, 0.2, 0.21, 1.0, 0.7]), np.array([5, 5, 5, 5, 0])).tolist() == [1, 1, 2, 5, 0]


def test_smallest_words_breaks_ties_by_column():
    word_BL = np.array([[7, 3, 3, 3, 9]] * 3, np.uint32)
    maskable_BL = np.array([[True] * 5, [True, False, True, True, True], [False] * 5])
    chosen = smallest_words(word_BL, maskable_BL, np.array([2, 3, 0]))
    assert chosen.tolist() == [[False, True, True, False, False], [True, False, True, True, False], [False] * 5]
    top = np.full((1, 3), 2**32 - 1, np.uint32)
    assert smallest_words(top, np.array([[True, False, True]]), np.array([2])).tolist() == [[True, False, True]]


def test_elbo_weight_of_simple_is_an_elbo_weight():
    x0_BL, t_B = clean(16, 10), uniform_times(16)
    t_B[0] = 1e-7
    simple, count = noised(x0_BL, t_B, 0, "simple"), noised(x0_BL, t_B, 0, "count")
    assert (simple.weight_N == 1).all() and torch.equal(simple.elbo_weight_N, count.weight_N)
    simple, elbo = (noised(x0_BL, t_B, 0, w, "cosine2") for w in ("simple", "elbo"))
    assert torch.equal(simple.elbo_weight_N, elbo.weight_N) and torch.equal(simple.is_masked_BL, elbo.is_masked_BL)


def test_time_weights_clamp_the_time_of_mask_and_weight_together():
    c = noised(clean(3000, 10), np.full(3000, 1e-12), 0, "elbo")
    assert (c.t_B == 1 / 80).all() and (c.weight_N == 80).all()
    assert abs(c.rows_N.numel() - 3000 / 8) < 5 * (3000 / 8) ** 0.5
    assert noised(clean(3000, 10), np.full(3000, 1e-12), 0, "count").rows_N.numel() == 0


def test_rows_without_maskable_positions_and_empty_batches():
    nothing = np.zeros((2, 4), bool)
    for weighting in WEIGHTINGS:
        c = noised(clean(2, 4), np.array([0.5, 1.0]), 0, weighting, maskable_BL=nothing)
        assert c.rows_N.numel() == 0 and c.weight_N.numel() == 0 and torch.isfinite(c.m_B).all()
        empty = noised(np.zeros((0, 4), np.int64), np.zeros(0), 0, weighting)
        assert empty.xt_BL.shape == (0, 4) and empty.rows_N.numel() == 0


def test_to_moves_every_tensor():
    packed = Segments(torch.tensor([0, 4, 7, 14, 21], dtype=torch.int32))
    moved = noised(clean(3, 7), uniform_times(4), attention=packed).to("meta")
    values = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    assert [value.device.type for value in values if hasattr(value, "device")] == ["meta"] * 10
    assert moved.denominator == 1.0 and moved.attention.cu_seqlens.device.type == "meta"


@pytest.mark.parametrize("weighting", ["count", "exact"])
def test_uniform_weightings_refuse_other_schedules(weighting):
    for schedule in SCHEDULES:
        if schedule == "linear":
            noised(clean(2, 4), np.ones(2), 0, weighting, schedule)
        else:
            with pytest.raises(ValueError, match="linear"):
                noised(clean(2, 4), np.ones(2), 0, weighting, schedule)


def test_misuse_is_refused():
    x0_BL = clean(2, 4)
    for t_B in ([0.0, 0.5], [0.5, 1.1], [0.5, np.nan], [0.5]):
        with pytest.raises(ValueError, match="time"):
            noised(x0_BL, np.array(t_B))
    with pytest.raises(ValueError, match="mask id"):
        noised(np.full((2, 4), MASK_ID), np.ones(2))
    with pytest.raises(ValueError, match="int64"):
        noised(x0_BL.astype(np.int32), np.ones(2))
    with pytest.raises(ValueError, match="maskable_BL"):
        noised(x0_BL, np.ones(2), maskable_BL=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="indices"):
        corrupt(
            x0_BL, np.zeros(1, np.int64), np.ones(2), seed=0, schedule=SCHEDULES["linear"],
            weighting=WEIGHTINGS["count"], mask_id=MASK_ID, denominator=1.0,
        )  # fmt: skip

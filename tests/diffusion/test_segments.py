"""Packed documents and rows of random length: each segment is noised as a row of its own would be."""

import dataclasses

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.rng import Stream, counter_of, philox
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.segments import Rows, check_bounds, cut_rows, row_bounds, row_lengths, segment_times
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.ops import Segments

MASK_ID = 9
NAMES = ("xt_BL", "is_masked_BL", "rows_N", "target_N", "weight_N", "elbo_weight_N", "m_B", "t_B", "num_maskable_B")


def clean(num_rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, MASK_ID, (num_rows, length))


def bounds_of(*documents_of_rows) -> np.ndarray:
    """Bounds from the lengths of each row's documents."""
    return np.concatenate([[0], np.cumsum(np.concatenate(documents_of_rows))]).astype(np.int32)


def noised(x0_BL, t_S, bounds_S1=None, first=0, weighting="count", schedule="linear", **options):
    index_B = np.arange(first, first + len(x0_BL))
    attention = None if bounds_S1 is None else Segments(torch.from_numpy(bounds_S1))
    return corrupt(x0_BL, index_B, t_S, seed=42, schedule=SCHEDULES[schedule], weighting=WEIGHTINGS[weighting],
                   mask_id=MASK_ID, denominator=1.0, attention=attention, **options)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_rows_that_are_one_segment_are_noised_as_rows_to_the_bit(weighting):
    x0_BL, t_B, bounds_S1 = clean(6, 40), stratified_times(1, 0, 6), row_bounds(6, 40)
    t_S = segment_times(42, np.arange(6), t_B, bounds_S1, 40)
    assert t_S.tolist() == t_B.tolist()
    plain, packed = noised(x0_BL, t_B, weighting=weighting), noised(x0_BL, t_S, bounds_S1, weighting=weighting)
    for name in NAMES:
        assert torch.equal(getattr(plain, name), getattr(packed, name)), name
    assert torch.equal(plain.segment_N, packed.segment_N) and plain.attention is None
    assert packed.attention.cu_seqlens.tolist() == bounds_S1.tolist()


@pytest.mark.parametrize("weighting, schedule", [("count", "linear"), ("exact", "linear"), ("elbo", "cosine")])
def test_a_segment_is_the_row_that_holds_it_alone(weighting, schedule):
    """The same words at the same columns; all else of the row is not maskable."""
    x0_BL, bounds_S1, t_S = clean(2, 12), bounds_of([3, 8, 1], [12]), np.array([0.5, 0.9, 1.0, 0.3])
    maskable_BL = np.random.default_rng(2).random((2, 12)) < 0.8
    packed = noised(x0_BL, t_S, bounds_S1, 7, weighting, schedule, maskable_BL=maskable_BL)
    for segment, (start, stop) in enumerate(zip(bounds_S1, bounds_S1[1:])):
        row = start // 12
        here_L = np.zeros(12, bool)
        here_L[start - row * 12 : stop - row * 12] = True
        alone = noised(x0_BL[row : row + 1], t_S[segment : segment + 1], None, 7 + row, weighting, schedule,
                       maskable_BL=(maskable_BL[row] & here_L)[None])
        mine = packed.segment_N == segment
        assert packed.rows_N[mine].tolist() == (alone.rows_N + row * 12).tolist()
        for name in ("target_N", "weight_N", "elbo_weight_N"):
            assert torch.equal(getattr(packed, name)[mine], getattr(alone, name)), name
        for name in ("m_B", "t_B", "num_maskable_B"):
            assert getattr(packed, name)[segment] == getattr(alone, name)[0], name


def test_masked_counts_of_each_segment_are_uniform(chi_square_p):
    """Invariant I6, segment by segment, with the times that training gives them."""
    documents, num_rows = [5, 16, 9, 2], 60_000
    bounds_S1 = bounds_of(*[documents] * num_rows)
    t_S = segment_times(3, np.arange(num_rows), 1 - np.random.default_rng(1).random(num_rows), bounds_S1, 32)
    c = noised(np.zeros((num_rows, 32), np.int64), t_S, bounds_S1)
    count_SR = torch.bincount(c.segment_N, minlength=4 * num_rows).view(num_rows, 4).T
    for count_R, length in zip(count_SR, documents, strict=True):
        found = np.bincount(count_R, minlength=length + 1)
        assert chi_square_p(found, np.full(length + 1, num_rows / (length + 1))) > 1e-4


def test_times_of_a_row_are_stratified_and_follow_the_counter_table():
    bounds_S1, index_B, t_B = bounds_of([4, 4, 2], [10], [1, 9]), np.array([5, 2**33, 7]), np.array([0.25, 0.5, 1.0])
    t_S = segment_times(11, index_B, t_B, bounds_S1, 10)
    assert t_S[[0, 3, 4]].tolist() == t_B.tolist()
    for segment, row, number, num, column in ((1, 0, 1, 3, 4), (2, 0, 2, 3, 8), (5, 2, 1, 2, 1)):
        w0, w1, _, _ = philox(11, *counter_of(index_B[row]), column, Stream.SEGMENT_TIME)
        u = ((int(w0) >> 5) * 2**26 + (int(w1) >> 6)) / 2**53
        assert t_S[segment] == pytest.approx((t_B[row] + (number + u) / num) % 1, abs=1e-15)
    many = bounds_of(*[[1] * 10] * 500)
    phase = np.mod(segment_times(11, np.arange(500), np.full(500, 1.0), many, 10), 1).reshape(500, 10)
    assert (np.floor(10 * phase) == np.arange(10)).all()


def test_time_of_every_segment_is_uniform(chi_square_p):
    """Whatever its place in the row: over the rows of stratified batches, and all of them in (0, 1]."""
    documents, batch = [4, 3, 9], 32
    bounds_S1, all_S3 = bounds_of(*[documents] * batch), []
    for step in range(300):
        index_B = step * batch + np.arange(batch)
        all_S3.append(segment_times(5, index_B, stratified_times(5, step, batch), bounds_S1, 16).reshape(batch, 3))
    t_S3 = np.concatenate(all_S3)
    assert t_S3.min() > 0 and t_S3.max() <= 1
    for t_S in t_S3.T:
        assert chi_square_p(np.histogram(t_S, 20, (0, 1))[0], np.full(20, len(t_S) / 20)) > 1e-4
    first, second = np.histogram2d(t_S3[:, 1], t_S3[:, 2], 2, ((0, 1), (0, 1)))[0].sum(0)
    assert chi_square_p([first, second], [len(t_S3) / 2] * 2) > 1e-4


def test_any_split_of_the_rows_gives_the_same():
    num_rows, length = 12, 30
    rng = np.random.default_rng(8)
    documents = [np.diff([0, *np.sort(rng.choice(np.arange(1, length), 3, replace=False)), length])
                 for _ in range(num_rows)]
    x0_BL, t_B = clean(num_rows, length), stratified_times(1, 4, num_rows)

    def part(start: int, stop: int):
        rows = Rows(x0_BL[start:stop], np.ones((stop - start, length), bool), bounds_of(*documents[start:stop]))
        index_B = np.arange(100 + start, 100 + stop)
        rows = cut_rows(rows, row_lengths(42, index_B, length, 0.4))
        t_S = segment_times(42, index_B, t_B[start:stop], rows.bounds_S1, length)
        return noised(rows.ids_BL, t_S, rows.bounds_S1, 100 + start, maskable_BL=rows.maskable_BL)

    whole = part(0, num_rows)
    for size in (1, 3, 4, 6):
        parts = [part(start, start + size) for start in range(0, num_rows, size)]
        for name in set(NAMES) - {"rows_N"}:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts])), name


@pytest.mark.parametrize("weighting", ["count", "exact", "elbo"])
def test_the_mean_of_a_packed_row_is_the_sum_of_its_documents_nelbos(chain, weighting):
    """Two sequences of the enumerable chain in a row, each seen by the network alone, behind an unmaskable prompt."""
    ce_XML = chain.ce_table(chain.random_net())
    num_rows, exact_X = 40_000 if weighting == "exact" else 150_000, chain.exact_nelbo(ce_XML)
    which = torch.from_numpy(np.random.default_rng(3).integers(0, len(chain.x_XL), (num_rows, 2)))
    prompt = torch.zeros(num_rows, 2, dtype=torch.int64)
    x0_BL = torch.cat([prompt, chain.x_XL[which[:, 0]], chain.x_XL[which[:, 1]]], 1)
    bounds_S1 = bounds_of(*[[2, 5, 5]] * num_rows)
    t_S = segment_times(4, np.arange(num_rows), stratified_times(4, 0, num_rows), bounds_S1, 12)
    maskable_BL = np.arange(12) >= 2 + np.zeros((num_rows, 1))
    c = noised(x0_BL, t_S, bounds_S1, weighting=weighting, maskable_BL=maskable_BL)
    every_N = torch.arange(num_rows * 5)
    documents = [dataclasses.replace(c, xt_BL=xt, is_masked_BL=hit, rows_N=every_N, target_N=x0.flatten())
                 for xt, hit, x0 in zip(*(x[:, 2:].split(5, 1) for x in (c.xt_BL, c.is_masked_BL, x0_BL)))]
    ce_BL = torch.zeros(num_rows, 12)
    ce_BL[:, 2:] = torch.cat([chain.ce_fn(ce_XML)(document).view(num_rows, 5) for document in documents], 1)
    terms_N = c.weight_N.double() * ce_BL.flatten()[c.rows_N].double()
    found_B = torch.zeros(num_rows, dtype=torch.float64).index_add(0, c.rows_N // 12, terms_N)
    error_B = found_B - exact_X[which].sum(1)
    standard_error = error_B.std() / num_rows**0.5
    assert abs(error_B.mean()) < 4 * standard_error < 0.02 * exact_X.mean()


def test_lengths_are_the_counter_tables_and_uniform(chi_square_p):
    index_B, length, share = np.arange(2**40, 2**40 + 200_000), 10, 0.25
    length_B = row_lengths(6, index_B, length, share)
    w0, w1, _, _ = philox(6, *counter_of(index_B[:50]), 0, Stream.LENGTH)
    expected = [1 + (int(b) * length >> 32) if int(a) >> 8 < 2**22 else length for a, b in zip(w0, w1)]
    assert length_B[:50].tolist() == expected and length_B.dtype == np.int64
    law = np.full(length, share / length)
    law[-1] += 1 - share
    assert chi_square_p(np.bincount(length_B, minlength=length + 1)[1:], law * len(index_B)) > 1e-4
    assert (row_lengths(6, index_B, length, 0.0) == length).all()
    assert row_lengths(6, index_B, length, 1.0).mean() == pytest.approx(5.5, abs=0.05)


def test_a_cut_row_is_its_beginning_and_a_tail_without_loss():
    rows = Rows(clean(3, 6), np.ones((3, 6), bool))
    assert cut_rows(rows, np.full(3, 6)).bounds_S1 is None
    cut = cut_rows(rows, np.array([6, 2, 1]))
    assert cut.bounds_S1.tolist() == [0, 6, 8, 12, 13, 18] and cut.bounds_S1.dtype == np.int32
    assert cut.maskable_BL.sum(1).tolist() == [6, 2, 1] and (cut.ids_BL == rows.ids_BL).all()
    packed = cut_rows(rows._replace(bounds_S1=bounds_of([2, 4], [2, 4], [2, 4])), np.array([6, 2, 1]))
    assert packed.bounds_S1.tolist() == [0, 2, 6, 8, 12, 13, 14, 18]
    t_B = np.array([0.5, 1.0, 1.0])
    t_S = segment_times(42, np.arange(3), t_B, cut.bounds_S1, 6)
    c = noised(cut.ids_BL, t_S, cut.bounds_S1, maskable_BL=cut.maskable_BL)
    short = noised(cut.ids_BL[1:2, :2], t_B[1:2])
    assert c.num_maskable_B.tolist() == [6, 2, 0, 1, 0] and not c.is_masked_BL[1, 2:].any()
    assert c.weight_N[c.segment_N == 1].tolist() == short.weight_N.tolist() == [1.5, 1.5]


def test_bounds_and_times_that_do_not_fit_are_refused():
    check_bounds(np.array([0, 1, 3, 4, 6], np.int32), 2, 3)
    wrong = ([0, 2, 6], [0, 3], [0, 3, 6, 7], [0, 3, 3, 6], [1, 3, 6], [0, 3, 6.0])
    for bounds in wrong:
        with pytest.raises(ValueError, match="segment bounds"):
            check_bounds(np.array(bounds, np.int32 if 6.0 not in bounds[-1:] else float), 2, 3)
    with pytest.raises(ValueError, match="segment bounds"):
        check_bounds(np.array([0, 3, 6]), 2, 3)
    with pytest.raises(ValueError, match="each of the 3 segments needs a time"):
        noised(clean(2, 3), np.ones(2), np.array([0, 1, 3, 6], np.int32))

"""Stratified times: one row a stratum, uniform, in (0, 1], and independent of how the batch is cut."""

import numpy as np
import pytest

from dlm_scale.diffusion.timestep import stratified_times, wrap_time


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 97, 512])
def test_each_stratum_holds_exactly_one_row(size):
    for step in (0, 1, 5, 2**33):
        t = stratified_times(7, step, size)
        assert t.shape == (size,) and t.dtype == np.float64 and t.min() > 0 and t.max() <= 1
        np.testing.assert_allclose(np.diff(np.sort(t)), 1 / size, atol=1e-12)


def test_rows_get_the_same_times_in_any_split():
    whole = stratified_times(3, 11, 24)
    for world in (1, 2, 3, 4, 8):
        parts = [stratified_times(3, 11, 24, rows=np.arange(r, 24, world)) for r in range(world)]
        assert all(np.array_equal(p, whole[r::world]) for r, p in enumerate(parts))
    assert stratified_times(3, 11, 24, rows=[]).shape == (0,)


def test_times_depend_on_seed_and_step():
    times = [tuple(stratified_times(seed, step, 8)) for seed in (1, 2) for step in (0, 1, 2**32)]
    assert len(set(times)) == 6


def test_a_row_visits_every_time_alike_over_the_steps(chi_square_p):
    t = np.array([stratified_times(5, step, 6) for step in range(4000)])
    for row in range(6):
        counts = np.histogram(t[:, row], bins=20, range=(0, 1))[0]
        assert chi_square_p(counts, np.full(20, 200)) > 1e-4


def test_strata_are_permuted_anew_at_each_step():
    order = {tuple(np.argsort(stratified_times(5, step, 7))) for step in range(300)}
    assert len(order) == 42  # 6 slopes, and the 7 places where the offset may cut the circle


def test_zero_wraps_to_one():
    assert wrap_time(np.array([0.0, 1.0, 2.0, 0.25, 1.75])).tolist() == [1.0, 1.0, 1.0, 0.25, 0.75]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="global_batch_size"):
        stratified_times(0, 0, 0)
    for rows in ([-1], [4]):
        with pytest.raises(ValueError, match="rows"):
            stratified_times(0, 0, 4, rows=rows)

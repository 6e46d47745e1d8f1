"""Philox against its published known answers and a scalar reference; the streams built on it."""

import math

import numpy as np
import pytest

from dlm_scale.diffusion.rng import (
    Stream,
    box_muller,
    counter_of,
    philox,
    standard_normal,
    tensor_key,
    uniform24,
    uniform53,
)


def scalar_philox(key: int, counter: tuple) -> tuple:
    """Philox4x32-10 in plain Python integers, from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % 2**32, key >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    "key, counter, answer",
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_random123_known_answers(key, counter, answer):
    assert tuple(int(w) for w in philox(key, *counter)) == answer
    assert scalar_philox(key, counter) == answer


def test_broadcast_and_long_arrays_equal_the_scalar_reference():
    key, rows = 0x123456789ABCDEF0, np.array([0, 1, 2**32 - 1, 7, 9], np.uint32)
    words = philox(key, rows[:, None], 3, np.arange(5000), Stream.EDIT)
    assert all(w.shape == (5, 5000) and w.dtype == np.uint32 for w in words)
    rng = np.random.default_rng(0)
    for i, j in zip(rng.integers(0, 5, 300), rng.integers(0, 5000, 300)):
        assert tuple(int(w[i, j]) for w in words) == scalar_philox(key, (int(rows[i]), 3, int(j), 4))


def test_philox_refuses_what_it_cannot_use():
    for key in (-1, 2**64):
        with pytest.raises(ValueError, match="key"):
            philox(key, 0, 0, 0, 0)
    with pytest.raises(TypeError):
        philox(0, 0.5, 0, 0, 0)


def test_counter_of_splits_64_bits():
    low, high = counter_of(np.array([5, 2**32 + 7, 2**63 - 1]))
    assert low.tolist() == [5, 7, 2**32 - 1] and high.tolist() == [0, 1, 2**31 - 1]


def test_streams_are_the_counter_table():
    names = "MASK REPLACEMENT SEGMENT_TIME LENGTH EDIT CRITIC PART TIME ORDER INIT EVAL SAMPLE SYNTHETIC GAUSS".split()
    assert [(s.name, int(s)) for s in Stream] == [(n, i) for i, n in enumerate(names)]


def test_uniforms_at_their_ends():
    ends = np.array([0, 255, 256, 2**32 - 1], np.uint32)
    assert uniform24(ends).tolist() == [0, 0, 1, 2**24 - 1] and uniform24(ends).dtype == np.int32
    assert uniform53(ends[0], ends[0]) == 0.0 and uniform53(ends[3], ends[3]) == 1 - 2.0**-53
    assert uniform53(np.uint32(32), np.uint32(64)) == 2.0**-27 + 2.0**-53


def test_tensor_key_is_stable_and_separates_names_and_seeds():
    keys = [tensor_key(s, n) for s in (0, 1, 11) for n in ("embedding", "layers.0.wq", "1embedding")]
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**64 for k in keys)
    assert tensor_key(1, "embedding") == 0x842265A8B1346651


def test_normals_do_not_depend_on_how_the_sequence_is_cut():
    whole = standard_normal(3, 0, 70_001, Stream.INIT)
    rng = np.random.default_rng(1)
    for _ in range(200):
        first, count = int(rng.integers(0, 70_000)), int(rng.integers(0, 60))
        assert np.array_equal(standard_normal(3, first, count, Stream.INIT), whole[first : first + count])
    assert np.array_equal(standard_normal(3, 1, 40_000, Stream.INIT), whole[1:40_001])


def test_normals_reach_beyond_32_bit_blocks():
    far = 2**36
    assert np.array_equal(standard_normal(3, far - 3, 9, Stream.INIT)[3:], standard_normal(3, far, 6, Stream.INIT))
    assert not np.array_equal(standard_normal(3, far, 8, Stream.INIT), standard_normal(3, 0, 8, Stream.INIT))


def test_normals_are_the_box_muller_transform_of_the_words():
    words = scalar_philox(9, (2, 0, 0, int(Stream.INIT)))
    expected = []
    for a, b in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
        expected += [radius * math.cos(2 * math.pi * b / 2**32), radius * math.sin(2 * math.pi * b / 2**32)]
    np.testing.assert_allclose(standard_normal(9, 8, 4, Stream.INIT), expected, rtol=1e-6)


def test_normals_are_finite_for_the_extreme_words():
    z = box_muller(np.array([[0, 2**32 - 1], [0, 0], [2**32 - 1, 0], [0, 2**31]], np.uint32))
    largest, smallest = math.sqrt(66 * math.log(2)), math.sqrt(-2 * math.log1p(-(2.0**-33)))
    expected = [largest, 0, smallest, 0, smallest, 0, -largest, 0]
    np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-14)


def test_normals_follow_the_normal_law():
    z = np.sort(standard_normal(11, 0, 400_000, Stream.INIT).astype(np.float64))
    cdf = 0.5 * (1 + np.vectorize(math.erf)(z[::40] / math.sqrt(2)))
    assert np.abs(cdf - np.arange(0, z.size, 40) / z.size).max() < 1.95 / math.sqrt(z.size)  # Kolmogorov, p = 0.001
    lanes = standard_normal(11, 0, 400_000, Stream.INIT).reshape(-1, 4).astype(np.float64)
    assert np.abs(np.corrcoef(lanes.T) - np.eye(4)).max() < 5 / math.sqrt(100_000)


def test_normals_refuse_negative_ranges():
    with pytest.raises(ValueError):
        standard_normal(0, -1, 4, Stream.INIT)

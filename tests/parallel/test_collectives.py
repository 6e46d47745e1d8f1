"""Each collective and its backward pass are adjoint linear maps: <f(x), y> = <x, f^T(y)>, summed over the ranks.

A value that all ranks hold ("whole") is one vector: it counts once. Partial and sharded ones are a vector a rank.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.forked import run_ranks

SIZES = (2, 4)
BATCH, LENGTH, WIDTH = 3, 8, 5
ROWS = [0, 3, 4, 7, 8, 13, 23]  # at the borders of the parts, some parts without any


def value(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pull_back(function, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(f(x), f^T(y))."""
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(y)
    return out.detach(), x.grad


def _maps(rank: int, size: int, group) -> dict:
    """Name: (function, this rank's x, this rank's y, whether x and y are whole)."""
    from dlm_scale.parallel import collectives as c

    whole, part = (BATCH, LENGTH, WIDTH), (BATCH, LENGTH // size, WIDTH)
    rows_N = torch.tensor(ROWS)
    tail = (6, WIDTH)
    return {
        "sum_gradient": (lambda x: c.sum_gradient(x, group), value(1, *whole), value(10 + rank, *whole), True, False),
        "sum_partial": (lambda x: c.sum_partial(x, group), value(10 + rank, *whole), value(2, *whole), False, True),
        "gather_sequence": (lambda x: c.gather_sequence(x, group), value(10 + rank, *part), value(20 + rank, *whole),
                            False, False),
        "scatter_sequence": (lambda x: c.scatter_sequence(x, group), value(10 + rank, *whole), value(20 + rank, *part),
                             False, False),
        "select_sharded_rows": (lambda x: c.select_sharded_rows(x, rows_N, group), value(10 + rank, *part),
                                value(2, len(rows_N), WIDTH), False, True),
        "select_no_rows": (lambda x: c.select_sharded_rows(x, rows_N[:0], group), value(10 + rank, *part),
                           value(2, 0, WIDTH), False, True),
        "sum_gradient_of_tail": (lambda x: c.sum_gradient_of_tail(x, 2, group), value(10 + rank, *tail),
                                 value(20 + rank, *tail), False, False),
    }


def _run(size: int) -> dict:
    from dlm_scale.engine.runtime import start_runtime

    mesh = start_runtime("cpu", size).mesh
    maps, results = _maps(mesh.tensor_rank, size, mesh.tensor_group), {}
    for name, (function, x, y, x_whole, y_whole) in maps.items():
        tensors = (x, y, *pull_back(function, x, y))
        results[name] = (*(tensor.numpy() for tensor in tensors), x_whole, y_whole)
    return results


@pytest.fixture(scope="module")
def ran():
    """[rank][name] of each size: x, y, f(x) and f^T(y), and whether x and y are whole."""
    return {size: run_ranks(size, _run, size) for size in SIZES}


def products(per_rank: list, name: str) -> tuple[float, float]:
    """(<f(x), y>, <x, f^T(y)>) over the ranks."""
    forward = backward = 0.0
    for rank, results in enumerate(per_rank):
        x, y, out, gradient, x_whole, y_whole = results[name]
        forward += float((out * y).sum()) * (rank == 0 or not y_whole)
        backward += float((x * gradient).sum()) * (rank == 0 or not x_whole)
    return forward, backward


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["sum_gradient", "sum_partial", "gather_sequence", "scatter_sequence",
                                  "select_sharded_rows", "select_no_rows"])
def test_backward_is_the_adjoint(name, size, ran):
    forward, backward = products(ran[size], name)
    assert forward == pytest.approx(backward, rel=1e-12)
    assert name == "select_no_rows" or abs(forward) > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_forward_values(size, ran):
    everyone = ran[size]
    parts = {name: [results[name][0] for results in everyone] for name in everyone[0]}
    joined_BLD = np.concatenate(parts["select_sharded_rows"], axis=1)
    for rank, results in enumerate(everyone):
        out = {name: result[2] for name, result in results.items()}
        np.testing.assert_array_equal(out["sum_gradient"], parts["sum_gradient"][0])
        np.testing.assert_allclose(out["sum_partial"], sum(parts["sum_partial"]), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(out["gather_sequence"], np.concatenate(parts["gather_sequence"], axis=1))
        scattered = np.split(sum(parts["scatter_sequence"]), size, axis=1)[rank]
        np.testing.assert_allclose(out["scatter_sequence"], scattered, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(out["select_sharded_rows"], joined_BLD.reshape(-1, WIDTH)[ROWS])
        assert out["select_no_rows"].shape == (0, WIDTH)


@pytest.mark.parametrize("size", SIZES)
def test_whole_gradients_are_equal_on_all_ranks(size, ran):
    for results in ran[size]:
        np.testing.assert_array_equal(results["sum_gradient"][3], ran[size][0]["sum_gradient"][3])


@pytest.mark.parametrize("size", SIZES)
def test_the_shared_tail_of_a_weight_gets_the_sum_and_the_rest_its_own(size, ran):
    total = sum(results["sum_gradient_of_tail"][1] for results in ran[size])
    for results in ran[size]:
        weight, own, out, gradient, *_ = results["sum_gradient_of_tail"]
        np.testing.assert_array_equal(out, weight)
        np.testing.assert_array_equal(gradient[:-2], own[:-2])
        np.testing.assert_allclose(gradient[-2:], total[-2:], rtol=1e-12, atol=1e-12)

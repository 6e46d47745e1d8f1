"""Muon is the same update at every layout, and is what its formula says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dlm_scale.engine.muon import COEFFICIENTS, NS_STEPS, newton_schulz
from tests.engine.cases import case_config, differences, run_engine, run_twin
from tests.forked import run_ranks

STEPS = 6
MUON = {"optimizer__name": "muon", "optimizer__muon_learning_rate": 0.01}
CASES = {
    (1, 2): [{"zero__stage": stage, "train__micro_batch_size": 2} for stage in range(4)],
    (2, 2): [{"zero__stage": stage, "parallel__sequence_parallel": bool(stage % 2)} for stage in range(4)],
    (2, 4): [{"zero__stage": stage, "parallel__sequence_parallel": True, "train__micro_batch_size": 2} for stage in (0, 1, 3)],
}


def _run_cases(tensor_size, cases):
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", tensor_size)
    return [run_engine(runtime, case_config(parallel__tensor_parallel_size=tensor_size, **MUON, **case), STEPS)
            for case in cases]


@pytest.fixture(scope="module")
def twin():
    return run_twin(case_config(**MUON), STEPS)


@pytest.mark.parametrize("layout", CASES, ids=lambda c: f"tp{c[0]}_world{c[1]}")
def test_every_layout_equals_the_twin(layout, twin):
    tensor_size, world = layout
    for case, result in zip(CASES[layout], run_ranks(world, _run_cases, tensor_size, CASES[layout])[0]):
        found = differences(result, twin)
        assert found["hashes"] == 0
        assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-5 and found["weights"] < 1e-4, (case, found)


def test_fewer_key_value_heads_than_ranks():
    case = {"model__num_kv_heads": 1, "zero__stage": 1, "parallel__sequence_parallel": True}
    result = run_ranks(2, _run_cases, 2, [case])[0][0]
    found = differences(result, run_twin(case_config(model__num_kv_heads=1, **MUON), STEPS))
    assert found["loss"] < 1e-5 and found["weights"] < 1e-4, found


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_newton_schulz_follows_its_polynomial(shape):
    """Each step acts on the singular values alone: s -> a s + b s^3 + c s^5 (an oracle in float64)."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = np.linalg.svd(matrix.numpy().astype(np.float64), full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(NS_STEPS):
        values = sum(c * values ** (2 * i + 1) for i, c in enumerate(COEFFICIENTS))
    wanted = torch.from_numpy(left * values @ right).float()
    torch.testing.assert_close(newton_schulz(matrix), wanted, rtol=1e-4, atol=2e-5)


def test_newton_schulz_commutes_with_rotations():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(12, 20, generator=generator)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    torch.testing.assert_close(newton_schulz(rotation @ matrix), rotation @ newton_schulz(matrix), rtol=1e-4, atol=1e-4)
    assert math.isclose(newton_schulz(7.0 * matrix).norm(), newton_schulz(matrix).norm(), rel_tol=1e-4)

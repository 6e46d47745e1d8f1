"""Optimizer states and weights offloaded to the host: the same numbers."""

from __future__ import annotations

import pytest

from tests.engine.cases import case_config, differences, run_engine, run_twin
from tests.forked import run_ranks

HOST = {"device": "cpu"}
CASES = {
    "zero1": {"zero__stage": 1, "zero__offload_optimizer": HOST},
    "zero2": {"zero__stage": 2, "zero__offload_optimizer": HOST},
    "zero3": {"zero__stage": 3, "zero__offload_optimizer": HOST, "zero__offload_param": HOST},
    "zero1_muon": {"zero__stage": 1, "zero__offload_optimizer": HOST, "optimizer__name": "muon"},
    "zero3_muon": {"zero__stage": 3, "zero__offload_optimizer": HOST, "optimizer__name": "muon"},
}
STEPS = 5


def _run_all():
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", 1)
    configs = {name: case_config(train__micro_batch_size=2, **case) for name, case in CASES.items()}
    return {name: run_engine(runtime, config, STEPS) for name, config in configs.items()}


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, _run_all)[0]


@pytest.mark.parametrize("name", CASES)
def test_offloading_changes_no_number(name, results):
    twin = run_twin(case_config(optimizer__name=CASES[name].get("optimizer__name", "adamw")), STEPS)
    found = differences(results[name], twin)
    assert found["hashes"] == 0
    assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-5 and found["weights"] < 1e-5, found

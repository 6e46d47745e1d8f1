"""A layout, a ZeRO stage or a batch split is a choice of cost, never of result."""

from __future__ import annotations

import itertools

import pytest

from tests.engine.cases import case_config, differences, run_engine, run_twin
from tests.forked import run_ranks

STEPS = 6
LAYOUTS = {f"zero{stage}_micro{micro}": dict(zero__stage=stage, train__micro_batch_size=micro)
           for stage, micro in itertools.product(range(4), (4, 2))}


def _all_layouts(names):
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", 1)
    return {name: run_engine(runtime, case_config(**LAYOUTS[name]), STEPS) for name in names}


@pytest.fixture(scope="module")
def twin():
    return run_twin(case_config(), STEPS)


@pytest.fixture(scope="module")
def two_ranks():
    import deepspeed  # noqa: F401  (imported once, before the fork)

    return run_ranks(2, _all_layouts, tuple(LAYOUTS))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_equal_the_plain_torch_twin(name, two_ranks, twin):
    found = differences(two_ranks[name], twin)
    assert found["hashes"] == 0
    assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-5 and found["weights"] < 1e-5, found

"""bf16 over the layouts: no further from one process than two one-process runs are from each other, times three.

The two differ in the order of summation alone: the batch in one piece, or in four. Their spread is the largest
difference of their losses over the steps. (At the first step it is 1e-7, since splitting the batch changes gradients
only, while tensor parallelism also rounds the partial sums of the forward pass.)
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.cases import Case, import_distributed, run_engine
from tests.forked import run_ranks

STEPS = 10
ONE = [Case(0, 1, 1), Case(0, 1, 1, 4)]
SOME = [  # cases of one process group
    [Case(0, 1, 2, 2), Case(2, 1, 2)],
    [Case(1, 2, 1, 2, True)],
    [Case(3, 2, 2, 1, True)],
]
REST = [
    [Case(1, 1, 2, 2), Case(3, 1, 2)],
    [Case(0, 2, 1), Case(2, 2, 1, 1, True), Case(3, 2, 1, 2)],
    [Case(0, 2, 2, 2), Case(1, 2, 2, 1, True), Case(2, 2, 2)],
    [Case(stage, 1, 4) for stage in range(4)],
    [Case(0, 4, 1), Case(1, 4, 1, 1, True), Case(2, 4, 1, 2), Case(3, 4, 1, 1, True)],
]


def _run(cases: list[Case]) -> dict:
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", cases[0].tensor)
    return {case: run_engine(runtime, case.config(train__precision="bf16"), STEPS) for case in cases}


def losses_of(cases: list[Case]) -> dict[Case, np.ndarray]:
    import_distributed()
    runs = run_ranks(cases[0].tensor * cases[0].data, _run, cases)[0]
    return {case: np.array([line["loss"] for line in run["lines"]]) for case, run in runs.items()}


@pytest.fixture(scope="module")
def one():
    """(losses of one process, their spread)."""
    whole, pieces = losses_of(ONE).values()
    return whole, abs(whole - pieces).max()


def test_the_yardstick_is_bf16_rounding_and_no_more(one):
    assert 1e-5 < one[1] < 1e-2


@pytest.mark.parametrize("cases", [*SOME, *(pytest.param(cases, marks=pytest.mark.slow) for cases in REST)],
                         ids=lambda cases: "+".join(map(str, cases)))
def test_a_layout_is_within_the_spread_of_one_process(cases, one):
    whole, spread = one
    for case, losses in losses_of(cases).items():
        print(f"{case}: {abs(losses - whole).max():.1e}, spread {spread:.1e}")
        assert np.isfinite(losses).all()
        assert abs(losses - whole).max() <= 3 * spread

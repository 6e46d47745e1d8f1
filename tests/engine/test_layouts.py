"""A layout, a ZeRO stage or a batch split is a choice of cost, never of result.

A covering subset of the whole matrix (tests/engine/matrix.py): every stage at every layout, with and without sequence
parallelism and accumulation, every model variant at every tensor-parallel size.
"""

from __future__ import annotations

import itertools
import sys

import pytest

from tests.engine.cases import MODELS, Case, case_config, differences, import_distributed, run_cases, run_engine, twins
from tests.forked import run_ranks

STEPS, TOLERANCE = 10, 1e-5


def covering(tensor: int, data: int, turn: int) -> list[Case]:
    """Every stage with both accumulations; sequence parallelism and model variants take turns, what is left of them last."""
    names = list(MODELS)
    cases = [
        Case(stage, tensor, data, accumulation, tensor > 1 and bool((stage + accumulation + turn) % 2),
             names[(2 * stage + accumulation + turn) % len(names)])
        for stage, accumulation in itertools.product(range(4), (1, 2))
    ]
    left = [name for name in names if name not in {case.model for case in cases}]
    return cases + [Case(3, tensor, data, 1, tensor > 1, name) for name in left]


WORLDS = {
    "TP1xDP2": covering(1, 2, 0),
    "TP2xDP1": covering(2, 1, 0),
    "TP2xDP2": covering(2, 2, 1),
    "TP4xDP1": [
        Case(0, 4, 1, 2, False, "gqa"),
        Case(1, 4, 1, 1, True, "adaln"),
        Case(2, 4, 1, 1, False, "chars"),
        Case(3, 4, 1, 1, True, "mqa"),
    ],
}
CASES = [case for world in WORLDS.values() for case in world]


@pytest.fixture(scope="module")
def twin():
    return twins(CASES, STEPS)


@pytest.fixture(scope="module")
def ran():
    """`ran(layout)`: the results of all cases of a layout, from one process group."""
    import_distributed()
    done = {}

    def results(layout: str):
        if layout not in done:
            cases = WORLDS[layout]
            done[layout] = run_ranks(cases[0].tensor * cases[0].data, run_cases, cases, STEPS)[0]
        return done[layout]

    return results


@pytest.mark.parametrize(("layout", "case"), [(name, case) for name in WORLDS for case in WORLDS[name]],
                         ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_a_layout_equals_the_plain_torch_twin(layout, case, ran, twin):
    found = differences(ran(layout)[case], twin[case.model])
    assert found["hashes"] == 0
    assert max(found["loss"], found["grad_norm"], found["weights"]) < TOLERANCE, found


def test_clipping_is_active_and_the_weights_move(twin):
    limit = case_config().optimizer.gradient_clip
    for name, run in twin.items():
        assert min(line["grad_norm"] for line in run["lines"]) > limit, name


def test_the_subset_covers_what_it_says():
    names = {(case.tensor > 1, case.stage, case.accumulation, case.sequence) for case in CASES}
    assert names >= set(itertools.product((True,), range(4), (1, 2), (False, True)))
    assert {(c.tensor, c.model) for c in CASES if c.tensor < 4} == set(itertools.product((1, 2), MODELS))
    assert {c.model for c in CASES if c.tensor == 4} >= {"gqa", "mqa", "chars"}


class _Refuse:
    """An import hook that refuses megatron."""

    def find_spec(self, name, _path=None, _target=None):
        if name.split(".")[0] == "megatron":
            raise ImportError(f"{name} at tensor-parallel size 1")


def _without_megatron() -> bool:
    from dlm_scale.engine.runtime import start_runtime

    for name in [name for name in sys.modules if name.startswith(("megatron", "dlm_scale.parallel.tensor_parallel"))]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Refuse())
    run_engine(start_runtime("cpu", 1), case_config(), 1)
    return not any(name.startswith("megatron") for name in sys.modules)


def test_one_tensor_parallel_rank_needs_no_megatron():
    assert run_ranks(1, _without_megatron) == [True]

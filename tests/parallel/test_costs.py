"""Bytes sent and bytes held are what the closed formulas of docs/parallel.md say, counted in real steps."""

from __future__ import annotations

import pytest

from benchmarks.benchmark_collectives import NOT_RESIDENT, Ledger, expected_bytes, state_bytes, watch_gradients
from tests.engine.cases import Case, data_of, import_distributed, start_noisy
from tests.forked import run_ranks

RESIDENCY = dict(setting.replace("deepspeed.zero_optimization.", "zero__").split("=") for setting in NOT_RESIDENT)
CASES = {
    1: [
        (Case(0, 1, 2, 2), "fp32"),
        (Case(1, 1, 2, 2), "fp32"),
        (Case(2, 1, 2, 2), "fp32"),
        (Case(3, 1, 2, 2), "fp32"),
        (Case(0, 1, 2), "bf16"),
        (Case(1, 1, 2), "bf16"),
        (Case(2, 1, 2), "bf16"),
        (Case(3, 1, 2), "bf16"),
    ],
    2: [
        (Case(1, 2, 2, 2), "fp32"),
        (Case(1, 2, 2, 1, True), "fp32"),
        (Case(3, 2, 2, 2, True), "fp32"),
        (Case(2, 2, 2, 1, False, "mqa"), "fp32"),
        (Case(0, 2, 2, 1, True, "adaln"), "fp32"),
        (Case(1, 2, 2, 1, False, "recompute"), "fp32"),
        (Case(1, 2, 2, 1, True, "recompute"), "fp32"),
        (Case(3, 2, 2, 1, True), "bf16"),
    ],
}
ALL = [(*case, world) for world, cases in CASES.items() for case in cases]


def _run(cases: list) -> dict:
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime
    from dlm_scale.engine.step import make_batch, train_step

    ledger, held, results = Ledger().install(), watch_gradients(), {}
    runtime = start_runtime("cpu", cases[0][0].tensor)
    ledger.name_groups(runtime.mesh)
    for case, precision in cases:
        config = case.config(train__precision=precision, **{key: int(value) for key, value in RESIDENCY.items()})
        data = data_of(config)
        trainer, state = build_trainer(config, runtime, data.vocabulary), None
        state = start_noisy(trainer)
        for _ in range(3):  # ZeRO 3 compares its traces over the ranks in the first two
            batch = make_batch(trainer, data, state)
            ledger.clear()
            train_step(trainer, batch, state)
            state = state.advanced(config.train.global_batch_size)
        counted = {key: size for key, size in ledger.bytes.items() if key[0] != "scalars"}
        parameters = list(trainer.engine.module.parameters())
        results[case, precision] = {
            "counted": counted, "expected": expected_bytes(trainer, batch), "scalars": ledger.calls["scalars", "any"],
            "state": state_bytes(trainer) | held, "parameters": len(parameters),
            "numel": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        }
    return results


@pytest.fixture(scope="module")
def ran():
    import_distributed()
    done = {}

    def results(world: int) -> list:
        if world not in done:
            done[world] = run_ranks(2 * world, _run, CASES[world])
        return done[world]

    return results


@pytest.mark.parametrize(("case", "precision", "world"), ALL, ids=lambda v: str(v))
def test_bytes_sent(case, precision, world, ran):
    for rank in ran(world):
        found = rank[case, precision]
        assert found["counted"] == found["expected"]
        assert found["scalars"] <= 6


@pytest.mark.parametrize(("case", "precision", "world"), ALL, ids=lambda v: str(v))
def test_bytes_held(case, precision, world, ran):
    """Weights; the optimizer's two moments, and a master where the weights are not it; gradients before the update."""
    for rank in ran(world):
        found = rank[case, precision]
        numel, item, share = found["numel"], {"fp32": 4, "bf16": 2}[precision], case.data
        padding = 4 * share * found["parameters"]
        weights = item * numel / (share if case.stage == 3 else 1)
        masters = 4 if precision == "bf16" or case.stage else 0
        optimizer = (8 + masters) * numel / (share if case.stage else 1)
        gradients = (item if case.stage == 0 else 4 / share) * numel
        if (case.stage, precision) == (1, "bf16"):  # whole float32 sums beside the bf16 gradients
            gradients = 6 * numel
        assert gradients <= found["state"]["gradients"] <= gradients + 6 * padding
        assert weights <= found["state"]["weights"] <= weights + item * padding
        assert optimizer <= found["state"]["optimizer"] <= optimizer + 12 * padding

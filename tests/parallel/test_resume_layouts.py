"""A checkpoint of one layout is continued at any other: same weights, same batches, same losses."""

from __future__ import annotations

import pytest
import torch

from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from tests.engine.cases import Case, import_distributed, logical_weights, start_noisy, train_lines
from tests.forked import run_ranks

STEPS, MORE, TOLERANCE = 10, 3, 1e-5
FIRST = Case(3, 2, 2, 2, True, "gqa")
OTHERS = {
    "TP1xDP1 ZeRO 0": Case(0, 1, 1, 1, False, "gqa"),
    "TP1xDP4 ZeRO 1": Case(1, 1, 4, 1, False, "gqa"),
    "TP4xDP1 ZeRO 3": Case(3, 4, 1, 2, True, "gqa"),
}


def _run(case: Case, folder, checkpoint, steps: int, more: int) -> dict:
    """From the checkpoint (None: from the start): hash of the weights, `steps` steps, save, `more` steps."""
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime
    from dlm_scale.engine.saving import restore, save
    from tests.engine.cases import data_of

    runtime, config = start_runtime("cpu", case.tensor), case.config(train__ema_decay=0.9)
    data = data_of(config)
    trainer = build_trainer(config, runtime, data.vocabulary)
    state = restore(trainer, open_checkpoint(checkpoint)) if checkpoint else start_noisy(trainer)
    before = hash_of(trainer)
    lines, state = train_lines(trainer, data, state, steps)
    saved = save(trainer, state, folder, {}, data.fingerprint)
    further, _ = train_lines(trainer, data, state, more)
    return {"hash_before": before, "hash_saved": hash_of(trainer) if not more else None, "lines": lines + further,
            "checkpoint": saved, "slots": {slot: logical_weights(trainer, slot) for slot in ("ema", "exp_avg_sq")}}


def hash_of(trainer) -> str:
    return weights_hash(sorted((name, torch.from_numpy(w)) for name, w in logical_weights(trainer).items()))


def run(case: Case, *args) -> dict:
    return run_ranks(case.tensor * case.data, _run, case, *args)[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """10 steps, a checkpoint, and the steps that everyone else must repeat."""
    import_distributed()
    return run(FIRST, tmp_path_factory.mktemp("first"), None, STEPS, MORE)


@pytest.fixture(scope="module")
def there(uninterrupted, tmp_path_factory):
    """`there(name)`: one step at another layout, a checkpoint, one more step."""
    done = {}

    def results(name: str) -> dict:
        if name not in done:
            folder = tmp_path_factory.mktemp("other")
            done[name] = run(OTHERS[name], folder, uninterrupted["checkpoint"], 1, 1)
        return done[name]

    return results


def assert_same_lines(found: list, wanted: list) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one["hash"] == other["hash"]
        assert one["loss"] == pytest.approx(other["loss"], abs=TOLERANCE)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)


@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_goes_on_where_this_one_stood(name, there, uninterrupted):
    found = there(name)
    assert found["hash_before"] == weights_hash(open_checkpoint(uninterrupted["checkpoint"]))
    assert_same_lines(found["lines"], uninterrupted["lines"][STEPS : STEPS + 2])


@pytest.mark.parametrize("name", OTHERS)
def test_and_back_again(name, there, uninterrupted, tmp_path):
    """The other layout's checkpoint, one step on, is continued at the first layout."""
    found = run(FIRST, tmp_path, there(name)["checkpoint"], 2, 0)
    assert found["hash_before"] == weights_hash(open_checkpoint(there(name)["checkpoint"]))
    assert found["hash_saved"] == weights_hash(open_checkpoint(found["checkpoint"]))
    assert_same_lines(found["lines"], uninterrupted["lines"][STEPS + 1 :])
    for slot, tensors in found["slots"].items():
        for tensor, values in tensors.items():
            assert abs(values - uninterrupted["slots"][slot][tensor]).max() < TOLERANCE, (slot, tensor)


def test_a_step_changes_the_weights(uninterrupted, there):
    assert uninterrupted["hash_before"] != there("TP1xDP1 ZeRO 0")["hash_before"]

"""Losses and gradients that are not finite, spikes, slow ranks: seen, agreed on, counted."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from dlm_scale.config import config_from_dict
from dlm_scale.engine.health import SPIKE_SIGMAS, SPIKE_WINDOW, SpikeDetector, slow_ranks
from tests.engine.cases import case_config, data_of, import_distributed, start_noisy
from tests.engine.reliability import assert_no_secret, break_losses, status, train
from tests.forked import run_ranks

CASES = {
    "zero0": {},
    "zero1": {"zero__stage": 1},
    "zero2": {"zero__stage": 2},
    "zero3": {"zero__stage": 3},
    "zero1-bf16": {"zero__stage": 1, "train__precision": "bf16"},
    "zero2-offload": {"zero__stage": 2, "zero__offload_optimizer": {"device": "cpu"}},
    "zero0-muon": {"optimizer__name": "muon"},
    "zero3-muon": {"zero__stage": 3, "optimizer__name": "muon"},
}
POISONS = {"loss": torch.inf, "gradient": torch.nan}


def _poisoned_steps() -> dict:
    """Two good steps, one that is poisoned in one micro-batch of the last rank, one good step: for every case."""
    from dlm_scale.engine import step
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime

    runtime, objective, results = start_runtime("cpu", 1), step.loss_of, {}
    for name, overrides in CASES.items():
        config = case_config(train__micro_batch_size=2, train__ema_decay=0.9, **overrides)
        trainer, data = build_trainer(config, runtime, (data := data_of(config)).vocabulary), data
        state = start_noisy(trainer)
        for what in ("loss", "gradient"):
            for place in ("good", "good", "bad", "good"):
                calls = []

                def poisoned(*args):
                    loss, stats = objective(*args)
                    calls.append(1)
                    if place == "bad" and len(calls) == 1 and runtime.env.rank == runtime.env.world_size - 1:
                        if what == "loss":  # infinite, with a gradient that is finite
                            return loss + torch.inf, stats
                        loss = loss * 1.0
                        loss.register_hook(lambda gradient: gradient * torch.nan)
                    return loss, stats

                step.loss_of = poisoned
                before = _slots(trainer)
                result = step.train_step(trainer, step.make_batch(trainer, data, state), state)
                results[name, what, place] = {"skipped": result["is_skipped"],
                                              "micro_steps": trainer.engine.micro_steps,
                                              "changed": _changed(before, _slots(trainer))}
                state = state.advanced(config.train.global_batch_size)
    return results


def _slots(trainer) -> dict:
    """Everything that a checkpoint would hold of this rank, and the weights of the forward pass."""
    slots = {(p.name, p.slot, p.box, p.flat_start): p.tensor.clone() for p in trainer.state_access.pieces()}
    module = {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in trainer.engine.module.named_parameters()}
    return slots | module


def _changed(before: dict, after: dict) -> float:
    """The part of the tensors that changed; NaN where one is no longer finite."""
    assert before.keys() == after.keys()
    if not all(tensor.isfinite().all() for tensor in after.values()):
        return math.nan
    return sum(not torch.equal(before[key], after[key]) for key in before) / len(before)


@pytest.fixture(scope="module")
def poisoned():
    import_distributed()
    return run_ranks(2, _poisoned_steps)


@pytest.mark.parametrize("what", POISONS)
@pytest.mark.parametrize("name", CASES)
def test_no_rank_updates_where_one_has_no_finite_number(name, what, poisoned):
    for rank in poisoned:
        bad, good = rank[name, what, "bad"], rank[name, what, "good"]
        assert bad["skipped"] and bad["changed"] == 0.0
        assert not good["skipped"] and good["changed"] > 0.9  # the step after it
        assert bad["micro_steps"] % 2 == good["micro_steps"] % 2 == 0


def test_a_run_with_a_skipped_step_resumes_bit_equal(config_file, tmp_path):
    def change(rank):
        break_losses({4})

    for out, *overrides in (["a"], ["b", "train.stop_at_step=6"], ["b"]):
        assert train(config_file, tmp_path / out, "data.validation=null", *overrides, change=change) == [0]
    assert status(tmp_path / "a")["weights_hash"] == status(tmp_path / "b")["weights_hash"]
    assert status(tmp_path / "a")["skipped_steps"] == 1
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("grad_norm", 0) is None] == [4]
    assert "step 4: loss or gradient is not finite" in (tmp_path / "a" / "train.log").read_text()
    assert [p.name for p in (tmp_path / "a" / "bad_batches").iterdir()] == ["step_00000004.json"]


def test_three_in_a_row_end_the_run_and_name_the_samples(config_file, tmp_path):
    codes = train(config_file, tmp_path, "train.micro_batch_size=2", "data.validation=null", ranks=2,
                  change=lambda rank: break_losses({2, 5, 6, 7}) if rank == 1 else None)
    assert codes == [1, 1]
    found = status(tmp_path)
    assert found["status"] == "failed" and "TrainingFailed" in found["error"]
    assert "data.skip_samples=[[32,56]]" in found["error"]
    dumps = {int(p.stem[5:]): json.loads(p.read_text()) for p in (tmp_path / "bad_batches").iterdir()}
    assert sorted(dumps) == [2, 5, 6, 7]
    rows = [micro["samples"] for rank in dumps[5]["micro_batches_of_ranks"] for micro in rank]
    assert sorted(sum(rows, [])) == list(range(32, 40))
    losses = [[micro["loss_sum"] is None for micro in rank] for rank in dumps[5]["micro_batches_of_ranks"]]
    assert losses == [[False, False], [True, True]]
    assert_no_secret(tmp_path)


def test_a_tenfold_loss_is_a_spike_and_clean_runs_have_none():
    alarms = []
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(size=1500)
        losses = 3.0 + 5.0 * np.exp(-np.arange(1500) / 100) + 0.3 * noise
        detector = SpikeDetector()
        alarms += [loss for loss in losses if detector.sigmas(loss) > SPIKE_SIGMAS]
        assert detector.sigmas(30.0) > SPIKE_SIGMAS
    assert alarms == []


def test_a_spike_needs_a_whole_window():
    detector = SpikeDetector()
    found = [detector.sigmas(10.0 if step % 2 else 9.0) for step in range(SPIKE_WINDOW)]
    assert found == [0.0] * SPIKE_WINDOW
    assert detector.sigmas(9.5 + 0.5 * 7) == pytest.approx(7.0)


def test_slow_ranks_are_those_far_over_the_median():
    assert slow_ranks([1.0, 1.1, 0.9, 3.0], 10.0) == [(3, 3.0, 1.0)]
    assert slow_ranks([1.0, 3.0], 10.0) == [(1, 3.0, 1.0)]
    assert slow_ranks([1.0, 1.4], 1.0) == []
    assert slow_ranks([0.01, 0.03], 10.0) == []  # three times as slow, and costs nothing


def test_a_slow_rank_is_named(config_file, tmp_path):
    def slow(rank):
        from dlm_scale.engine import step

        objective = step.loss_of
        step.loss_of = lambda *args: (time.sleep(0.1 * rank), objective(*args))[1]

    codes = train(config_file, tmp_path, "train.num_steps=6", "train.log_every=3", "train.micro_batch_size=2", ranks=2,
                  change=slow)
    assert codes == [0, 0]
    text = (tmp_path / "train.log").read_text()
    assert text.count("rank 1 is slow: ") == 2 and "rank 0 is slow" not in text


def test_ranges_of_samples_are_passed_over():
    from dlm_scale.engine.step import sample_ids

    ranges = ((3, 5), (5, 6), (10, 14))
    expected = [i for i in range(60) if not any(a <= i < b for a, b in ranges)]
    assert sample_ids(ranges, np.arange(40)).tolist() == expected[:40]
    assert sample_ids((), np.arange(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value, expected", [
    ([8, 16], ((8, 16),)), ([[8, 16], [20, 21]], ((8, 16), (20, 21))), ([], ()),
])
def test_ranges_in_a_config(value, expected):
    assert _with_ranges(value).data.skip_samples == expected


@pytest.mark.parametrize("value", [
    [16, 8], [8, 8], [[8, 16], [12, 20]], [[20, 21], [8, 16]], [8], [-1, 4], "8", [1.5, 2],
])
def test_wrong_ranges_are_refused(value):
    from dlm_scale.errors import UsageError

    with pytest.raises(UsageError, match="data.skip_samples"):
        _with_ranges(value)


def _with_ranges(value):
    raw = case_config().model_dump(mode="json")
    return config_from_dict(raw | {"data": raw["data"] | {"skip_samples": value}})

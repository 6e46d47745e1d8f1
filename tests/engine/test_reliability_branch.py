"""Branches of a run: another config from a full state, and ranges of samples passed over."""

from __future__ import annotations

import json

import pytest

from tests.engine.reliability import train
from tests.engine.test_training import lines, status

NO_VALIDATION = "data.validation=null"


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    """12 steps; checkpoints of 6 and 12."""
    out = tmp_path_factory.mktemp("whole")
    assert train(config_file, out, NO_VALIDATION) == [0]
    return out


def losses(out) -> dict:
    return {line["step"]: line for line in lines(out) if "loss" in line}


def test_a_branch_goes_on_from_the_full_state_under_another_config(whole, config_file, tmp_path):
    overrides = (NO_VALIDATION, f"train.branch_from={whole}/checkpoints/step_00000006", "train.num_steps=10",
                 "optimizer.learning_rate=2e-2")
    assert train(config_file, tmp_path, "train.stop_at_step=8", *overrides) == [0]
    before, after = losses(whole), losses(tmp_path)
    assert sorted(after) == [7, 8]
    for key in ("loss", "grad_norm", "batch_hash", "tokens"):  # the state and the data go on ...
        assert after[7][key] == before[7][key]
    assert after[8]["loss"] != before[8]["loss"]  # ... under another rate
    record = json.loads((tmp_path / "branch.json").read_text())
    assert (record["step"], record["samples"]) == (6, 48) and record["from"].endswith("step_00000006")
    assert record["changes"]["optimizer.learning_rate"] == [0.003, 0.02]
    assert "optimizer.learning_rate: 0.003 -> 0.02" in (tmp_path / "train.log").read_text()
    assert train(config_file, tmp_path, *overrides) == [0]  # the same command continues the branch
    assert sorted(losses(tmp_path)) == [7, 8, 9, 10] and status(tmp_path)["step"] == 10


def test_a_branch_without_changes_is_the_run_itself(whole, config_file, tmp_path):
    assert train(config_file, tmp_path, NO_VALIDATION, f"train.branch_from={whole}/checkpoints/step_00000006") == [0]
    assert status(tmp_path)["weights_hash"] == status(whole)["weights_hash"]


def test_an_average_may_begin_with_a_branch(config_file, tmp_path):
    from dlm_scale.checkpoint.reader import open_checkpoint

    assert train(config_file, tmp_path / "a", NO_VALIDATION, "train.ema_decay=0", "train.stop_at_step=2") == [0]
    assert train(config_file, tmp_path / "b", NO_VALIDATION, f"train.branch_from={tmp_path}/a",
                 "train.stop_at_step=3") == [0]
    old = open_checkpoint(tmp_path / "a" / "checkpoints" / "step_00000002").read("final_norm.gain")
    new = open_checkpoint(tmp_path / "b" / "checkpoints" / "step_00000003")
    average, weights = (new.read("final_norm.gain", slot) for slot in ("ema", "param"))
    assert ((average - old).abs() <= (weights - old).abs() + 1e-7).all() and not average.equal(old)


def test_samples_are_passed_over_and_the_others_stay(whole, config_file, tmp_path):
    """Steps of 8 samples; 16 to 31 are passed over: a branch at step 2 meets those of step 5 in step 3."""
    assert train(config_file, tmp_path / "a", NO_VALIDATION, "train.stop_at_step=2") == [0]
    branch = (NO_VALIDATION, f"train.branch_from={tmp_path}/a", "train.stop_at_step=4", "data.skip_samples=[16,32]")
    assert train(config_file, tmp_path / "b", *branch, change=lambda rank: note_samples(tmp_path / "seen")) == [0]
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert sorted(sum(seen, []))[:16] == list(range(32, 48))
    assert losses(tmp_path / "b")[3]["batch_hash"] != losses(whole)[3]["batch_hash"]
    assert train(config_file, tmp_path / "b", NO_VALIDATION, "data.skip_samples=[16,40]") == [2]


def note_samples(path) -> None:
    """In this process, write down the sample index of every row that is noised."""
    from dlm_scale.engine import step

    corrupt = step.corrupt

    def noting(x0_BL, sample_B, *args, **options):
        with open(path, "a") as file:
            print(json.dumps(sample_B.tolist()), file=file)
        return corrupt(x0_BL, sample_B, *args, **options)

    step.corrupt = noting


@pytest.mark.parametrize("override, named", [
    ("model.num_layers=1", "model.num_layers: 2 -> 1"),
    ("optimizer.name=muon", "optimizer.name: adamw -> muon"),
    ("train.num_steps=12", "train.num_steps=12 is not beyond its step 12"),
    ("train.branch_from=/nowhere", "/nowhere is not a folder"),
])
def test_a_state_that_does_not_fit_is_refused(override, named, whole, config_file, tmp_path, capfd):
    overrides = {"train.branch_from": str(whole), "train.num_steps": "20"} | dict([override.split("=")])
    assert train(config_file, tmp_path, NO_VALIDATION, *(f"{k}={v}" for k, v in overrides.items())) == [2]
    assert named in capfd.readouterr().err


def test_which_keys_change_the_result():
    from dlm_scale.config_compare import is_result_neutral

    for key in ("train.branch_from", "train.async_save", "train.max_bad_steps", "train.hang_timeout_seconds"):
        assert is_result_neutral(key)
    assert not is_result_neutral("data.skip_samples") and is_result_neutral("data.train")


def test_another_tokenizer_is_refused(whole, config_file, tmp_path, capfd):
    assert train(config_file, tmp_path, NO_VALIDATION, f"train.branch_from={whole}", "train.num_steps=20",
                 "data.train=synthetic", "data.synthetic_vocab_size=50") == [2]
    assert "another tokenizer" in capfd.readouterr().err

"""Whole runs through `dlm_scale.train`: the run folder, exact resume, layouts, graceful stop, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dlm_scale import cli
from dlm_scale.checkpoint.folders import find_checkpoint
from dlm_scale.checkpoint.reader import open_checkpoint
from dlm_scale.engine.run_folder import Metrics, read_metrics
from tests.forked import run_ranks

VOLATILE = ("tokens_per_second", "mfu", "data_wait", "seconds")


def run(config_file, out, *overrides, ranks=1):
    """Train in forked ranks; the exit code of rank 0 (0 where train.main returns)."""
    return run_ranks(ranks, _main, [str(config_file), f"train.out={out}", "train.device=cpu", *overrides])[0]


def _main(argv):
    return cli.main(["train", *argv])


def lines(out):
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in read_metrics(out / "metrics.jsonl")]


def status(out):
    return json.loads((out / "status.json").read_text())


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    """The uninterrupted run, one rank, ZeRO 1."""
    out = tmp_path_factory.mktemp("whole")
    assert run(config_file, out) == 0
    return out


def test_the_run_folder_is_complete(whole):
    names = {p.name for p in whole.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "train.log", "checkpoints", "plots", "status.json"} <= names
    assert (whole / "plots" / "curves.png").stat().st_size > 1000
    steps = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    wanted = {"tokens", "loss", "nelbo", "learning_rate", "grad_norm", "batch_hash"}
    assert all(wanted <= line.keys() and np.isfinite(line["loss"]) for line in steps)
    assert [line["step"] for line in lines(whole) if "val_nelbo" in line] == [0, 6, 12]
    assert status(whole)["status"] == "finished" and len(status(whole)["weights_hash"]) == 32
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step_00000006", "step_00000012"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stop_and_resume_is_bit_equal(stage, whole, config_file, tmp_path):
    """Weights, moments, average, schedule, data order and noise all go on as if nothing had happened."""
    zero = f"deepspeed.zero_optimization.stage={stage}"
    assert run(config_file, tmp_path / "a", zero) == 0
    assert run(config_file, tmp_path / "b", zero, "train.stop_at_step=5") == 0
    assert status(tmp_path / "b")["reason"] == "stop_at_step" and status(tmp_path / "b")["step"] == 5
    assert run(config_file, tmp_path / "b", zero) == 0
    assert [x for x in lines(tmp_path / "b") if x["step"] > 5] == [x for x in lines(tmp_path / "a") if x["step"] > 5]
    assert status(tmp_path / "b")["weights_hash"] == status(tmp_path / "a")["weights_hash"]
    ema = [open_checkpoint(find_checkpoint(tmp_path / name)[0]).read("embedding.weight", "ema") for name in "ab"]
    assert ema[0].equal(ema[1])


def test_a_finished_run_started_again_only_says_so(whole, config_file):
    before = (whole / "metrics.jsonl").read_text()
    assert run(config_file, whole, "deepspeed.zero_optimization.stage=1") == 0
    assert (whole / "metrics.jsonl").read_text() == before
    assert status(whole)["attempt"] >= 2 and status(whole)["status"] == "finished"


@pytest.mark.parametrize("ranks, overrides", [
    (1, ("train.micro_batch_size=8", "deepspeed.zero_optimization.stage=0")),
    (1, ("train.micro_batch_size=1", "deepspeed.zero_optimization.stage=3")),
    (2, ("train.micro_batch_size=2", "deepspeed.zero_optimization.stage=3")),
])
def test_layouts_and_splits_give_the_same_run(ranks, overrides, whole, config_file, tmp_path):
    assert run(config_file, tmp_path, *overrides, ranks=ranks) == 0
    for ours, theirs in zip(lines(tmp_path), lines(whole), strict=True):
        if "loss" in ours:
            assert ours["batch_hash"] == theirs["batch_hash"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        else:
            assert ours["val_nelbo"] == pytest.approx(theirs["val_nelbo"], abs=1e-5)


def test_a_run_goes_on_at_another_layout(whole, config_file, tmp_path):
    """Written by one rank under ZeRO 1, read by two ranks under ZeRO 3."""
    assert run(config_file, tmp_path, "train.stop_at_step=6") == 0
    assert run(config_file, tmp_path, "deepspeed.zero_optimization.stage=3", "train.micro_batch_size=2", ranks=2) == 0
    for ours, theirs in zip(lines(tmp_path), lines(whole), strict=True):
        if "loss" in ours:
            assert ours["batch_hash"] == theirs["batch_hash"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize("override", ["optimizer.learning_rate=1e-3", "train.seed=4", "model.num_layers=1"])
def test_a_config_that_changes_the_result_is_refused_on_resume(override, whole, config_file):
    assert run(config_file, whole, override) == 2


def test_resume_never_and_must(whole, config_file, tmp_path):
    assert run(config_file, whole, "train.resume=never") == 2
    assert run(config_file, tmp_path / "new", "train.resume=must") == 2


def test_other_data_is_refused_on_resume(whole, config_file, grammar):
    assert run(config_file, whole, f"data.train={grammar}/val") == 2


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "state.json", "config.yaml", "tokenizer_meta.json"])
def test_a_damaged_newest_checkpoint_falls_back(name, config_file, tmp_path, whole):
    """A bit of a document too, which is read before the tensors are hashed."""
    out = shutil.copytree(whole, tmp_path / "run")
    newest = out / "checkpoints" / "step_00000012" / name
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert run(config_file, out) == 0
    assert status(out)["weights_hash"] == status(whole)["weights_hash"]


def test_metrics_drop_half_lines_and_lines_after_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    metrics = Metrics(path, resumed_step=2)
    metrics.write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]

"""A learning rate of their own for the vocabulary tables; steps that follow from the number of parameters."""

from __future__ import annotations

import numpy as np
import pytest

from dlm_scale.config import load_config
from dlm_scale.model.parameters import count_parameters
from dlm_scale.train import open_datasets, with_num_steps
from tests.engine.cases import case_config, differences, logical_weights, run_engine, run_twin, start_noisy, train_lines
from tests.engine.test_training import lines, run, status
from tests.forked import run_ranks

OWN_RATE = {"optimizer__embedding_learning_rate": 3e-2, "optimizer__warmup_steps": 2}
VARIANTS = {
    "adamw": {**OWN_RATE},
    "muon": {**OWN_RATE, "optimizer__name": "muon"},
    "tied": {**OWN_RATE, "model__tied": True, "optimizer__gradient_clip": 0.0, "optimizer__warmup_steps": 0},
}


def _run(tensor_size, cases, steps):
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", tensor_size)
    layout = {"parallel__tensor_parallel_size": tensor_size}
    found = [run_engine(runtime, case_config(**layout, **case), steps) for case in cases]
    return found if runtime.is_first else None


@pytest.mark.parametrize(("tensor_size", "optimizer"), [(1, "muon"), (2, "adamw")])
def test_the_tables_move_at_their_own_rate_at_every_layout(tensor_size, optimizer):
    """Against plain torch with the two tables in a group of their own."""
    variant = VARIANTS[optimizer] | {"train__micro_batch_size": 4 * tensor_size}
    twin = run_twin(case_config(**VARIANTS[optimizer]), 3)
    for result in run_ranks(2, _run, tensor_size, [{**variant, "zero__stage": stage} for stage in (0, 3)], 3)[0]:
        found = differences(result, twin)
        assert found["loss"] < 1e-5 and found["weights"] < 1e-4, found


def _moves(stage):
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime
    from tests.engine.cases import data_of

    config = case_config(**VARIANTS["tied"], zero__stage=stage)
    data = data_of(config)
    trainer = build_trainer(config, start_runtime("cpu", 1), data.vocabulary)
    state = start_noisy(trainer)
    before = logical_weights(trainer)
    train_lines(trainer, data, state, 1)
    return {name: float(np.abs(after - before[name]).max()) for name, after in logical_weights(trainer).items()}


@pytest.mark.parametrize("stage", [0, 3])
def test_the_first_update_is_the_rate(stage):
    """Adam's first step is rate * sign(gradient) where the gradient is far above eps: nothing else is assumed."""
    moves = run_ranks(1, _moves, stage)[0]
    assert moves.pop("embedding.weight") == pytest.approx(3e-2, rel=1e-2)
    assert all(move == pytest.approx(1e-3, rel=0.1) for name, move in moves.items() if "norm" in name)


def test_tokens_a_parameter_give_the_steps(config_file):
    """The fewest steps that reach ratio x parameters, tables included; nothing else of the config changes."""
    config = load_config(config_file, ["train.num_steps=null", "train.target_param_data_ratio=2.5"])
    data, _ = open_datasets(config)
    resolved, parameters = with_num_steps(config, data.vocabulary), count_parameters(config.model, data.vocabulary)
    tokens = 8 * 16 * resolved.train.num_steps
    assert tokens - 8 * 16 < 2.5 * parameters <= tokens
    assert resolved == load_config(config_file, [f"train.num_steps={resolved.train.num_steps}"])
    assert with_num_steps(resolved, data.vocabulary) is resolved


def test_a_run_of_these_keys_is_the_plain_run_and_resumes(config_file, tmp_path):
    """The ratio is stable over a resume, and its run is the one that names steps and rows, bit by bit."""
    plain = load_config(config_file)
    data, _ = open_datasets(plain)
    ratio = 12 * 8 * 16 / count_parameters(plain.model, data.vocabulary)
    keys = ["train.num_steps=null", f"train.target_param_data_ratio={ratio - 1e-9}", "train.global_batch_size=null",
            "train.total_batch_size=128"]
    rate = ["optimizer.embedding_learning_rate=1e-2", "deepspeed.zero_optimization.stage=3"]
    assert run(config_file, tmp_path / "plain", *rate) == 0
    assert run(config_file, tmp_path / "keys", *rate, *keys, "train.stop_at_step=5") == 0
    assert run(config_file, tmp_path / "keys", *rate, *keys) == 0
    assert status(tmp_path / "keys")["weights_hash"] == status(tmp_path / "plain")["weights_hash"]
    assert load_config(tmp_path / "keys" / "config.yaml").train.num_steps == 12
    losses = [[line for line in lines(tmp_path / name) if "loss" in line] for name in ("keys", "plain")]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert run(config_file, tmp_path / "keys", *rate, *keys, f"train.target_param_data_ratio={2 * ratio}") == 2

"""A sequence scorer from a language model's trunk: metrics, resume, what refuses it, and as a judge."""

from __future__ import annotations

import json

import pytest

from dlm_scale.checkpoint.folders import find_checkpoint
from dlm_scale.checkpoint.reader import open_checkpoint
from dlm_scale.convert.source import open_model
from dlm_scale.convert.targets import write_file_target, write_hf
from dlm_scale.engine.run_folder import read_metrics
from dlm_scale.engine.session import Console
from dlm_scale.errors import UsageError
from dlm_scale.inference import load_for_inference
from dlm_scale.config import load_config
from dlm_scale.data.loader import open_data
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box
from dlm_scale.train import main
from tests.engine.cases import noisy_values
from tests.engine.test_training import run
from tests.engine.test_warm_start import save_weights

FEW = ("train.num_steps=4", "train.eval_every=2", "train.save_every=0", "train.micro_batch_size=2")
SCORER = ("objective.kind=sequence_scoring", "model.score=true")


def language_model(config_file, out) -> None:
    """Weights as after some training."""
    config = load_config(config_file, list(FEW))
    data = open_data(config.data.train, config.model.seq_len, 1)
    table = parameter_table(config.model, data.vocabulary)
    values = {name: noisy_values(spec, 1, full_box(spec.view), 0, spec.numel).view(spec.shape)
              for name, spec in table.items()}  # fmt: skip
    save_weights(out, config, data, values)


@pytest.fixture(scope="module")
def runs(config_file, tmp_path_factory):
    """A language model; a scorer from it, in one go, and in two parts, the second on two ranks at ZeRO 3."""
    out = tmp_path_factory.mktemp("labels")
    language_model(config_file, out / "lm")
    start = (*FEW, *SCORER, f"model.init_from={out}/lm")
    assert run(config_file, out / "scorer", *start) == 0
    assert run(config_file, out / "parts", *start, "train.stop_at_step=2") == 0
    assert run(config_file, out / "parts", *start, "deepspeed.zero_optimization.stage=3", ranks=2) == 0
    return out


def lines(run):
    return read_metrics(run / "metrics.jsonl")


def test_metrics_say_what_is_learnt_and_nothing_of_a_likelihood(runs):
    found = lines(runs / "scorer")
    steps, evaluations = ([line for line in found if key in line] for key in ("loss", "val_nelbo"))
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and [line["step"] for line in evaluations] == [0, 2, 4]
    for line in steps:
        assert line["nelbo"] is None and line["masked_ce"] is None and set(line["ce_by_mask_ratio"]) == {None}
        assert 0 < line["loss"] < 1 and 0 < line["score_error"] < 1 and line["grad_norm"] > 0
        assert "score error" not in Console(4).line(line) and "nelbo" not in Console(4).line(line)
    for line in evaluations:
        assert line["val_nelbo"] is None and 0.5 < line["val_loss"] < 1 and 0 < line["val_score_error"] < 1
        assert "validation loss 0." in Console(4).line(line) and "score error 0." in Console(4).line(line)


def test_a_scorer_stopped_and_resumed_at_another_layout_is_the_same(runs):
    for ours, theirs in zip(lines(runs / "parts"), lines(runs / "scorer"), strict=True):
        for key in {"loss", "grad_norm", "score_error", "val_loss", "val_score_error"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (ours["step"], key)
        assert ours.get("batch_hash") == theirs.get("batch_hash")


def test_the_trunk_starts_as_the_language_model_and_its_head_is_new(runs):
    lm, scorer = (open_checkpoint(find_checkpoint(runs / name)[0]) for name in ("lm", "scorer"))
    tensors = [{name for name, slot in each.tensors if slot == "param"} for each in (lm, scorer)]
    assert tensors[1] - tensors[0] == {"head.score.weight"}
    names = ("blocks.0.mlp.down.weight", "embedding.weight")
    moved, table = ([each.read(name) for each in (lm, scorer)] for name in names)
    assert 0 < (moved[0] - moved[1]).abs().max() < 0.05 and (table[0] - table[1]).abs().max() < 0.05


def test_it_judges_a_language_model(runs, config_file):
    modifiers = ("diffusion.weighting=simple", "objective.label_smoothing=0.1", "objective.mask_ratio_power=0.5",
                 "objective.entropy_threshold=0.5", f"objective.judge={runs}/scorer")  # fmt: skip
    assert run(config_file, runs / "judged", *FEW, *modifiers) == 0
    for line in (line for line in lines(runs / "judged") if "loss" in line):
        assert 0.99 < line["entropy_weight"] <= 2
        assert 0.1 <= line["judge_factor"] <= 10 and 0 < line["judge_wrongness"] < 1
        assert line["nelbo"] > 1 and line["loss"] > 0
    assert load_for_inference(runs / "judged", "cpu").step == 4


def test_a_language_model_is_no_judge(runs, config_file):
    command = [str(config_file), f"train.out={runs}/refused", f"objective.judge={runs}/lm"]
    with pytest.raises(UsageError, match="is no sequence scorer"):
        main(command)


def test_what_needs_a_language_model_refuses_a_scorer(runs, tmp_path):
    with pytest.raises(UsageError, match="is no language model .*sequence_scoring"):
        load_for_inference(runs / "scorer", "cpu")
    model = open_model(runs / "scorer")
    options = {"dtype": "float32", "slot": "param", "say": lambda text: None}
    with pytest.raises(UsageError, match="model.score"):
        write_hf(model, tmp_path / "hf", family="dlm_scale", max_shard_bytes=1 << 30, **options)
    write_file_target(model, tmp_path / "one.safetensors", **options)
    header = (tmp_path / "one.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert names["head.score.weight"]["shape"] == [1, 32]

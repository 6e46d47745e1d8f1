"""The edit stage in runs: nothing before it begins, the same numbers at every layout, and what it needs of the data."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm_scale.config import config_from_dict
from dlm_scale.data.edit_tokens import edit_tokens
from dlm_scale.data.loader import open_data
from dlm_scale.data.prepare import prepare
from dlm_scale.data.vocabulary import EditTokens
from dlm_scale.diffusion.corruption import KIND_MASKED
from dlm_scale.diffusion.edit import KIND_SUBSTITUTED, KIND_VISIBLE
from dlm_scale.engine.batch_hash import batch_hash, row_hashes
from dlm_scale.engine.build import build_trainer
from dlm_scale.engine.runtime import start_runtime
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import make_batch
from dlm_scale.errors import UsageError
from dlm_scale.train import open_datasets
from tests.engine.cases import case_config, data_of, differences, import_distributed, logical_weights, start_noisy
from tests.engine.cases import train_lines
from tests.engine.reliability import status, train
from tests.forked import run_ranks

EDITING = {"diffusion__edit_stage_start": 0.02, "diffusion__corruption_prob": 0.2, "diffusion__anneal_corruption": False,
           "diffusion__deletion_corruption": True, "diffusion__visible_subsample": 0.5,
           "data__random_length_share": 0.5}  # fmt: skip
TOKENS = EditTokens(np.arange(1, 380), 386, 387)
STEPS = 4  # two before the stage and two in it


def data_with_tokens(config):
    """Packed synthetic rows, some of them cut short."""
    data = data_of(config)
    return SimpleNamespace(rows=data.rows, vocabulary=data.vocabulary, edits=TOKENS)


def run_configs(tensor, configs):
    """`run_engine` of several configs in one process group. For `run_ranks`."""
    runtime, results = start_runtime("cpu", tensor), []
    for config in configs:
        data = data_with_tokens(config)
        trainer = build_trainer(config, runtime, data.vocabulary)
        lines, _ = train_lines(trainer, data, start_noisy(trainer), STEPS)
        results.append({"lines": lines, "weights": logical_weights(trainer)})
    return results


@pytest.fixture(scope="module")
def alone():
    """(with the stage, with one that never begins, without its keys) in one process."""
    import_distributed()
    never = case_config(**EDITING | {"diffusion__edit_stage_start": 1.0})
    configs = [case_config(**EDITING), never, case_config(data__random_length_share=0.5)]
    return run_ranks(1, run_configs, 1, configs)[0]


def test_nothing_changes_a_bit_before_the_stage_or_without_one(alone):
    edited, never, plain = alone
    assert never["lines"] == plain["lines"] and differences(never, plain)["weights"] == 0
    assert edited["lines"][:2] == plain["lines"][:2]
    for mine, other in zip(edited["lines"][2:], plain["lines"][2:]):
        assert mine["hash"] != other["hash"] and mine["loss"] != other["loss"]


LAYOUTS = {"TP2": (2, {"train__micro_batch_size": 4}), "DP2-zero3": (1, {"train__micro_batch_size": 1, "zero__stage": 3})}


@pytest.mark.parametrize("tensor, options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_changes_no_number(alone, tensor, options):
    config = case_config(**EDITING, **options, parallel__tensor_parallel_size=tensor)
    found = differences(run_ranks(2, run_configs, tensor, [config])[0][0], alone[0])
    assert found["hashes"] == 0 and max(found["loss"], found["grad_norm"], found["weights"]) < 1e-5, found


def trainer_of(config, vocabulary):
    mesh = SimpleNamespace(data_size=1, data_rank=0)
    return SimpleNamespace(config=config, accumulation=1, vocabulary=vocabulary,
                           runtime=SimpleNamespace(mesh=mesh, device=torch.device("cpu")))  # fmt: skip


def one_batch(**changes):
    config = case_config(**EDITING | changes)
    data = data_with_tokens(config)
    return make_batch(trainer_of(config, data.vocabulary), data, TrainState(5, 40))


def test_the_hash_of_a_batch_covers_which_tokens_carry_loss():
    (batch,), mesh, cpu = one_batch(), SimpleNamespace(data_size=1), torch.device("cpu")
    visible = (batch.kind_N == KIND_VISIBLE).nonzero()[0, 0]
    kept_N = torch.arange(len(batch.rows_N)) != visible
    names = ("rows_N", "target_N", "weight_N", "elbo_weight_N", "kind_N")
    less = replace(batch, **{name: getattr(batch, name)[kept_N] for name in names})
    other = replace(batch, kind_N=batch.kind_N.clone())
    other.kind_N[visible] = KIND_SUBSTITUTED
    assert len({batch_hash([each], mesh, cpu) for each in (batch, less, other)}) == 3
    changed = row_hashes(batch) != row_hashes(less)
    assert changed.tolist() == (np.arange(8) == int(batch.rows_N[visible]) // 16).tolist()


def test_the_stage_needs_the_ids_that_open_datasets_finds():
    config = case_config(**EDITING)
    with pytest.raises(UsageError, match="open_datasets"):
        make_batch(trainer_of(config, data_of(config).vocabulary), data_of(config), TrainState(5, 40))


def test_discrete_times_are_whole_steps():
    elbo = {"diffusion__weighting": "elbo", "diffusion__edit_stage_start": 1.0}
    (batch,), (smooth,) = one_batch(diffusion__num_diffusion_steps=10, **elbo), one_batch(**elbo)
    steps_S = batch.t_B.numpy() * 10
    assert np.allclose(steps_S, np.ceil(smooth.t_B.numpy() * 10)) and len(set(steps_S.round())) > 3
    assert torch.allclose(batch.weight_N.double(), 1 / batch.t_B[batch.segment_N])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """chars: text with both special tokens; plain: without; chat: conversations with both."""
    root = tmp_path_factory.mktemp("edit")
    texts = [json.dumps({"text": f"{i}: to be or not to be. " * (1 + i % 3)}) + "\n" for i in range(150)]
    (root / "a.jsonl").write_text("".join(texts))
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ab" * (i % 5 + 1)}]}
            for i in range(120)]  # fmt: skip
    (root / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("<|delete|>", "<|gap|>")
    prepare(str(root / "a.jsonl"), "char", root / "chars", special_tokens=names, workers=1)
    prepare(str(root / "a.jsonl"), "char", root / "plain", workers=1)
    prepare(str(root / "c.jsonl"), "byte", root / "chat", text_key="messages", chat="chatml", workers=1,
            special_tokens=("<|im_start|>", "<|im_end|>", *names))
    return root


def test_wrong_tokens_are_ids_of_text(folder):
    data = open_data(str(folder / "chat" / "train"), 96, 1)
    tokens = edit_tokens(data, True, False)
    assert tokens.replacement_ids.tolist() == list(range(1, 256))  # 0 separates documents
    assert (tokens.delete_id, tokens.gap_id) == (258, None)
    data = open_data("synthetic:9", 8, 1)
    assert edit_tokens(data, False, False).replacement_ids.tolist() == list(range(8))


def test_a_dataset_without_the_answers_is_refused_with_the_remedy(folder):
    with pytest.raises(UsageError, match=r"prepare it again with --special_tokens '<\|delete\|>,<\|gap\|>', or set "
                                         r"diffusion.insertion_corruption=false diffusion.deletion_corruption=false"):
        edit_tokens(open_data(str(folder / "plain" / "train"), 16, 1), True, True)
    with pytest.raises(UsageError, match="synthetic tokens have none"):
        open_datasets(case_config(diffusion__edit_stage_start=0.5))
    assert open_datasets(case_config())[0].edits is None


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_conversations_are_edited_in_their_answers_alone(folder, packing):
    changes = {"data__random_length_share": 0.0, "data__packing": packing, "data__answer_padding": "none",
               "model__seq_len": 96,
               "data__train": str(folder / "chat" / "train"), "diffusion__visible_subsample": 1.0}  # fmt: skip
    config = case_config(**EDITING | changes)
    data, _ = open_datasets(config)
    rows = data.rows(np.arange(40, 48))
    (batch,) = make_batch(trainer_of(config, data.vocabulary), data, TrainState(5, 40))
    assert (batch.xt_BL.numpy() == rows.ids_BL)[~rows.maskable_BL].all()
    assert rows.maskable_BL.reshape(-1)[batch.rows_N.numpy()].all()
    assert set(batch.kind_N.tolist()) == {0, 1, 2, 3, 4} and 0 < rows.maskable_BL.mean() < 0.5
    assert int(batch.num_maskable_B.sum()) == rows.maskable_BL.sum()
    unseen = {data.vocabulary.mask_id, data.edits.delete_id, data.edits.gap_id}
    assert not set(batch.xt_BL[batch.xt_BL != data.vocabulary.mask_id].tolist()) & unseen
    assert (batch.weight_N[batch.kind_N != KIND_MASKED] == 1).all()


def test_a_run_goes_on_to_the_bit_and_may_then_be_sampled_with_edits(folder, config_file, tmp_path, capsys):
    keys = (f"data.train={folder}/chars/train", f"data.validation={folder}/chars/val", "diffusion.edit_stage_start=0.5",
            "diffusion.deletion_corruption=true", "diffusion.corruption_prob=0.3")  # fmt: skip
    assert train(config_file, tmp_path / "whole", *keys) == [0]
    assert train(config_file, tmp_path / "parts", *keys, "train.stop_at_step=6") == [0]
    before = (str(tmp_path / "parts"), "--allow_edits", "--max_new_tokens=8")
    with pytest.raises(UsageError, match="has no edit stage behind it"):
        run_sample(*before)
    assert train(config_file, tmp_path / "parts", *keys) == [0]
    assert status(tmp_path / "whole")["weights_hash"] == status(tmp_path / "parts")["weights_hash"]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    stages = [{key: line[key] for key in line if key.startswith(("visible", "corrupted"))}
              for line in lines if "loss" in line]  # fmt: skip
    assert not any(stages[:6]) and all(len(stage) == 3 and stage["visible_ce"] > 0 for stage in stages[6:])
    assert all(np.isfinite(line["val_nelbo"]) for line in lines if "val_nelbo" in line)
    capsys.readouterr()
    for sampler in ("ancestral", "edit_gated", "entropy"):
        run_sample(str(tmp_path / "whole"), "--allow_edits", f"--sampler={sampler}", "--max_new_tokens=12", "--steps=8",
                   "--json", "--num_samples=2")  # fmt: skip
        report = json.loads(capsys.readouterr().out)
        ids = np.array([sample["tokens"] for sample in report["samples"]])
        special = set(report["edit_ids"].values()) | {report["mask_id"]}
        assert ids.shape == (2, 12) and not np.isin(ids, list(special)).any() and len(report["edit_ids"]) == 2
    with pytest.raises(UsageError, match="masks tokens again"):
        run_sample(str(tmp_path / "whole"), "--allow_edits", "--sampler=remdm")


def run_sample(*arguments):
    from dlm_scale import sample

    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    return sample.run(parser.parse_args(list(arguments)))


@pytest.mark.parametrize(
    "diffusion, wrong",
    [({"time_loss_weighting": False, "weighting": "count"}, "diffusion.time_loss_weighting"),
     ({"time_loss_weighting": True, "weighting": "simple"}, "diffusion.time_loss_weighting"),
     ({"num_diffusion_steps": 100}, "diffusion.num_diffusion_steps"),
     ({"num_diffusion_steps": 100, "weighting": "elbo", "schedule": "cosine"}, "diffusion.num_diffusion_steps"),
     ({"visible_subsample": 0.0}, "diffusion.visible_subsample"),
     ({"edit_stage_start": 1.5}, "diffusion.edit_stage_start")],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(diffusion, wrong):
    with pytest.raises(UsageError, match=wrong):
        case_config(**{f"diffusion__{key}": value for key, value in diffusion.items()})


def test_time_weighting_is_a_name_for_the_weighting():
    assert case_config(diffusion__time_loss_weighting=False).diffusion.weighting == "simple"
    assert case_config(diffusion__time_loss_weighting=True).diffusion.weighting == "count"
    dumped = case_config(diffusion__time_loss_weighting=False).model_dump()
    assert config_from_dict(dumped).model_dump() == dumped
    with pytest.raises(UsageError, match=r"edit_stage_start \(the config\) = 0.5 has no meaning under objective.kind"):
        case_config(objective__kind="autoregressive", diffusion__edit_stage_start=0.5)

"""`dlm evaluate`, and a model that learns what can be known: the grammar's entropy is its floor."""

from __future__ import annotations

import json

import pytest

from dlm_scale import cli, evaluate
from dlm_scale.data.loader import ValidationData
from dlm_scale.data.prepare import prepare
from dlm_scale.diffusion.draws import ESTIMATORS
from dlm_scale.evaluation.likelihoods import ORDERS
from tests.engine.cases import import_distributed
from tests.engine.test_training import lines, run
from tests.forked import run_ranks


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run(config_file, out) == 0
    return out


def evaluated(capfd, *arguments):
    """The JSON object that `dlm evaluate` prints last."""
    assert run_ranks(1, cli.main, ["evaluate", *map(str, arguments), "--device=cpu"])[0] == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_the_same_number_to_the_last_digit(trained, capfd):
    first = evaluated(capfd, trained, "--json", "--max_rows=24", "--num_draws=2")
    assert {"nelbo", "nelbo_se", "nelbo_se_mc", "ppl", "tokens", "bits_per_byte"} <= first.keys()
    assert first["tokens"] == 24 * 16 and first["weights"] == "ema"
    assert first == evaluated(capfd, trained, "--json", "--max_rows=24", "--num_draws=2")
    assert first["nelbo"] != evaluated(capfd, trained, "--max_rows=24", "--num_draws=2", "--seed=1")["nelbo"]
    assert evaluated(capfd, trained, "--max_rows=24", "--num_draws=2", "--weights=raw")["weights"] == "raw"


def test_rows_said_in_tokens(trained, capfd):
    rows = evaluated(capfd, trained, "--json", "--max_rows=3", "--num_draws=2")
    assert evaluated(capfd, trained, "--json", f"--eval_tokens={3 * 16 + 15}", "--num_draws=2") == rows
    for arguments, said in ((["--eval_tokens=15"], "less than one row, which has 16 tokens"),
                            (["--eval_tokens=64", "--max_rows=4"], "--max_rows and --eval_tokens")):
        assert run_ranks(1, cli.main, ["evaluate", str(trained), "--device=cpu", *arguments])[0] == 2
        assert said in capfd.readouterr().err


def test_two_ranks_give_the_number_of_one(trained, capfd):
    arguments = ["evaluate", str(trained), "--max_rows=40", "--num_draws=2", "--batch_size=16", "--device=cpu"]
    reports = []
    for ranks in (1, 2):
        assert run_ranks(ranks, cli.main, arguments) == [0] * ranks
        reports.append(json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert reports[0] == reports[1]


def same(report, alone):
    """Equal but for the rounding of sums over ranks."""
    if isinstance(alone, dict):
        return report.keys() == alone.keys() and all(same(report[key], alone[key]) for key in alone)
    if isinstance(alone, list):
        return len(report) == len(alone) and all(map(same, report, alone))
    return report == (pytest.approx(alone, rel=1e-6, abs=1e-6) if isinstance(alone, float) else alone)


SPLIT = {  # what is evaluated, with CKPT2 where the first word is not a flag
    "two checkpoints": ["{first}", "--max_rows=24", "--num_draws=4", "--batch_size=8"],
    "generated text": ["--generate=5", "--steps=4", "--length=12", "--batch_size=2", "--judge_text={data}/val"],
    "an exact likelihood": ["--likelihood=duel", "--tokens_per_step=5", "--max_rows=7", "--batch_size=3"],
    "a sweep": ["--sweep=margin", "--steps=2,4", "--generate=3", "--length=8", "--out={out}", "--judge_text={data}/val"],
}


@pytest.mark.parametrize("ranks, what", [(2, "two checkpoints"), (4, "two checkpoints"), (4, "generated text"),
                                         (2, "an exact likelihood"), (4, "a sweep")])  # fmt: skip
def test_tensor_parallel_groups_give_the_numbers_of_one_process(trained, grammar, tmp_path, ranks, what, capfd):
    import_distributed()
    first = min((trained / "checkpoints").iterdir())
    arguments = [word.format(first=first, out=tmp_path / "quality", data=grammar) for word in SPLIT[what]]
    alone = evaluated(capfd, trained, *arguments)
    command = ["evaluate", str(trained), *arguments, "--device=cpu", "--tensor_parallel_size=2"]
    assert run_ranks(ranks, cli.main, command + ["--json"]) == [0] * ranks
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 1 and same(json.loads(said[0]), alone)


@pytest.mark.parametrize("ranks, size, words", [
    (1, 2, "--tensor_parallel_size=2 does not divide the 1 processes"), (3, 3, "model.num_heads"),
    (1, 0, "--tensor_parallel_size=0: must be at least 1"),
])  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused_once(trained, ranks, size, words, capfd):
    command = ["evaluate", str(trained), "--device=cpu", f"--tensor_parallel_size={size}"]
    assert run_ranks(ranks, cli.main, command) == [2] * ranks
    error = capfd.readouterr().err
    assert error.count("dlm: error") == 1 and words in error


def test_a_judge_that_fails_on_the_first_rank_fails_on_all(trained, capfd):
    import_distributed()
    command = ["evaluate", str(trained), "--device=cpu", "--tensor_parallel_size=2", "--generate=2", "--judge=/nowhere"]
    assert run_ranks(2, cli.main, command, seconds=60) == [2, 2]
    assert capfd.readouterr().err.count("no such folder") == 1


def test_the_last_validation_line_of_the_run_is_what_evaluate_says(trained, capfd):
    report = evaluated(capfd, trained, "--max_rows=8", "--num_draws=2", "--batch_size=4", "--weights=raw")
    last = [line for line in lines(trained) if "val_nelbo" in line][-1]
    assert report["nelbo"] == pytest.approx(last["val_nelbo"], abs=1e-6)


def test_two_checkpoints_have_a_paired_difference(trained, capfd):
    first, last = sorted((trained / "checkpoints").iterdir())
    arguments = ["--max_rows=24", "--num_draws=4", "--json"]
    report = evaluated(capfd, last, first, *arguments)
    alone = [evaluated(capfd, path, *arguments) for path in (last, first)]
    assert report["other"] == alone[1] and {key: report[key] for key in alone[0]} == alone[0]
    found = report["difference"]
    assert found["nelbo"] == pytest.approx(alone[0]["nelbo"] - alone[1]["nelbo"]) and found["nelbo"] != 0
    assert found["interval"] == pytest.approx([found["nelbo"] + s * 1.96 * found["nelbo_se"] for s in (-1, 1)])
    assert found["nelbo_se"] < min(a["nelbo_se"] for a in alone) and report["estimator"] == "pairs"


def test_exact_likelihoods_through_the_command(trained, capfd):
    options = ["--max_rows=2", "--weights=raw"]
    found = {name: evaluated(capfd, trained, *options, f"--likelihood={name}", *more) for name, *more in (
        ("l2r",), ("duel", "--order=entropy", "--tokens_per_step=16"), ("nelbo", "--num_draws=64"))}
    assert all(found[name]["nelbo_se_mc"] == 0 and found[name]["tokens"] == 32 for name in ("l2r", "duel"))
    all_masked = found["nelbo"]["ce_by_mask_ratio"][-1]  # 16 tokens in one pass: every token from nothing
    assert found["duel"]["nelbo"] == pytest.approx(all_masked, rel=0.1)
    assert found["l2r"]["nelbo"] == pytest.approx(found["nelbo"]["nelbo"], rel=0.2)


def test_generated_text_and_a_sweep_through_the_command(trained, tmp_path, capfd):
    report = evaluated(capfd, trained, "--generate=3", "--steps=4", "--length=12")
    assert report["samples"] == 3 and 1 <= report["nfe"] <= 4 and report["reference"]["samples"] == 3
    assert report["judge"] == "5-gram" and report["reference"]["judge_nll"] < report["judge_nll"]
    lines = [{"id": 0, "sample": i, "text": "abab", "tokens": [0, 1, 0, 1], "nfe": 2} for i in range(2)]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = evaluated(capfd, trained, f"--samples={tmp_path}/made.jsonl")
    assert read["samples"] == 2 and read["nfe"] == 2 and read["distinct_1"] == 2 / 8
    swept = evaluated(capfd, trained, "--sweep=ancestral,margin", "--steps=2,4", "--generate=2", "--length=8",
                      f"--out={tmp_path}/quality")
    assert len(swept["points"]) == 4 and json.loads((tmp_path / "quality.json").read_text()) == swept
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bad, words", [
    (["--num_draws=3"], "num_draws"), (["--num_draws=6", "--estimator=pairs"], "multiple of 4"),
    (["--generate=2", "--sampler=ancestrl"], "did you mean 'ancestral'"), (["--steps=4,x"], "--steps=4,x"),
    (["--samples=/nowhere.jsonl"], "/nowhere.jsonl"), (["--samples=x", "--suite=mdlm"], "exclude each other"),
    (["--suite=mdlm", "--from=/nowhere"], "no ptb.jsonl"), (["--generate=2", "--judge=/nowhere"], "no such folder"),
    (["--generate=2", "--length=999"], "beyond the checkpoint's context"),
    (["--batch_size=0"], "batch_size"), (["--weights=emma"], "weights"),
    (["--data=/nowhere/val"], "/nowhere"), (["--max_row=3"], "did you mean --max_rows"),
])
def test_bad_arguments_exit_2_with_one_message(trained, bad, words, capfd):
    assert run_ranks(1, cli.main, ["evaluate", str(trained), "--device=cpu", *bad])[0] == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0]


def test_the_choices_of_the_command_are_those_of_the_code():
    assert set(evaluate.ESTIMATORS) == set(ESTIMATORS) and set(evaluate.ORDERS) == set(ORDERS)


def test_data_of_another_tokenizer_is_refused(trained, tmp_path, capfd):
    prepare("grammar", "byte", tmp_path / "bytes")
    arguments = ["evaluate", str(trained), f"--data={tmp_path}/bytes/val", "--device=cpu"]
    assert run_ranks(1, cli.main, arguments)[0] == 2
    assert "tokenizer" in capfd.readouterr().err


def test_a_folder_without_checkpoint_is_refused(tmp_path, capfd):
    assert run_ranks(1, cli.main, ["evaluate", str(tmp_path)])[0] == 2
    assert str(tmp_path) in capfd.readouterr().err


def test_the_grammar_is_learnt_to_its_entropy(config_file, grammar, tmp_path):
    """NELBO within 10 % of H_L / L, and never significantly below it."""
    settings = ("model.seq_len=32", "model.hidden_size=64", "train.global_batch_size=64", "train.micro_batch_size=64",
                "train.num_steps=220", "train.eval_rows=256", "train.eval_draws=4", "train.ema_decay=0",
                "train.log_every=50", "train.eval_every=0", "train.save_every=0", "optimizer.name=muon",
                "optimizer.muon_learning_rate=0.02", "optimizer.warmup_steps=20", "optimizer.beta2=0.98",
                "optimizer.gradient_clip=1.0", "optimizer.weight_decay=0.0")
    assert run(config_file, tmp_path, *settings) == 0
    floor = ValidationData(grammar / "val", 32).floor
    found = [line for line in lines(tmp_path) if "val_nelbo" in line]
    assert found[-1]["val_nelbo"] < 1.1 * floor
    assert all(line["val_nelbo"] > floor - 3 * line["val_nelbo_se"] for line in found)

"""Training on conversations: the past is never masked nor lost, whatever the split; validation is conditional."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm_scale.cli import main
from dlm_scale.data.loader import ValidationData, open_data
from dlm_scale.data.prepare import prepare
from dlm_scale.diffusion.likelihood import summarise
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.engine.evaluation import cross_entropy_fn, nelbo_sums
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import make_batch, micro_batch, with_denominator
from dlm_scale.errors import UsageError
from dlm_scale.inference import load_for_inference
from dlm_scale.model.transformer import Transformer
from dlm_scale.train import open_datasets
from tests.engine.cases import case_config, import_distributed
from tests.engine.reliability import status, train
from tests.forked import run_ranks

SEQ_LEN = 96


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ab" * (i % 5 + 1)}]}
            for i in range(120)]  # fmt: skip
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(str(folder / "c.jsonl"), "byte", folder / "D", text_key="messages", chat="chatml", workers=1)
    return folder / "D"


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_masks_fall_on_answers_alone(chat, packing):
    data = open_data(str(chat / "train"), SEQ_LEN, 1, packing)
    rows = data.rows(np.arange(8))
    assert 0 < rows.maskable_BL.mean() < 0.5
    config = case_config(model__seq_len=SEQ_LEN, train__global_batch_size=8, train__micro_batch_size=4)
    mesh = SimpleNamespace(data_size=1, data_rank=0)
    trainer = SimpleNamespace(config=config, accumulation=2, vocabulary=data.vocabulary,
                              runtime=SimpleNamespace(mesh=mesh, device=torch.device("cpu")))  # fmt: skip
    for corrupted, part in zip(make_batch(trainer, data, TrainState()), (rows.maskable_BL[:4], rows.maskable_BL[4:])):
        assert not (corrupted.is_masked_BL.numpy() & ~part).any() and corrupted.is_masked_BL.any()
        assert int(corrupted.num_maskable_B.sum()) == part.sum()


def batch_of(chat, padding: str, micro: int, data_size: int = 1, data_rank: int = 0):
    """The micro-batches of a rank, 8 rows in all, and the data."""
    data = open_data(str(chat / "train"), SEQ_LEN, 1, answer_padding=padding)
    config = case_config(model__seq_len=SEQ_LEN, train__global_batch_size=8, train__micro_batch_size=micro)
    runtime = SimpleNamespace(mesh=SimpleNamespace(data_size=data_size, data_rank=data_rank), device=torch.device("cpu"))
    trainer = SimpleNamespace(config=config, accumulation=8 // (micro * data_size), vocabulary=data.vocabulary,
                              runtime=runtime)  # fmt: skip
    return make_batch(trainer, data, TrainState(step=2, samples=16)), data, trainer


@pytest.mark.parametrize("padding", ["none", "random", "full"])
def test_no_prompt_token_has_a_part_in_the_loss(chat, padding):
    """With logits as the leaf: gradients stand at masked answers alone, and other prompts leave the loss as it is."""
    [corrupted], data, trainer = batch_of(chat, padding, micro=8)
    first_B = open_data(str(chat / "train"), SEQ_LEN, 1).rows(np.arange(16, 24)).maskable_BL.argmax(1)
    past_BL = np.arange(SEQ_LEN) < first_B[:, None]
    assert first_B.min() > 20 and not past_BL.reshape(-1)[corrupted.rows_N.numpy()].any()
    torch.manual_seed(1)
    logits_BLV = torch.randn(8, SEQ_LEN, data.vocabulary.size, requires_grad=True)

    def hidden_fn(xt_BL, *, m_B, rows_N, readout, attention):
        logits_NV = logits_BLV.flatten(0, 1)[rows_N]

        def cross_entropy(target_N, weight_N, z_loss, label_smoothing):
            ce_N = torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none")
            return (weight_N * ce_N).sum(), ce_N, logits_NV.argmax(1) == target_N

        return readout(SimpleNamespace(cross_entropy=cross_entropy))

    [known] = with_denominator(trainer, [corrupted])
    (masked_diffusion(hidden_fn, known)[0] / known.denominator).backward()
    is_touched_BL = (logits_BLV.grad != 0).any(2).numpy()
    assert not is_touched_BL[past_BL].any() and (is_touched_BL == corrupted.is_masked_BL.numpy()).all()
    rows, sample_B, t_B = data.rows(np.arange(16, 24)), np.arange(16, 24), np.linspace(0.3, 1.0, 8)
    losses = []
    for ids_BL in (rows.ids_BL, np.where(past_BL, 65, rows.ids_BL)):
        given = SimpleNamespace(rows=lambda _, ids_BL=ids_BL: rows._replace(ids_BL=ids_BL))
        losses.append(masked_diffusion(hidden_fn, micro_batch(trainer, given, sample_B, t_B))[0].item())
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("padding", ["random", "full"])
def test_any_split_of_the_batch_has_the_same_tokens_and_denominator(chat, padding):
    [whole], _, trainer = batch_of(chat, padding, micro=8)
    rows = open_data(str(chat / "train"), SEQ_LEN, 1, answer_padding=padding).rows(np.arange(16, 24))
    assert with_denominator(trainer, [whole])[0].denominator == rows.maskable_BL.sum()
    parts, _, own = batch_of(chat, padding, micro=2)
    shared = [batch_of(chat, padding, micro=2, data_size=2, data_rank=rank)[0] for rank in range(2)]
    for split in (parts, [part for pair in zip(*shared) for part in pair]):
        for name in ("xt_BL", "is_masked_BL", "target_N", "weight_N"):
            assert torch.equal(torch.cat([getattr(part, name) for part in split]), getattr(whole, name)), name
        assert {part.denominator for part in with_denominator(own, split)} == {float(rows.maskable_BL.sum())}


def test_validation_is_the_nelbo_of_answers_given_their_past(chat):
    """A row padded to any length, or cut to its own, has the same number."""
    config = case_config(model__seq_len=SEQ_LEN)
    validation = ValidationData(chat / "val", SEQ_LEN)
    torch.manual_seed(0)
    model = Transformer(config.model, validation.vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    sums = nelbo_sums(cross_entropy_fn(model, torch.device("cpu")), validation.vocabulary.mask_id, 4)
    for index in range(3):
        rows = validation.rows(np.array([index]))
        length = int(rows.bounds_S1[1])
        padded = summarise([sums(rows, np.array([index]))])
        alone = rows._replace(ids_BL=rows.ids_BL[:, :length], maskable_BL=rows.maskable_BL[:, :length], bounds_S1=None)
        cut = summarise([sums(alone, np.array([index]))])
        assert padded.tokens == cut.tokens == rows.maskable_BL.sum() and padded.nelbo == pytest.approx(cut.nelbo, rel=1e-5)


@pytest.fixture(scope="module")
def packed(chat, config_file, tmp_path_factory):
    """Overrides of a run whose rows hold several answers, and its folder."""
    keys = (f"data.train={chat}/train", f"data.validation={chat}/val", f"model.seq_len={SEQ_LEN}", "data.packing=best_fit",
            "data.answer_padding=none")  # fmt: skip
    out = tmp_path_factory.mktemp("packed")
    assert train(config_file, out, *keys) == [0]
    return keys, out


def test_a_run_on_conversations_trains_evaluates_and_resumes(packed, config_file, tmp_path):
    keys, whole = packed
    assert train(config_file, tmp_path, *keys, "train.stop_at_step=6") == [0]
    assert train(config_file, tmp_path, *keys) == [0]
    assert status(whole)["weights_hash"] == status(tmp_path)["weights_hash"]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["val_nelbo"]) for line in lines if "val_nelbo" in line)


def test_a_run_with_end_tokens_starts_from_weights_resumes_and_keeps_its_policy(packed, config_file, tmp_path, capfd):
    keys = (*packed[0][:3], f"model.init_from={packed[1]}", "train.num_steps=6", "train.save_every=3")
    assert train(config_file, tmp_path / "whole", *keys) == [0]
    assert train(config_file, tmp_path / "parts", *keys, "train.stop_at_step=3") == [0]
    assert train(config_file, tmp_path / "parts", *keys, "data.answer_padding=full") == [2]
    assert "data.answer_padding: random -> full" in capfd.readouterr().err
    assert train(config_file, tmp_path / "parts", *keys) == [0]
    assert status(tmp_path / "whole")["weights_hash"] == status(tmp_path / "parts")["weights_hash"]
    import_distributed()
    command, reports = ["evaluate", str(tmp_path / "whole"), "--max_rows=4", "--num_draws=4", "--device=cpu"], []
    for ranks in (1, 2):
        capfd.readouterr()
        assert run_ranks(ranks, main, [*command, f"--tensor_parallel_size={ranks}"]) == [0] * ranks
        reports.append(json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert reports[1]["nelbo"] == pytest.approx(reports[0]["nelbo"], rel=1e-6)
    assert reports[1]["tokens"] == reports[0]["tokens"]


def test_packing_with_end_tokens_is_refused(packed, config_file, tmp_path, capfd):
    assert train(config_file, tmp_path, *packed[0][:4]) == [2]
    assert "set data.packing=none, or data.answer_padding=none" in capfd.readouterr().err


QUESTION = "<|im_start|>user\n7?<|im_end|>\n<|im_start|>assistant\n"
PAST = 21  # tokens of it


def test_a_question_is_asked_by_the_template_and_the_answer_alone_is_shown(packed, capsys):
    flags = ["--max_new_tokens=20", "--num_samples=8", "--json", "--temperature=3"]
    assert main(["sample", str(packed[1]), "--chat", "--prompt=7?", *flags]) == 0
    asked = json.loads(capsys.readouterr().out)["samples"]
    inference = load_for_inference(packed[1], device="cpu")
    end_id, [made] = inference.chat("chatml").end_id, inference.generate(
        ["7?"], chat="chatml", num_samples=8, max_new_tokens=20, temperature=3)  # fmt: skip
    assert [sample.text for sample in made] == [sample["text"] for sample in asked]
    assert any(sample["tokens"][-1] == end_id for sample in asked)
    for sample in asked:
        past, new = sample["tokens"][:PAST], sample["tokens"][PAST:]
        assert inference.tokenizer.decode(past) == QUESTION and end_id not in new[:-1]
        assert sample["text"] == inference.tokenizer.decode(new[:-1] if new[-1] == end_id else new)


def test_a_file_of_conversations_is_answered(packed, tmp_path):
    from dlm_scale.sample_batch import add_arguments, run

    lines = [{"id": 1, "messages": [{"role": "user", "content": "7?"}]}, {"id": 2, "prompt": "7?"},
             {"id": 3, "messages": "7?"}, {"id": 4, "messages": [{"role": "user"}]},
             {"id": 5, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7?"}],
              "max_new_tokens": 2}]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def sample(name: str, *flags: str) -> tuple[list[dict], list[dict]]:
        out = tmp_path / name
        given = [str(packed[1]), f"--input={tmp_path}/in.jsonl", f"--output={out}", "--max_new_tokens=6", "--steps=2"]
        run(parser.parse_args([*given, "--device=cpu", *flags]))
        return [[json.loads(line) for line in path.read_text().splitlines()]
                for path in (out, tmp_path / f"{name}.errors.jsonl")]  # fmt: skip

    answered, bad = sample("chat.jsonl", "--chat")
    tokenizer = load_for_inference(packed[1], device="cpu").tokenizer
    assert [row["id"] for row in answered] == [1, 2, 5] and [item["line"] for item in bad] == [3, 4]
    assert "list of objects" in bad[0]["error"] and "message 0" in bad[1]["error"]
    assert answered[0]["tokens"][:PAST] == answered[1]["tokens"][:PAST]
    assert tokenizer.decode(answered[0]["tokens"][:PAST]) == QUESTION and len(answered[0]["text"]) <= 6
    assert "Be brief." in tokenizer.decode(answered[2]["tokens"])
    plain, bad = sample("plain.jsonl")
    assert [row["id"] for row in plain] == [2] and plain[0]["text"].startswith("7?")
    assert "say --chat" in bad[0]["error"]
    with pytest.raises(UsageError, match="settings.chat: null -> "):
        sample("plain.jsonl", "--chat")


def test_a_template_that_the_checkpoint_cannot_write_is_refused(packed, tmp_path, capsys):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for template, cause in (("no/such.jinja", "no template of that name"), (f"{tmp_path}/own.jinja", "by no special token")):
        assert main(["sample", str(packed[1]), f"--chat={template}", "--prompt=7?"]) == 2
        assert cause in capsys.readouterr().err
    assert main(["sample", str(packed[1]), "--chat", "--infill=7<mask>"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_the_autoregressive_twin_refuses_conversations(chat):
    config = case_config(objective__kind="autoregressive", data__train=str(chat / "train"), model__seq_len=SEQ_LEN)
    with pytest.raises(UsageError, match="holds conversations"):
        open_datasets(config)

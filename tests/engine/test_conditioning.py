"""Conditioning on labels: prompts left out in training, guidance in sampling, against closed forms."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm_scale.data.loader import open_data
from dlm_scale.data.prepare import prepare
from dlm_scale.diffusion.segments import Rows, drop_prompts
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import make_batch
from dlm_scale.errors import UsageError
from dlm_scale.inference import load_for_inference
from dlm_scale.sampling.engine import generate
from tests.engine.cases import case_config, data_of
from tests.engine.reliability import train

SEQ_LEN, LETTERS, LIKELY = 8, 2, 0.8


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Texts of LETTERS letters, each `a` with probability LIKELY under the label A, `b` under B."""
    folder, rng, rows = tmp_path_factory.mktemp("labels"), np.random.default_rng(0), []
    for number in range(2000):
        label, other = ("A", "B") if number % 2 else ("B", "A")
        letters = np.where(rng.random(LETTERS) < LIKELY, label.lower(), other.lower())
        rows.append([{"role": "user", "content": label}, {"role": "assistant", "content": "".join(letters)}])
    (folder / "d.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    prepare(str(folder / "d.jsonl"), "char", folder / "D", text_key="messages", chat="label", workers=1)
    return folder / "D"


def _trainer(data, **overrides):
    config = case_config(model__seq_len=SEQ_LEN, train__global_batch_size=64, **overrides)
    runtime = SimpleNamespace(mesh=SimpleNamespace(data_size=1, data_rank=0), device=torch.device("cpu"))
    accumulation = 64 // config.train.micro_batch_size
    return SimpleNamespace(config=config, accumulation=accumulation, vocabulary=data.vocabulary, runtime=runtime)


def test_prompts_are_left_out_as_often_as_asked_whatever_the_split(labelled):
    data = open_data(str(labelled / "train"), SEQ_LEN, 1)
    (off,) = make_batch(_trainer(data, train__micro_batch_size=64), data, TrainState())
    (on,) = make_batch(_trainer(data, train__micro_batch_size=64, data__prompt_dropout=0.25), data, TrainState())
    parts = make_batch(_trainer(data, train__micro_batch_size=16, data__prompt_dropout=0.25), data, TrainState())
    assert torch.equal(torch.cat([part.xt_BL for part in parts]), on.xt_BL)
    assert torch.equal(on.rows_N, off.rows_N) and torch.equal(on.target_N, off.target_N)
    changed_BL = on.xt_BL != off.xt_BL
    is_dropped_B = changed_BL.any(1)
    assert (on.xt_BL[changed_BL] == data.vocabulary.mask_id).all() and not (changed_BL & off.is_masked_BL).any()
    assert (changed_BL.sum(1)[is_dropped_B] == 3).all()  # start, label, end; padding stays as it is
    assert 4 < is_dropped_B.sum() < 32


def test_each_packed_document_keeps_or_loses_its_own_prompt():
    maskable_BL = np.tile([False, True, False, True, True, False], (400, 1))
    bounds = np.arange(0, 400 * 6 + 1, 2, dtype=np.int32)
    made = drop_prompts(Rows(np.zeros((400, 6), np.int64), maskable_BL, bounds), 1, np.arange(400), 0.5, mask_id=9)
    assert not made.ids_BL[maskable_BL].any()
    lost = (made.ids_BL == 9)[:, [0, 2, 5]]
    assert np.all(abs(lost.mean(0) - 0.5) < 4 * 0.5 / 20)
    pairs = [abs(np.corrcoef(lost[:, i], lost[:, j])[0, 1]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert max(pairs) < 0.2


def test_text_without_prompts_is_refused():
    config = case_config(data__prompt_dropout=0.1)
    data = data_of(config)
    with pytest.raises(UsageError, match="prompt_dropout: the rows of data.train have no prompts"):
        make_batch(_trainer(data, data__prompt_dropout=0.1), data, TrainState())


def test_guidance_sharpens_the_label_as_the_closed_form_says(labelled, config_file, tmp_path):
    """All letters in one pass: guidance w draws them from given^(w+1) / blind^w, normalised, of the network's own laws;
    and these are near the true ones: 0.8 given the label, even without."""
    keys = (f"data.train={labelled}/train", f"data.validation={labelled}/val", "data.prompt_dropout=0.2",
            f"model.seq_len={SEQ_LEN}", "model.num_layers=1", "train.global_batch_size=64", "train.micro_batch_size=64",
            "train.num_steps=200", "train.eval_every=0", "train.log_every=50", "train.save_every=0",
            "optimizer.learning_rate=6e-3")  # fmt: skip
    assert train(config_file, tmp_path, *keys) == [0]
    inference = load_for_inference(tmp_path)
    ids, mask_id, num_rows = inference.tokenizer, inference.vocabulary.mask_id, 1024
    a, b = (int(ids.encode(letter)[0]) for letter in "ab")
    prompts = {label: [ids.special_ids["<|im_start|>"], *map(int, ids.encode(label)), ids.special_ids["<|im_end|>"]]
               for label in "AB"}  # fmt: skip
    shares = {}
    for guidance in (0.0, 2.0):
        for label, prompt in prompts.items():
            row = torch.tensor(prompt + [mask_id] * LETTERS)
            is_fixed_BL = (torch.arange(len(row)) < len(prompt)).expand(num_rows, -1)
            made = generate(inference.predict, row.expand(num_rows, -1), is_fixed_BL, sampler="ancestral", num_steps=1, seed=1,
                            guidance=guidance, request_hashes=range(num_rows), sample_indices=[0] * num_rows,
                            mask_id=mask_id).ids_BL[:, len(prompt) :]  # fmt: skip
            both = torch.stack([row, torch.where(is_fixed_BL[0], mask_id, row)])
            given_LV, blind_LV = inference.predict(both, torch.arange(both.numel())).view(2, len(row), -1)[:, len(prompt) :]
            law_LV = ((guidance + 1) * given_LV - guidance * blind_LV).softmax(-1)
            for letter in (a, b):
                share, expected = (made == letter).double().mean().item(), law_LV[:, letter].mean().item()
                assert share == pytest.approx(expected, abs=4 * 0.5 / (num_rows * LETTERS) ** 0.5)
            right, letters = (made == (a if label == "A" else b)).sum(), ((made == a) | (made == b)).sum()
            shares[label, guidance] = (right / letters).item()
            assert blind_LV[0, a].exp().item() == pytest.approx(blind_LV[0, b].exp().item(), abs=0.1)
    assert shares["A", 0.0] + shares["B", 0.0] == pytest.approx(2 * LIKELY, abs=0.15)
    assert all(shares[label, 2.0] > shares[label, 0.0] + 0.05 for label in "AB"), shares


GAUSSIAN = ("objective.kind=gaussian", "model.time_conditioning=adaln", "model.tied=false", "gaussian.embedding_dim=8",
            "gaussian.num_steps=50", "gaussian.self_conditioning=true")  # fmt: skip


def test_gaussian_prompts_are_read_without_noise_and_carry_no_loss(labelled):
    data = open_data(str(labelled / "train"), SEQ_LEN, 1)
    keys = {key.replace(".", "__"): value for key, value in (pair.split("=") for pair in GAUSSIAN)}
    typed = {**keys, "model__tied": False, "gaussian__embedding_dim": 8, "gaussian__num_steps": 50,
             "gaussian__self_conditioning": True, "data__prompt_dropout": 0.25}  # fmt: skip
    (whole,) = make_batch(_trainer(data, train__micro_batch_size=64, **typed), data, TrainState())
    parts = make_batch(_trainer(data, train__micro_batch_size=16, **typed), data, TrainState())
    for name in ("xt_BL", "noise_BLE", "reads_guess_B", "is_masked_BL", "row_t_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    rows = data.rows(np.arange(64))
    assert np.array_equal(np.flatnonzero(rows.maskable_BL), whole.rows_N.numpy())
    assert not whole.is_masked_BL[torch.from_numpy(~rows.maskable_BL)].any() and len(whole.row_t_B) == 64
    hidden_BL = (whole.xt_BL.numpy() == data.vocabulary.mask_id) & ~rows.maskable_BL
    assert 4 < hidden_BL.any(1).sum() < 32 and set(hidden_BL.sum(1).tolist()) == {0, 3}


def test_a_gaussian_checkpoint_is_asked_by_labels_with_guidance(labelled, config_file, tmp_path, capfd):
    """Splits of the batch and ZeRO stages give one run; the bound is of the answers; a guided sample takes two looks."""
    from dlm_scale import cli

    keys = (f"data.train={labelled}/train", f"data.validation={labelled}/val", "data.prompt_dropout=0.2", *GAUSSIAN,
            f"model.seq_len={SEQ_LEN}", "model.num_layers=1", "train.num_steps=4", "train.eval_every=0", "train.save_every=0")
    assert train(config_file, tmp_path / "one", *keys) == [0]
    split = ("train.micro_batch_size=2", "deepspeed.zero_optimization.stage=3")
    assert train(config_file, tmp_path / "two", *keys, *split, ranks=2) == [0, 0]
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    for ours, theirs in zip(one, two, strict=True):
        assert ours.get("batch_hash") == theirs.get("batch_hash")
        for key in ("loss", "grad_norm", "val_nelbo"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=2e-5)
    capfd.readouterr()
    asked = ["sample", str(tmp_path / "one"), "--prompt=A", "--steps=5", "--max_new_tokens=4", "--json", "--device=cpu"]
    assert cli.main([*asked, "--chat=label", "--guidance=2", "--num_samples=2"]) == 0
    assert [sample["nfe"] for sample in json.loads(capfd.readouterr().out)["samples"]] == [10, 10]
    assert cli.main([*asked, "--guidance=2"]) == 2 and "add --chat" in capfd.readouterr().err
    report = ["evaluate", str(tmp_path / "one"), "--data", str(labelled / "val"), "--max_rows=8", "--json", "--device=cpu"]
    assert cli.main(report) == 0
    assert json.loads(capfd.readouterr().out)["tokens"] == 8 * (LETTERS + 1)

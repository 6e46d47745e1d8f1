"""Training on conversations: the past is never masked nor lost, whatever the split; validation is conditional."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm_scale import cli
from dlm_scale.data.loader import ValidationData, open_data
from dlm_scale.data.prepare import prepare
from dlm_scale.diffusion.likelihood import summarise
from dlm_scale.engine.evaluation import cross_entropy_fn, nelbo_sums
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import make_batch
from dlm_scale.errors import UsageError
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


def test_a_run_on_conversations_trains_evaluates_and_resumes(chat, config_file, tmp_path, capfd):
    keys = (f"data.train={chat}/train", f"data.validation={chat}/val", "data.packing=best_fit", f"model.seq_len={SEQ_LEN}")
    assert train(config_file, tmp_path / "whole", *keys) == [0]
    assert train(config_file, tmp_path / "parts", *keys, "train.stop_at_step=6") == [0]
    assert train(config_file, tmp_path / "parts", *keys) == [0]
    assert status(tmp_path / "whole")["weights_hash"] == status(tmp_path / "parts")["weights_hash"]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["val_nelbo"]) for line in lines if "val_nelbo" in line)
    import_distributed()
    command, reports = ["evaluate", str(tmp_path / "whole"), "--max_rows=4", "--num_draws=4", "--device=cpu"], []
    for ranks in (1, 2):
        capfd.readouterr()
        assert run_ranks(ranks, cli.main, [*command, f"--tensor_parallel_size={ranks}"]) == [0] * ranks
        reports.append(json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert reports[1]["nelbo"] == pytest.approx(reports[0]["nelbo"], rel=1e-6)
    assert reports[1]["tokens"] == reports[0]["tokens"]


def test_the_autoregressive_twin_refuses_conversations(chat):
    config = case_config(objective__kind="autoregressive", data__train=str(chat / "train"), model__seq_len=SEQ_LEN)
    with pytest.raises(UsageError, match="holds conversations"):
        open_datasets(config)

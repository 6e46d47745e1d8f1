"""model.init_from: weights of an autoregressive twin, a grown vocabulary, refusals; annealed attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dlm_scale import ops
from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.writer import write_checkpoint
from dlm_scale.config import config_from_dict, config_from_text, dump_config
from dlm_scale.config_text import dump_yaml
from dlm_scale.data.loader import open_data
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.data.prepare import prepare
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.engine.step import ANNEAL_STAGES, annealed
from dlm_scale.engine.warm_start import open_origin
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box
from dlm_scale.model.transformer import Transformer
from tests.engine.cases import build_trainer, case_config, make_batch
from tests.forked import run_ranks

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda sigma".split()
SHAPE = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "seq_len": 32, "logit_shift": True, "tied": True}
NUM_STEPS = 40


def raw_config(folder: Path, out: str, **model) -> dict:
    return {
        "model": {**SHAPE, **model}, "data": {"train": f"{folder}/data/train", "validation": f"{folder}/data/val"},
        "train": {"global_batch_size": 16, "micro_batch_size": 16, "num_steps": NUM_STEPS, "precision": "fp32",
                  "out": str(folder / out), "eval_rows": 64, "save_every": 0, "log_every": NUM_STEPS},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
    }  # fmt: skip


def make_text() -> str:
    """Each word allows three that may follow it."""
    rng, text, at = np.random.default_rng(0), [], 0
    for _ in range(9000):
        text.append(WORDS[at])
        at = (3 * at + int(rng.integers(3))) % len(WORDS)
    return " ".join(text) + "\n"


def train_autoregressive(folder: Path) -> None:
    """A causal twin that predicts the next token, in plain torch, as a checkpoint of ours."""
    torch.manual_seed(0)
    config = config_from_dict(raw_config(folder, "unused"))
    data = open_data(f"{folder}/data/train", SHAPE["seq_len"], 1)
    model = Transformer(config.model, data.vocabulary)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        x_BL = torch.from_numpy(data.rows(np.arange(16) + 16 * step))
        rows = torch.arange(x_BL.numel()).view(x_BL.shape)[:, 1:].flatten()
        logits = model(x_BL, rows_N=rows, readout=lambda head: head.logits(), attention=ops.Causal())
        optimizer.zero_grad()
        F.cross_entropy(logits, x_BL[:, 1:].flatten()).backward()
        optimizer.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_weights(folder / "autoregressive", config, data, weights)


def save_weights(run: Path, config, data, weights) -> None:
    pieces = [Piece(spec.name, "param", spec.shape, spec.view, full_box(spec.view), 0,
                    weights[spec.name][: spec.shape[0]].reshape(-1).contiguous())
              for spec in parameter_table(config.model, data.vocabulary).values()]  # fmt: skip
    state = {"step": 0, "samples": 0, "tokens": 0, "data_fingerprint": "0" * 32}
    documents = {
        "config.yaml": dump_config(config).encode(),
        "state.json": json.dumps(state).encode(),
        TOKENIZER_DOCUMENT: json.dumps(data.tokenizer_meta.tokenizer_dict()).encode(),
    }
    run.mkdir()
    write_checkpoint(
        run, 0, pieces, rank=0, world_size=1, gather=lambda value: [value], documents=documents, keep_last=1
    )


ARMS = {"cold": [], "warm": [], "annealed": [f"diffusion.attention_anneal_steps={NUM_STEPS // 2}"]}


def last_nelbo(folder: Path, name: str) -> float:
    """Validation NELBO at the end of one arm: a run from nothing, or from the autoregressive weights."""
    from dlm_scale.train import main

    warm = [] if name == "cold" else [f"model.init_from={folder}/autoregressive"]
    main([str(folder / "config.yaml"), f"train.out={folder}/{name}", "train.device=cpu", *warm, *ARMS[name]])
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [line["val_nelbo"] for line in lines if "val_nelbo" in line][-1]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    (folder / "text.txt").write_text(make_text())
    prepare([str(folder / "text.txt")], "char", folder / "data")
    return folder


def test_a_warm_start_beats_a_cold_one_on_equal_steps(text):
    run_ranks(1, train_autoregressive, text)
    (text / "config.yaml").write_text(dump_yaml(raw_config(text, "x")))
    found = {name: run_ranks(1, last_nelbo, text, name)[0] for name in ARMS}
    assert found["warm"] < 0.8 * found["cold"] and found["annealed"] < 0.8 * found["cold"], found


def origin_of(folder: Path, changes: dict, meta=None):
    config = config_from_text((next((folder / "run" / "checkpoints").iterdir()) / "config.yaml").read_text(), "x")
    config = config_from_dict(config.model_dump(mode="json") | {"model": {**config.model.model_dump(), **changes}})
    data = open_data("synthetic:38", 16, 5)
    data = data if meta is None else type("Data", (), {"tokenizer_meta": meta})
    return open_origin(next((folder / "run" / "checkpoints").iterdir()), config, data), config


@pytest.fixture
def small(tmp_path) -> Path:
    """Random weights over 37 ids, the mask last."""
    config = case_config(data__synthetic_vocab_size=37, model__tied=False, model__seq_len=16)
    data = open_data("synthetic:37", 16, 5)
    table = parameter_table(config.model, data.vocabulary)
    save_weights(tmp_path / "run", config, data, {name: torch.randn(spec.shape) for name, spec in table.items()})
    return tmp_path


def test_a_grown_vocabulary_gets_the_mean_of_the_rows_there_were(small, caplog):
    from dlm_scale.checkpoint.reader import open_checkpoint

    initial, config = origin_of(small, {})
    assert "embedding.weight has 37 rows there, 38 here (1 new" in caplog.text
    old = open_checkpoint(next((small / "run" / "checkpoints").iterdir()))
    table = parameter_table(config.model, Vocabulary(38, 37))
    for name in ("embedding.weight", "head.weight"):
        spec, stored = table[name], old.read(name)
        want = torch.cat([stored, stored.double().mean(0, keepdim=True).float()])
        assert torch.equal(initial(spec, full_box(spec.view), 0, spec.numel).view(spec.shape), want)
        parts = [initial(spec, ((20, len(want)), (0, 32)), start, 50) for start in range(0, 500, 50)]  # a rank's part
        assert torch.equal(torch.cat(parts), want[20:].flatten()[:500])
    spec = table["blocks.1.attention.qkv.weight"]
    assert torch.equal(initial(spec, full_box(spec.view), 96, 500), old.read(spec.name).flatten()[96:596])


def test_weights_that_do_not_fit_are_refused_by_name(small):
    for changes, complaint in (
        ({"num_layers": 3}, "model.num_layers=2 is needed"),
        ({"mlp": "gelu"}, "model.mlp=swiglu"),
    ):
        with pytest.raises(UsageError, match=complaint):
            origin_of(small, changes)
    for changes, complaint in (
        ({"model": {**SHAPE, "init_from": "a"}, "train": {"branch_from": "b"}}, "branch_from"),
        ({"diffusion": {"attention_anneal_steps": 3}, "train": {"compile": True}}, "compile"),
    ):
        raw = raw_config(small, "x")
        with pytest.raises(UsageError, match=complaint):
            config_from_dict({key: {**raw.get(key, {}), **changes.get(key, {})} for key in {*raw, *changes}})


def test_attention_opens_from_causal_to_full():
    config = case_config(diffusion__attention_anneal_steps=32)
    length, seen = config.model.seq_len, []
    for step in range(33):
        network = lambda attention=None: seen.append(attention)  # noqa: E731
        annealed(network, config, step)()
    sizes = [mask.size for mask in seen[:32]]
    assert (
        sizes[0] == 0 and sizes == sorted(sizes) and sizes[-1] == length - length // ANNEAL_STAGES and seen[32] is None
    )
    allowed = lambda mask: ops.allowed_BLL(mask, 1, 8, torch.device("cpu"))  # noqa: E731
    assert torch.equal(allowed(ops.Lookahead(0)), allowed(ops.Causal())) and bool(allowed(ops.Lookahead(7)).all())
    assert allowed(ops.Lookahead(2))[0, 3].tolist() == [True] * 6 + [False] * 2
    with pytest.raises(UsageError, match="packed"):
        annealed(lambda: None, config, 0)(attention=ops.Segments(torch.tensor([0, 3])))


def test_training_sees_the_annealed_mask():
    (losses,) = run_ranks(1, _losses_of_masks)
    assert losses["step 0"] == losses["causal"] != losses["full"] == losses["later"]


def _losses_of_masks() -> dict[str, float]:
    from functools import partial

    from dlm_scale.engine.runtime import start_runtime
    from dlm_scale.engine.saving import start_fresh
    from dlm_scale.engine.state import TrainState

    runtime = start_runtime("cpu", 1, 60)
    config, data = case_config(diffusion__attention_anneal_steps=4), open_data("synthetic:389", 16, 5)
    trainer = build_trainer(config, runtime, data.vocabulary)
    state = start_fresh(trainer)
    with torch.no_grad():
        for parameter in trainer.engine.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        (corrupted,) = make_batch(trainer, data, TrainState())
        call = lambda fn: float(masked_diffusion(fn, corrupted)[0])  # noqa: E731
        causal = lambda *a, attention=None, **o: trainer.engine(*a, attention=ops.Causal(), **o)  # noqa: E731
        steps = {name: call(annealed(trainer.engine, config, step)) for name, step in (("step 0", 0), ("later", 4))}
        return {**steps, "causal": call(causal), "full": call(partial(trainer.engine)), "state": state.step}

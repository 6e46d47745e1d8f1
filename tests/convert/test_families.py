"""Every family in and out: the logits of its own class before, of ours in between, of its own class again after."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")

from dlm_scale import ops
from dlm_scale.convert.source import open_model
from dlm_scale.convert.targets import write_checkpoint_target, write_hf
from dlm_scale.inference import load_for_inference
from tests.convert.twins import FAMILIES, LENGTH, VOCAB

torch.set_num_threads(1)
QUIET = {"say": lambda text: None}
OPTIONS = {"bert": {"mask_id": 3}, "modernbert": {"mask_id": 3}}
AUTOREGRESSIVE = {"gpt2", "llama", "qwen2", "qwen3"}


def converted(source, target, name):
    model = open_model(source, **OPTIONS.get(name, {}))
    write_checkpoint_target(model, target, slot=None, ranks=1, tensor_size=1, **QUIET)
    return model


def our_logits(folder, x_BL, attention=None):
    """Rows of ours in the order of positions; without the shift of an autoregressive model."""
    inference = load_for_inference(folder, device="cpu")
    inference.model.is_shifted = False
    rows = torch.arange(x_BL.numel())
    with torch.no_grad():
        flat = inference.model(x_BL, rows_N=rows, readout=lambda head: head.logits(), attention=attention)
    return flat.view(*x_BL.shape, -1), inference


def difference(ours, theirs):
    """Largest difference over all ids that ours may predict."""
    theirs = theirs[..., : ours.shape[-1]]
    allowed = ~ours.isneginf()
    assert allowed.float().mean() > 0.9
    return float((ours - theirs)[allowed].abs().max()), float(theirs.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_in_and_goes_out_with_its_logits(name, tmp_path):
    family = FAMILIES[name]
    original = family.make(tmp_path / "theirs")
    model = converted(tmp_path / "theirs", tmp_path / "ours", name)
    x_BL = torch.randint(0, VOCAB - 1, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    want = family.logits(original, x_BL)
    attention = ops.Causal() if name in AUTOREGRESSIVE else None
    got, _ = our_logits(tmp_path / "ours", x_BL, attention)
    error, scale = difference(got, want)
    assert error < 1e-5 and scale > 0.5, (error, scale)
    assert model.shape.logit_shift == (name in AUTOREGRESSIVE)
    back = open_model(tmp_path / "ours")
    write_hf(back, tmp_path / "back", dtype="float32", slot="param", family=name, max_shard_bytes=1 << 30, **QUIET)
    again = family.logits(family.load(tmp_path / "back"), x_BL)
    assert difference(got, again)[0] < 1e-5

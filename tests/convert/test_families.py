"""Every family in and out: the logits of its own class before, of ours in between, of its own class again after."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")

from dlm_scale import ops
from dlm_scale.config import load_config
from dlm_scale.convert.families import LLADA, MODERNBERT
from dlm_scale.convert.mapping import match_tensors
from dlm_scale.convert.source import open_model
from dlm_scale.convert.stores import safetensors_store
from dlm_scale.convert.targets import write_checkpoint_target, write_hf
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.errors import UsageError
from dlm_scale.inference import load_for_inference
from dlm_scale.model.parameters import count_parameters, parameter_table
from tests.conftest import ROOT
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


def test_dream_is_qwen2_that_looks_both_ways_and_predicts_from_the_left(tmp_path):
    theirs = FAMILIES["qwen2"].make(tmp_path / "dream")
    path = tmp_path / "dream" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "Dream", "mask_token_id": 30}))
    model = converted(tmp_path / "dream", tmp_path / "ours", "dream")
    x_BL = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = theirs(x_BL, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH)).logits
    shifted = torch.cat([plain[:, :1], plain[:, :-1]], 1)
    inference = load_for_inference(tmp_path / "ours", device="cpu")
    got = inference.predict(x_BL, torch.arange(x_BL.numel())).view(2, LENGTH, VOCAB)
    assert model.meta.mask_id == 30 and model.shape.logit_shift and model.shape.bias == "qkv"
    shifted[..., 30] = -torch.inf
    assert difference(got, shifted.log_softmax(-1))[0] < 1e-5
    write_hf(open_model(tmp_path / "ours"), tmp_path / "back", dtype="float32", slot="param", family="dream",
             max_shard_bytes=1 << 30, **QUIET)  # fmt: skip
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (again["model_type"], again["mask_token_id"]) == ("Dream", 30)
    first, second = (safetensors_store(tmp_path / name) for name in ("dream", "back"))
    assert all(torch.equal(first.read(key), second.read(key)) for key in second.tensors)


def test_files_of_torch_save_and_short_names_come_in_too(tmp_path):
    model = FAMILIES["gpt2"].make(tmp_path / "theirs")
    safetensors = tmp_path / "theirs" / "model.safetensors"
    wanted = {name: safetensors_store(safetensors).read(name) for name in safetensors_store(safetensors).tensors}
    safetensors.unlink()
    short = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    torch.save(short, tmp_path / "theirs" / "pytorch_model.bin")
    ours = open_model(tmp_path / "theirs")
    assert torch.equal(ours.read("positions.weight", "param", None, torch.float32), wanted["transformer.wpe.weight"])
    table = ours.read("embedding.weight", "param", None, torch.float32)
    assert torch.equal(table[:VOCAB], wanted["transformer.wte.weight"]) and ours.meta.mask_id == VOCAB
    torch.testing.assert_close(table[VOCAB], table[:VOCAB].mean(0))
    assert any("1 new (the mean of the others)" in note for note in ours.notes)


def test_the_folders_tokenizer_says_what_the_vocabulary_is(tmp_path):
    """More ids than the tokenizer knows are left out, a mask that it lacks is added."""
    import tokenizers

    FAMILIES["llama"].make(tmp_path / "theirs")
    words = {f"w{i}": i for i in range(30)}
    bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    bpe.add_special_tokens(["</s>"])
    bpe.save(str(tmp_path / "theirs" / "tokenizer.json"))
    model = open_model(tmp_path / "theirs")
    assert (model.meta.vocab_size, model.meta.mask_id, model.meta.eos_id) == (32, 31, 30)
    assert any("31 of 37 rows" in note for note in model.notes)  # the head's: the mask needs none
    write_checkpoint_target(model, tmp_path / "ours", slot=None, ranks=1, tensor_size=1, **QUIET)
    assert load_for_inference(tmp_path / "ours", device="cpu").tokenizer.encode("w3").tolist() == [3]


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_scaling 'llama3'"),
     ("llama", {"attention_bias": True}, "attention_bias = True"), ("qwen2", {"use_sliding_window": True}, "sliding"),
     ("gpt2", {"activation_function": "relu"}, "activation_function"), ("bert", {}, "add --mask_id"),
     ("mdlm", {"time_conditioning": True}, "time_conditioning = True"), ("llada", {"alibi": True}, "alibi"),
     ("modernbert", {"classifier_bias": True}, "classifier_bias"), ("gpt2", {"n_embd": None}, "n_embd")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(name, changes, complaint, tmp_path):
    FAMILIES[name].make(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(UsageError, match=complaint):
        open_model(tmp_path / "theirs")


def test_a_model_that_is_none_of_a_family_is_not_exported_to_it(tmp_path):
    FAMILIES["modernbert"].make(tmp_path / "theirs")
    model = open_model(tmp_path / "theirs", mask_id=3)
    for family, complaint in (("llama", "model.|place"), ("gpt2", "model.|place"), ("mdlm", "model.|place")):
        with pytest.raises(UsageError, match=complaint):
            write_hf(model, tmp_path / "x", dtype="float32", slot="param", family=family, max_shard_bytes=1, **QUIET)
    assert not list(tmp_path.glob("x*"))


def llada_8b_index() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published LLaDA-8B, which follow from its architecture: 32 blocks, 4096 wide, 12288 in
    the MLP, 126464 ids, no biases, head not tied."""
    width, ffn, vocab = 4096, 12288, 126464
    inner = {
        "attn_norm": (width,),
        "ff_norm": (width,),
        "attn_out": (width, width),
        "ff_out": (width, ffn),
        **{f"{x}_proj": (width, width) for x in "qkv"},
        "ff_proj": (ffn, width),
        "up_proj": (ffn, width),
    }
    names = {f"blocks.{i}.{part}": shape for i in range(32) for part, shape in inner.items()}
    names |= {"wte": (vocab, width), "ff_out": (vocab, width), "ln_f": (width,)}
    return {f"model.transformer.{name}.weight": shape for name, shape in names.items()}


def test_llada_8b_yaml_maps_every_tensor_of_the_published_checkpoint():
    index = llada_8b_index()
    assert len(index) == 291 and sum(map(math.prod, index.values())) == 8_015_581_184
    config = load_config(ROOT / "configs" / "llada_8b.yaml")
    vocabulary = Vocabulary(126464, 126336)
    table = parameter_table(config.model, vocabulary)
    matches = match_tensors(LLADA.rows, table, config.model.num_layers)
    assert {match.theirs: match.shape for match in matches} == index
    described = LLADA.config_of(config.model)
    assert (described["d_model"], described["n_layers"], described["rope_theta"]) == (4096, 32, 500_000)


def test_modernbert_149m_yaml_has_the_shape_of_modernbert_base():
    import transformers

    with torch.device("meta"):
        theirs = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig())
    config = load_config(ROOT / "configs" / "modernbert_149m.yaml")
    values = json.loads(transformers.ModernBertConfig().to_json_string(use_diff=False))
    shape = MODERNBERT.shape_of(values, "its config")
    assert {**shape, "seq_len": 2048} == {key: getattr(config.model, key) for key in shape}
    count = count_parameters(config.model, Vocabulary(50368, 50284))
    assert count == sum(parameter.numel() for parameter in theirs.parameters())

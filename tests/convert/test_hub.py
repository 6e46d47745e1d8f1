"""Exports as Hugging Face's classes see them: the same logits, the same text, the same ids, with and without us."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")

from dlm_scale.convert.source import open_model
from dlm_scale.convert.targets import write_hf
from dlm_scale.data.chat import CHAT_TOKENS, CHATML, Chat
from dlm_scale.data.tokenizer import make_tokenizer
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.hub import DlmScaleForMaskedLM, TextDiffusionPipeline
from dlm_scale.hub.configuration import SHAPE, DlmScaleConfig
from dlm_scale.inference import load_for_inference

torch.set_num_threads(1)
SHAPES = {
    "tied": {"tied": True},
    "untied": {"tied": False, "logit_softcap": 3.0},
    "adaln": {"time_conditioning": "adaln", "qk_norm": False, "mlp": "gelu"},
    "bert": {"norm": "layernorm", "norm_bias": True, "norm_placement": "post", "bias": "all", "mlp": "gelu_tanh",
             "position": "learned", "embedding_norm": "extra", "head_transform": True, "head_bias": True},
    "modern": {"norm": "layernorm", "mlp": "geglu", "embedding_norm": "first", "window": 3, "logit_shift": True},
    "heads": {"critic": True, "sampler_head": True},
}  # fmt: skip


def exported(source: Path, target: Path, slot: str = "param", **options) -> Path:
    options = {
        "dtype": "float32",
        "family": "dlm_scale",
        "max_shard_bytes": 1 << 30,
        "say": lambda text: None,
    } | options
    write_hf(open_model(source), target, slot=slot, **options)
    return target


def ids(length=24, rows=2, size=257, seed=0):
    return torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(seed))


def our_logits(folder, x_BL, **options):
    inference = load_for_inference(folder, device="cpu", **options)
    rows, m_B = torch.arange(x_BL.numel()), (x_BL == 256).float().mean(1)
    with torch.no_grad():
        return inference.model(x_BL, rows_N=rows, m_B=m_B, readout=lambda head: head.logits()).view(*x_BL.shape, -1)


@pytest.mark.parametrize("name", SHAPES)
def test_the_class_gives_the_logits_of_ours_and_saves_what_it_loaded(name, checkpoint, tmp_path):
    source = checkpoint(**SHAPES[name])
    folder = exported(source, tmp_path / "export")
    model = DlmScaleForMaskedLM.from_pretrained(folder).eval()
    x_BL = ids()
    with torch.no_grad():
        got = model(x_BL).logits
        eager = DlmScaleForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()(x_BL).logits
    want = our_logits(source, x_BL, use_ema=False)
    assert got.shape == (2, 24, 257) and got[..., 256].isneginf().all()
    torch.testing.assert_close(got[..., :256], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(eager, got, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
    assert isinstance(again, DlmScaleForMaskedLM)
    for (key, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), key
    assert (again.transformer.head.weight is again.transformer.embedding.weight) == model.config.tied


def test_the_averaged_weights_are_chosen_by_name(checkpoint, tmp_path):
    source = checkpoint()
    folder = exported(source, tmp_path / "ema", slot="ema")
    with torch.no_grad():
        got = DlmScaleForMaskedLM.from_pretrained(folder).eval()(ids()).logits[..., :256]
    torch.testing.assert_close(got, our_logits(source, ids(), use_ema=True), rtol=0, atol=1e-6)


def test_shape_fields_are_those_of_the_config():
    from dlm_scale.config import ModelConfig

    assert set(SHAPE) == set(ModelConfig.model_fields) - {"init_from", "depth"}
    assert DlmScaleConfig(num_layers=3).num_hidden_layers == 3
    inside, last = DlmScaleConfig(vocab_size=9, mask_token_id=4).vocabulary, DlmScaleConfig().vocabulary
    assert (inside.num_outputs, last.num_outputs) == (9, Vocabulary(257, 256).num_outputs)


def test_a_padded_text_counts_as_if_it_stood_alone(checkpoint, tmp_path):
    model = DlmScaleForMaskedLM.from_pretrained(exported(checkpoint(time_conditioning="adaln"), tmp_path / "e")).eval()
    short, long = ids(9, 1), ids(16, 1, seed=1)
    right = torch.cat([short, torch.zeros(1, 7, dtype=torch.long)], 1)
    left = torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[0, 9:], mask[1, :7] = 0, 0
    with torch.no_grad():
        got = model(torch.cat([right, left, long]), attention_mask=mask).logits
        alone, whole = model(short).logits[0], model(long).logits[0]
    for part, want in ((got[0, :9], alone), (got[1, 7:], alone), (got[2], whole)):
        torch.testing.assert_close(part[:, :256], want[:, :256], rtol=0, atol=1e-5)
    mask[2, 4] = 0
    with pytest.raises(ValueError, match="padding inside a text"):
        model(torch.cat([right, left, long]), attention_mask=mask)


def test_training_by_its_loss_and_with_recomputed_blocks(checkpoint, tmp_path):
    model = DlmScaleForMaskedLM.from_pretrained(exported(checkpoint(), tmp_path / "e")).train()
    x_BL, labels = ids(), ids(size=256, seed=2)
    labels[:, ::2] = -100
    model(x_BL, labels=labels).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(x_BL, labels=labels).loss.backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, model.parameters(), strict=True))
    logits = model(x_BL).logits.detach()
    wanted = torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(model(x_BL, labels=labels).loss.detach(), wanted)


def test_large_exports_come_in_shards_with_an_index(checkpoint, tmp_path):
    source = checkpoint()
    folder = exported(source, tmp_path / "e", max_shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3 and (folder / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        got = DlmScaleForMaskedLM.from_pretrained(folder).eval()(ids()).logits[..., :256]
    torch.testing.assert_close(got, our_logits(source, ids(), use_ema=False), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def pipe(specimen, tmp_path_factory) -> TextDiffusionPipeline:
    folder = exported(specimen.run, tmp_path_factory.mktemp("pipe") / "export")
    made = transformers.pipeline("text-diffusion", model=str(folder))
    assert isinstance(made, TextDiffusionPipeline)
    return made


@pytest.mark.parametrize("flags, sampler", [({}, "ancestral"), ({"use_confidence": True}, "low_confidence"),
                                            ({"allow_edits": True}, "remdm"),
                                            ({"sampler": "entropy"}, "entropy")])  # fmt: skip
def test_the_pipeline_writes_the_text_of_dlm_sample(pipe, specimen, flags, sampler):
    inference = load_for_inference(specimen.run, device="cpu")
    [wanted] = inference.generate(["the "], num_samples=2, max_new_tokens=9, steps=7, seed=5, sampler=sampler)
    made = pipe("the ", num_steps=7, seed=5, max_length=13, num_samples=2, **flags)
    assert made["decoded_texts"] == [sample.text for sample in wanted]
    assert made["num_passes"] == [sample.nfe for sample in wanted] and made["final_ids"] == [s.ids for s in wanted]


def test_the_pipeline_stops_streams_and_goes_beyond_the_context(pipe):
    frames = list(pipe.stream_generation("the", num_steps=4, max_length=12, seed=1))
    assert (
        frames[0] == "the" + "<|mask|>" * 9
        and frames[-1] == pipe("the", num_steps=4, max_length=12, seed=1)["decoded_texts"][0]
    )
    whole = pipe("the", num_steps=4, max_length=60, block_size=5, seed=1)["decoded_texts"][0]
    assert len(whole) == 60 and whole.startswith("the")
    stop = whole[30]
    cut = pipe("the", num_steps=4, max_length=60, block_size=5, seed=1, stop_token=stop)["decoded_texts"][0]
    assert cut == "the" + whole[3:].split(stop)[0]
    streamed = list(pipe.stream_semi_autoregressive_generate("the", block_size=5, max_length=60, num_steps=4, seed=1))
    assert streamed[-1] == whole and len(whole) > pipe.model.config.seq_len
    blocks = [whole[3 + 5 * i : 8 + 5 * i] for i in range(11)]
    assert len(set(blocks)) > 8  # every block has random numbers of its own


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"max_length": 17}, "needs block_size"), ({"num_step": 3}, "num_step"), ({"stop_token": "ab"}, "2 tokens"),
     ({"allow_edits": True, "use_confidence": True}, "exclude each other"), ({"block_size": 17}, "at most the context"),
     ({"num_steps": 0}, "num_steps"), ({"max_length": 2}, "3 tokens")],
)  # fmt: skip
def test_the_pipeline_refuses_what_it_cannot_do(pipe, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        pipe("the", **settings)


TEXTS = [
    "",
    "the quick brown fox",
    "Grüße, 世界 \U0001f600\r\n\ttabs  and   spaces ",
    "don't we'll 12345 x=y_z; \n\n\n end",
]


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2", "hf"])
def test_tokenizers_travel_with_their_ids(kind, checkpoint, tmp_path, shared_data):
    spec = (
        str(shared_data("gpt2.tiktoken")) if kind == "gpt2" else str(_hf_tokenizer(tmp_path)) if kind == "hf" else kind
    )
    tokenizer = make_tokenizer(spec, TEXTS, CHAT_TOKENS)
    folder = exported(checkpoint(tokenizer), tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.mask_token_id == tokenizer.vocabulary.mask_id and len(theirs) == tokenizer.vocabulary.size
    for text in TEXTS:
        own = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == own
        assert theirs.decode(own) == tokenizer.decode(own)
    assert [theirs.convert_tokens_to_ids(name) for name in CHAT_TOKENS] == list(tokenizer.special_ids.values())
    talk = [{"role": "user", "content": "fox we don't"}]
    said = [("user", talk[0]["content"])]
    wanted = Chat(CHATML, tokenizer.special_ids, tokenizer.encode).prompt(said).tolist() if kind != "char" else None
    rendered = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nfox we don't<|im_end|>\n<|im_start|>assistant\n"
    if wanted:
        assert theirs.encode(rendered, add_special_tokens=False) == wanted


def _hf_tokenizer(folder: Path) -> Path:
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[MASK]", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


ALONE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"dlm_scale", "deepspeed", "megatron", "pydantic", "xxhash", "yaml_"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from transformers import AutoModelForMaskedLM, pipeline
pipe = pipeline("text-diffusion", model=sys.argv[1], trust_remote_code=True)
print(repr(pipe("the ", num_steps=7, seed=5, max_length=13)["decoded_texts"][0]))
"""


def test_an_export_answers_without_this_project(pipe, tmp_path):
    """Nothing of ours can be imported; the code comes from the export alone."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    folder = pipe.model.config._name_or_path
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(pipe("the ", num_steps=7, seed=5, max_length=13)["decoded_texts"][0])


@pytest.mark.slow
def test_a_fresh_environment_needs_transformers_and_torch_alone(pipe, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pins = [f"{name}=={version(name)}" for name in ("torch", "transformers")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True, stdin=subprocess.DEVNULL)
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", ALONE, pipe.model.config._name_or_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(pipe("the ", num_steps=7, seed=5, max_length=13)["decoded_texts"][0])


def test_an_export_carries_the_heads_and_another_family_says_that_it_leaves_them_out(checkpoint, tmp_path):
    """The critic's and the sampler head's words are those of the checkpoint, bit by bit."""
    source, said = checkpoint(critic=True, sampler_head=True, logit_shift=True, qk_norm=False), []
    model = DlmScaleForMaskedLM.from_pretrained(exported(source, tmp_path / "hf")).eval()
    x_BL, rows_N = ids(), torch.arange(48)
    left_N, right_N = torch.arange(48) % 5 - 1, torch.arange(48) % 7 - 1
    ours, theirs = load_for_inference(source, device="cpu", use_ema=False).predict, model.predict
    assert ours.critique(x_BL, rows_N).equal(theirs.critique(x_BL, rows_N))
    (plain, again), (same, once_more) = (predict.local(x_BL, rows_N) for predict in (ours, theirs))
    assert plain.equal(same) and again(rows_N, left_N, right_N).equal(once_more(rows_N, left_N, right_N))
    exported(source, tmp_path / "llama", family="llama", say=said.append)
    assert any("left out, for llama" in text and "head.critic.weight" in text for text in said)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert sum("critic" in name for name, _ in loaded.named_parameters()) == 0

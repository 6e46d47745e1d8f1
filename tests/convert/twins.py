"""Small random models of every family: of transformers' own class, or twins written from published architectures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

VOCAB, LENGTH = 37, 16


def shaken(model: nn.Module, by: float = 0.2) -> nn.Module:
    """Every parameter random, biases and gains too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class Library:
    """A family that transformers has; `causal` is how its own class attends, `full` asks it to look both ways."""

    def __init__(self, config: str, model: str, **values):
        self.names, self.values = (config, model), {"vocab_size": VOCAB, **values}

    def make(self, folder: Path) -> nn.Module:
        import transformers

        config = getattr(transformers, self.names[0])(**self.values)
        model = shaken(getattr(transformers, self.names[1])(config))
        model.save_pretrained(folder)
        return model

    def load(self, folder: Path) -> nn.Module:
        import transformers

        return getattr(transformers, self.names[1]).from_pretrained(folder).eval()

    def logits(self, model: nn.Module, x_BL: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=x_BL).logits


class Twin:
    """A family whose code does not come with transformers."""

    def __init__(self, build, config: dict):
        self.build, self.config = build, config

    def make(self, folder: Path) -> nn.Module:
        model = shaken(self.build(self.config), 0.05)
        folder.mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(self.config))
        return model

    def load(self, folder: Path) -> nn.Module:
        model = self.build(json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    def logits(self, model: nn.Module, x_BL: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x_BL)


def rotated(x_BHLE: torch.Tensor, base: float) -> torch.Tensor:
    """x cos + rotate_half(x) sin."""
    length, width = x_BHLE.shape[-2:]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    left, right = x_BHLE.chunk(2, -1)
    return x_BHLE * cos + torch.cat([-right, left], -1) * sin


def attended(q, k, v, heads: int, kv_heads: int, base: float) -> torch.Tensor:
    """Bidirectional attention of [B, L, H E] projections."""
    batch, length, _ = q.shape
    q, k, v = (x.view(batch, length, n, -1).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q, k = rotated(q, base), rotated(k, base)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, length, -1)


class RMS(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class LladaBlock(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        width, head = c["d_model"], c["d_model"] // c["n_heads"]
        self.c = c
        self.attn_norm, self.ff_norm = RMS(width, c["rms_norm_eps"]), RMS(width, c["rms_norm_eps"])
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, c["n_kv_heads"] * head, bias=False) for _ in "kv")
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj, self.up_proj = (nn.Linear(width, c["mlp_hidden_size"], bias=False) for _ in "gu")
        self.ff_out = nn.Linear(c["mlp_hidden_size"], width, bias=False)

    def forward(self, x):
        y, c = self.attn_norm(x), self.c
        x = x + self.attn_out(
            attended(self.q_proj(y), self.k_proj(y), self.v_proj(y), c["n_heads"], c["n_kv_heads"], c["rope_theta"])
        )
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class Llada(nn.Module):
    """LLaDA (arXiv 2502.09992): Llama without a causal mask, under OLMo's names."""

    def __init__(self, c: dict):
        super().__init__()
        names = {
            "wte": nn.Embedding(c["embedding_size"], c["d_model"]),
            "ln_f": RMS(c["d_model"], c["rms_norm_eps"]),
            "blocks": nn.ModuleList(LladaBlock(c) for _ in range(c["n_layers"])),
            "ff_out": nn.Linear(c["d_model"], c["embedding_size"], bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(names)})

    def forward(self, x_BL):
        parts = self.model["transformer"]
        x = parts["wte"](x_BL)
        for block in parts["blocks"]:
            x = block(x)
        return parts["ff_out"](parts["ln_f"](x))


class GainNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight


class DitBlock(nn.Module):
    def __init__(self, width: int, heads: int, condition: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = GainNorm(width), GainNorm(width)
        self.attn_qkv, self.attn_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(condition, 6 * width)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        q, k, v = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, -1)
        x = x + gate1 * self.attn_out(attended(q, k, v, self.heads, self.heads, 10_000.0))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Dit(nn.Module):
    """MDLM's DiT (arXiv 2406.07524) with time_conditioning false: the modulation runs at sigma 0."""

    def __init__(self, config: dict):
        super().__init__()
        width, condition, vocab = config["hidden_dim"], config["cond_dim"], config["vocab_size"]
        backbone = nn.Module()
        backbone.vocab_embed = nn.Module()
        backbone.vocab_embed.embedding = nn.Parameter(torch.randn(vocab, width))
        backbone.sigma_map = nn.Module()
        backbone.sigma_map.mlp = nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))
        backbone.blocks = nn.ModuleList(
            DitBlock(width, config["n_heads"], condition) for _ in range(config["n_blocks"])
        )
        last = nn.Module()
        last.norm_final, last.linear = GainNorm(width), nn.Linear(width, vocab)
        last.adaLN_modulation = nn.Linear(condition, 2 * width)
        backbone.output_layer = last
        self.backbone = backbone

    def forward(self, x_BL):
        b = self.backbone
        time = torch.zeros(len(x_BL))
        angle = time[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        c = F.silu(b.sigma_map.mlp(torch.cat([angle.cos(), angle.sin()], -1)))
        x = b.vocab_embed.embedding[x_BL]
        for block in b.blocks:
            x = block(x, c)
        shift, scale = b.output_layer.adaLN_modulation(c)[:, None].chunk(2, 2)
        return b.output_layer.linear(b.output_layer.norm_final(x) * (1 + scale) + shift)


DECODER = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
    "rope_theta": 5000.0,
}
ENCODER = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
}
FAMILIES = {
    "gpt2": Library("GPT2Config", "GPT2LMHeadModel", n_layer=2, n_embd=32, n_head=4, n_positions=LENGTH, bos_token_id=0,
                    eos_token_id=0),
    "llama": Library("LlamaConfig", "LlamaForCausalLM", **DECODER),
    "qwen2": Library("Qwen2Config", "Qwen2ForCausalLM", tie_word_embeddings=True, **DECODER),
    "qwen3": Library("Qwen3Config", "Qwen3ForCausalLM", head_dim=16, **DECODER),
    "bert": Library("BertConfig", "BertForMaskedLM", **ENCODER),
    "modernbert": Library("ModernBertConfig", "ModernBertForMaskedLM", local_attention=4, global_attn_every_n_layers=3,
                          cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, **ENCODER),
    "llada": Twin(Llada, {"model_type": "llada", "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2,
                          "rope": True, "mlp_hidden_size": 48, "max_sequence_length": LENGTH, "rms_norm_eps": 1e-5,
                          "rope_theta": 5e5, "weight_tying": False, "vocab_size": VOCAB, "embedding_size": VOCAB, "mask_token_id": 30}),
    "mdlm": Twin(Dit, {"model_type": "mdlm", "n_blocks": 2, "hidden_dim": 32, "n_heads": 4, "model_length": LENGTH,
                       "cond_dim": 128, "vocab_size": VOCAB, "time_conditioning": False, "dropout": 0.1}),
}  # fmt: skip

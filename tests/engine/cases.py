"""Small training runs inside one process group, and the plain-torch twin that they must equal."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale import ops
from dlm_scale.config import config_from_dict
from dlm_scale.data.loader import open_data
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.segments import Rows, cut_rows, row_lengths, segment_times
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.engine.batch_hash import batch_hash
from dlm_scale.engine.build import build_trainer
from dlm_scale.engine.muon import newton_schulz
from dlm_scale.engine.objectives import objective_of, with_draws
from dlm_scale.engine.optimizer import rate_factor
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.state_access import zero_slot_source
from dlm_scale.engine.step import make_batch, reduce_sums, train_step
from dlm_scale.model.initialise import initial_values
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import full_box
from dlm_scale.model.transformer import Transformer

# Tables are padded to 128 rows a tensor-parallel rank: with 389 ids each of 4 ranks has logical rows, the last one
# also padding.
VOCAB, BATCH = 389, 8


def case_config(**overrides: Any):
    """A 2-layer model on synthetic tokens; clipping is active. `section__key=value` overrides.

    eps: where the terms of a gradient cancel, what is left (1e-9 beside terms of 1e-3) is rounding, and Adam's first
    updates multiply it by learning_rate / eps. At eps 1e-8 two correct orders of summation differ by 2e-5 in single
    weights after one step; at 1e-5, still far below the gradients themselves, by 2e-6 after ten.
    """
    raw = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "seq_len": 16, "tied": False},
        "data": {"train": "synthetic", "synthetic_vocab_size": VOCAB},
        "train": {"global_batch_size": BATCH, "micro_batch_size": BATCH, "num_steps": 100, "precision": "fp32",
                  "out": "unused", "seed": 5},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 3, "gradient_clip": 0.2,
                      "weight_decay": 0.1, "eps": 1e-5},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        if section == "zero":
            raw["deepspeed"]["zero_optimization"][name] = value
        else:
            raw.setdefault(section, {})[name] = value
    return config_from_dict(raw)


MODELS = {  # names of model variants: what they change
    "base": {},
    "gqa": {"model__num_kv_heads": 2},
    "mqa": {"model__num_kv_heads": 1},
    "gelu": {"model__mlp": "gelu", "model__logit_softcap": 2.0, "diffusion__z_loss": 0.1},
    "adaln": {"model__tied": True, "model__time_conditioning": "adaln"},
    "packed": {"model__time_conditioning": "adaln", "data__random_length_share": 0.5},  # see data_of
    "modern": {"model__norm": "layernorm", "model__mlp": "geglu", "model__embedding_norm": "first", "model__window": 3,
               "model__global_every": 2, "model__head_transform": True, "model__logit_shift": True,
               "data__random_length_share": 0.5},
    "post": {"model__norm": "layernorm", "model__norm_bias": True, "model__norm_placement": "post",
             "model__embedding_norm": "extra", "model__mlp": "gelu_tanh", "model__head_transform": True},
    "chars": {"data__synthetic_vocab_size": 37},  # all ranks but the first hold padding alone
    "recompute": {"train__activation_checkpoint_every": 1},
    "critic": {"model__critic": True, "model__tied": True, "model__time_conditioning": "adaln",
               "objective__critic_alpha": 0.5, "objective__critic_start": 2, "objective__critic_end": 6,
               "objective__critic_every": 3, "objective__critic_scope": "masked_and_visible",
               "data__random_length_share": 0.5},
    "heads": {"model__critic": True, "model__sampler_head": True, "objective__critic_alpha": 0.5,
              "objective__critic_detach": True, "objective__critic_weighting": True, "objective__critic_start": 1,
              "objective__sampler_alpha": 0.5, "objective__sampler_start": 2},
}


@dataclass(frozen=True)
class Case:
    """One layout, ZeRO stage, batch split and model variant."""

    stage: int
    tensor: int
    data: int
    accumulation: int = 1
    sequence: bool = False
    model: str = "base"

    @property
    def layout(self) -> str:
        return f"TP{self.tensor}xDP{self.data}" + ("+SP" if self.sequence else "")

    def __str__(self) -> str:
        return f"{self.layout}-zero{self.stage}-acc{self.accumulation}-{self.model}"

    def config(self, **overrides: Any):
        return case_config(parallel__tensor_parallel_size=self.tensor, parallel__sequence_parallel=self.sequence,
                           train__micro_batch_size=BATCH // (self.data * self.accumulation), zero__stage=self.stage,
                           **MODELS[self.model], **overrides)


def run_cases(cases: list[Case], steps: int) -> dict[Case, Any]:
    """Each case in one process group; all must have one layout. For `run_ranks`; the results are rank 0's."""
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", cases[0].tensor)
    results = {}
    for case in cases:
        results[case] = run_engine(runtime, case.config(), steps)
    return results if runtime.is_first else {}


def import_distributed() -> None:
    """Import what every rank needs once, before the fork."""
    import deepspeed  # noqa: F401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.tensor_parallel  # noqa: F401


def data_of(config):
    """Synthetic rows; where rows are cut short, documents are packed into them too."""
    data = open_data(f"synthetic:{config.data.synthetic_vocab_size}", config.model.seq_len, config.train.seed)
    return PackedData(data) if config.data.random_length_share else data


@dataclass(frozen=True)
class PackedData:
    """Sample i holds documents of 1 + i % 7 and 4 tokens and of what remains, less padding at the last i % 3."""

    plain: Any

    @property
    def vocabulary(self):
        return self.plain.vocabulary

    @property
    def tokenizer_meta(self):
        return self.plain.tokenizer_meta

    def rows(self, sample_B: np.ndarray) -> Rows:
        ids_BL = self.plain.rows(sample_B)
        length = ids_BL.shape[1]
        starts_B4 = np.arange(len(ids_BL))[:, None] * length + np.stack(
            [0 * sample_B, 1 + sample_B % 7, 5 + sample_B % 7, length - sample_B % 3], axis=1)
        bounds_S1 = np.unique([*starts_B4.ravel(), ids_BL.size]).astype(np.int32)
        return Rows(ids_BL, np.arange(length) < length - sample_B[:, None] % 3, bounds_S1)


def logical_weights(trainer, slot: str = "param") -> dict[str, np.ndarray]:
    """Every logical tensor of the training state, put together from all ranks' pieces. Collective."""
    mine = [(p.name, p.shape, p.view, p.box, p.flat_start, p.tensor.clone()) for p in trainer.state_access.pieces()
            if p.slot == slot]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    flat = {}
    for name, shape, view, box, start, values in (piece for rank in everyone for piece in rank):
        whole, place = flat.setdefault(name, (torch.full(shape, torch.nan), {}))
        buffer = place.setdefault(box, torch.full([stop - start for start, stop in box], torch.nan))
        buffer.view(-1)[start : start + len(values)] = values
        whole.view(view)[tuple(slice(*bounds) for bounds in box)] = buffer
    return {name: whole.numpy() for name, (whole, _) in flat.items()}


def noisy_values(spec, seed: int, box, start: int, numel: int) -> torch.Tensor:
    """Weights as after some training: nothing is zero, so that no class of gradient is too small to be wrong."""
    noise = dataclasses.replace(spec, name="noise." + spec.name, init_std=0.1)
    values = (initial_values(each, seed, box, start, numel) for each in (spec, noise))
    return torch.from_numpy(sum(values))


def start_noisy(trainer) -> TrainState:
    seed = trainer.config.train.seed
    source = zero_slot_source(lambda spec, box, start, numel: noisy_values(spec, seed, box, start, numel))
    trainer.state_access.fill(source, step=0)
    return TrainState()


def run_engine(runtime, config, steps: int) -> dict[str, Any]:
    """Train `steps` steps from the seed (noisy weights); losses, norms, hashes of each step and the final weights."""
    data = data_of(config)
    trainer = build_trainer(config, runtime, data.vocabulary)
    lines, _ = train_lines(trainer, data, start_noisy(trainer), steps)
    return {"lines": lines, "weights": logical_weights(trainer)}


def train_lines(trainer, data, state: TrainState, steps: int) -> tuple[list[dict[str, Any]], TrainState]:
    """Loss, norm and batch hash of each of `steps` steps after `state`, and the state after them."""
    runtime, lines = trainer.runtime, []
    for _ in range(steps):
        batch = make_batch(trainer, data, state)
        result = train_step(trainer, batch, state)
        lines.append({"loss": reduce_sums(trainer, result["sums"])["loss"], "grad_norm": float(result["grad_norm"]),
                      "hash": batch_hash(batch, runtime.mesh, runtime.device)})
        state = state.advanced(trainer.config.train.global_batch_size)
    return lines, state


def whole_batch(config, data, step: int):
    """The noised global batch of the step after `step` finished ones."""
    rows, seed, length = config.train.global_batch_size, config.train.seed, config.model.seq_len
    index, times = step * rows + np.arange(rows), stratified_times(seed, step, rows)
    given, options = data.rows(index), {"denominator": rows * length}
    maskable_BL = np.ones((rows, length), bool)
    if config.data.random_length_share:
        given = cut_rows(given, row_lengths(seed, index, length, config.data.random_length_share))
        times = segment_times(seed, index, times, given.bounds_S1, length)
        maskable_BL = given.maskable_BL
        options = {"denominator": maskable_BL.sum(), "maskable_BL": maskable_BL,
                   "attention": ops.Segments(torch.from_numpy(given.bounds_S1))}
        given = given.ids_BL
    corrupted = corrupt(given, index, times, seed=seed, schedule=SCHEDULES[config.diffusion.schedule],
                        weighting=WEIGHTINGS[config.diffusion.weighting], mask_id=data.vocabulary.mask_id, **options)
    return with_draws(config, corrupted, maskable_BL, index)


def run_twin(config, steps: int) -> dict[str, Any]:
    """The same run in plain torch: one process, whole batch, torch's AdamW and clip_grad_norm_."""
    data = data_of(config)
    table = parameter_table(config.model, data.vocabulary)
    model = Transformer(config.model, data.vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = noisy_values(table[name], config.train.seed, full_box(table[name].view), 0, table[name].numel)
            parameter.zero_()
            parameter[: table[name].shape[0]] = values.view(table[name].shape)
    options, named = config.optimizer, dict(model.named_parameters())
    matrices = {n: torch.zeros(table[n].shape) for n in table if options.name == "muon" and table[n].is_hidden_matrix}
    decaying = [named[n] for n in table if table[n].decays and n not in matrices]
    tables = [named[n] for n in ("embedding.weight", "head.weight") if n in named]
    others = [named[n] for n in table if not table[n].decays and not n.endswith(("embedding.weight", "head.weight"))]
    groups = [{"params": decaying, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0},
              {"params": tables, "weight_decay": 0.0, "rate": options.embedding_learning_rate or options.learning_rate}]
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=options.eps)
    lines, state, objective = [], TrainState(), objective_of(config)
    for _ in range(steps):
        corrupted = whole_batch(config, data, state.step)
        loss = objective(model, corrupted, state.step)[0] / corrupted.denominator
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        factor = rate_factor(state.step, config.train.num_steps, options)
        for group in optimizer.param_groups:
            group["lr"] = group.get("rate", options.learning_rate) * factor
        for name, momentum in matrices.items():
            parts = _rows_of_parts(name, config.model)
            _muon_step(named[name], momentum, parts, options.muon_learning_rate * factor, options)
        optimizer.step()
        alone = SimpleNamespace(data_size=1)
        lines.append({"loss": loss.item(), "grad_norm": norm.item(),
                      "hash": batch_hash([corrupted], alone, torch.device("cpu"))})
        state = state.advanced(config.train.global_batch_size)
    weights = {n: p.detach()[: table[n].shape[0]].numpy() for n, p in model.named_parameters()}
    return {"lines": lines, "weights": weights}


def _rows_of_parts(name: str, model) -> list[torch.Tensor | slice]:
    """Rows of the matrices that are fused into one: Q, K, V by head; gate then up."""
    if name.endswith("gate_up.weight"):
        return [slice(0, model.ffn_size), slice(model.ffn_size, None)]
    if not name.endswith("qkv.weight"):
        return [slice(None)]
    heads, queries = model.num_kv_heads, model.num_heads // model.num_kv_heads
    kind = torch.tensor(([0] * queries + [1, 2]) * heads).repeat_interleave(model.head_dim)
    return [torch.nonzero(kind == which)[:, 0] for which in range(3)]


@torch.no_grad()
def _muon_step(weight, momentum, parts, rate: float, options) -> None:
    momentum.lerp_(weight.grad, 1 - options.muon_momentum)
    nesterov = weight.grad.lerp(momentum, options.muon_momentum)
    weight.mul_(1 - rate * options.weight_decay)
    for rows in parts:
        part = nesterov[rows]
        weight[rows] -= rate * max(1.0, part.shape[0] / part.shape[1]) ** 0.5 * newton_schulz(part)
    weight.grad = None


def twins(cases, steps: int) -> dict[str, dict[str, Any]]:
    """The twin of each model variant that occurs."""
    return {name: run_twin(case_config(**MODELS[name]), steps) for name in {case.model for case in cases}}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest differences: loss (absolute), grad_norm (relative), weights (absolute); `hashes` counts unequal ones."""
    pairs = list(zip(one["lines"], other["lines"], strict=True))
    assert one["weights"].keys() == other["weights"].keys()
    return {
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "grad_norm": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
        "weights": max(float(np.nan_to_num(abs(one["weights"][n] - w), nan=np.inf).max())
                       for n, w in other["weights"].items()),
        "hashes": sum(a["hash"] != b["hash"] for a, b in pairs),
    }

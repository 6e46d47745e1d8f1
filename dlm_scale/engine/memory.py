"""Out of memory: what takes it, by formula from the config, and what each change would save."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dlm_scale.engine.deepspeed_config import zero_stage
from dlm_scale.model.parameters import GATED_MLPS, parameter_table

HEAD_ROWS = 8192  # rows of logits at a time, with their gradients
MOST_CHANGES_SHOWN = 4


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on a GPU, Python's, or that of torch's CPU allocator."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error)))


def memory_of_rank(config: Any, vocabulary: Any, data_size: int) -> dict[str, float]:
    """Bytes that one rank needs, by consumer: the closed formulas of mixed-precision training under ZeRO (Rajbhandari
    et al., 2020), and the tensors that autograd keeps of the blocks as they are written in model/transformer.py."""
    train, stage, tensor = config.train, zero_stage(config), config.parallel.tensor_parallel_size
    table = parameter_table(config.model, vocabulary).values()
    held = sum(spec.numel / (1 if spec.shard_dim is None else tensor) for spec in table)
    muon = sum(spec.numel / tensor for spec in table if spec.is_hidden_matrix) if config.optimizer.name == "muon" else 0
    is_half = train.precision == "bf16"
    slots = 8 * held - 4 * muon + (4 * held if train.ema_decay else 0)
    logit_rows = min(HEAD_ROWS, train.micro_batch_size * config.model.seq_len)
    return {
        "weights": held * (2 if is_half else 4) / (data_size if stage == 3 else 1),
        "gradients": held * (6 if is_half and stage < 2 else 4) / (data_size if stage >= 2 else 1),
        "optimizer": (slots + (4 * held if is_half or stage else 0)) / (data_size if stage else 1),
        "activations": _activations(config, 2 if is_half else 4),
        "output head": 8 * vocabulary.num_outputs / tensor * logit_rows,
    }


def _activations(config: Any, item: int) -> float:
    """Of one micro-batch: norms, projections, attention and MLP of each block that is not recomputed."""
    model, train, tensor = config.model, config.train, config.parallel.tensor_parallel_size
    split = tensor if config.parallel.sequence_parallel else 1
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    mlp = (4 if model.mlp in GATED_MLPS else 2) * model.ffn_size
    block = 4 * model.hidden_size / split + (5 * queries + 3 * keys + mlp) / tensor
    every, layers = train.activation_checkpoint_every, model.num_layers
    recomputed = -(-layers // every) if every else 0
    whole = layers - recomputed + (1 if recomputed else 0)  # one block is computed again at a time
    tokens = train.micro_batch_size * model.seq_len
    return tokens * item * (whole * block + (recomputed + 3) * model.hidden_size / split)


def memory_advice(config: Any, vocabulary: Any, data_size: int) -> str:
    """The consumers, largest first, and what to change, the most useful change first."""
    parts = memory_of_rank(config, vocabulary, data_size)
    total = sum(parts.values())
    consumers = ", ".join(f"{name} {_gb(size)}" for name, size in sorted(parts.items(), key=lambda item: -item[1]))
    tried = {name: sum(memory_of_rank(changed, vocabulary, size).values())
             for name, changed, size in _changes(config, data_size)}
    useful = sorted((size, name) for name, size in tried.items() if size < 0.97 * total)[:MOST_CHANGES_SHOWN]
    changes = "; ".join(f"{name} -> {_gb(size)}" for size, name in useful) or "a smaller model or more ranks"
    return (f"out of memory. One rank needs about {_gb(total)} by the formulas: {consumers}. What to change, and what "
            f"it would need then: {changes}")


def _changes(config: Any, data_size: int) -> Iterator[tuple[str, Any, int]]:
    """(setting, config with it, data-parallel ranks then)."""
    train, tensor, stage = config.train, config.parallel.tensor_parallel_size, zero_stage(config)
    if train.micro_batch_size % 2 == 0:
        yield *_changed(config, "train", "micro_batch_size", train.micro_batch_size // 2), data_size
    if train.activation_checkpoint_every != 1:
        yield *_changed(config, "train", "activation_checkpoint_every", 1), data_size
    if train.precision == "fp32" and train.device != "cpu":
        yield *_changed(config, "train", "precision", "bf16"), data_size
    if stage < 3 and data_size > 1:
        zero = {"zero_optimization": config.deepspeed.get("zero_optimization", {}) | {"stage": stage + 1}}
        changed = config.model_copy(update={"deepspeed": config.deepspeed | zero})
        yield f"deepspeed.zero_optimization.stage={stage + 1}", changed, data_size
    if data_size % 2 == 0 and config.model.num_heads % (2 * tensor) == 0:
        yield *_changed(config, "parallel", "tensor_parallel_size", 2 * tensor), data_size // 2


def _changed(config: Any, section: str, key: str, value: Any) -> tuple[str, Any]:
    part = getattr(config, section).model_copy(update={key: value})
    return f"{section}.{key}={value}", config.model_copy(update={section: part})


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"

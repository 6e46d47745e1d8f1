"""Bytes that one training step moves, by collective and group: counted in the run, and by closed formula.

    torchrun --nproc-per-node 4 -m benchmarks.benchmark_collectives CONFIG [section.key=value ...]

Trains three steps of CONFIG on synthetic tokens, with AdamW, and counts the third. Rank 0 prints a table and, as its
last line, one JSON object; exit code 1 where a count is not what the formula says.

Bytes are a rank's payload: the whole tensor of an all-reduce, the output of an all-gather, the input of a
reduce-scatter. Over n ranks a ring sends (n-1)/n of it (twice that for an all-reduce). Symbols as in docs/parallel.md.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

Key = tuple[str, str]  # (collective, group)
KINDS = {  # torch's function: the collective
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "all_to_all_single": "all_to_all",
}
# ZeRO 3 keeps small models resident, and so sends less, unless it is told not to.
NOT_RESIDENT = [f"deepspeed.zero_optimization.stage3_{key}=0"
                for key in ("max_reuse_distance", "max_live_parameters", "param_persistence_threshold")]
SCALAR_BYTES = 8  # norms and flags: counted apart


class Ledger:
    """Payload bytes and calls of every collective since `clear`. One a process; install it before DeepSpeed starts."""

    def __init__(self):
        self.bytes: Counter[Key] = Counter()
        self.calls: Counter[Key] = Counter()
        self.groups: dict[frozenset[int], str] = {}

    def install(self) -> Ledger:
        """Wrap torch.distributed's collectives."""
        for name, kind in KINDS.items():
            setattr(dist, name, self._counted(getattr(dist, name), kind))
        return self

    def name_groups(self, mesh: Any) -> None:
        """Tell the mesh's groups apart; where both are the whole world, the one of more than one rank names it."""
        for name, group in (("data", mesh.data_group), ("tensor", mesh.tensor_group)):
            if group is not None and dist.get_world_size(group) > 1:
                self.groups[frozenset(dist.get_process_group_ranks(group))] = name

    def clear(self) -> None:
        self.bytes.clear()
        self.calls.clear()

    def _counted(self, function: Callable, kind: str) -> Callable:
        def call(*args, **kwargs):
            self._note(kind, max(map(_payload, [*args, *kwargs.values()])), _group_of(args, kwargs))
            return function(*args, **kwargs)

        return call

    def _note(self, kind: str, size: int, ranks: frozenset[int]) -> None:
        if len(ranks) == 1:  # nothing is sent
            return
        key = ("scalars", "any") if size <= SCALAR_BYTES else (kind, self.groups.get(ranks, f"{len(ranks)} ranks"))
        self.bytes[key] += size
        self.calls[key] += 1


def _payload(argument: Any) -> int:
    tensors = argument if isinstance(argument, list) else [argument]
    return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))


def _group_of(args: tuple, kwargs: dict) -> frozenset[int]:
    groups = [a for a in (*args, *kwargs.values()) if isinstance(a, dist.ProcessGroup)]
    return frozenset(dist.get_process_group_ranks(groups[0] if groups else dist.group.WORLD))


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def data_bytes(trainer: Any) -> dict[Key, int]:
    """What ZeRO with AdamW sends over the data-parallel group in a step, ZeRO 3 with nothing kept resident."""
    size, stage, micro = trainer.runtime.mesh.data_size, trainer.stage, trainer.accumulation
    if size == 1:
        return {}
    item = 2 if trainer.config.train.precision == "bf16" else 4
    numels = [getattr(p, "ds_numel", p.numel()) for p in trainer.engine.module.parameters()]
    gradients = item * sum(numels)
    if stage == 3:
        padded = item * sum(_rounded(n, size) for n in numels)
        return {("all_gather", "data"): 2 * micro * padded, ("reduce_scatter", "data"): micro * padded}
    reduced = {("all_reduce", "data"): gradients * (micro if stage == 2 else 1)}
    if stage == 0:
        return reduced
    decays = [trainer.table[name].decays for name, _ in trainer.engine.module.named_parameters()]
    groups = [sum(n for n, d in zip(numels, decays, strict=True) if d is which) for which in (True, False)]
    return reduced | {("all_gather", "data"): item * sum(_rounded(n, 2 * size) for n in groups)}


def tensor_bytes(trainer: Any, batch: Sequence[Any]) -> dict[Key, int]:
    """What tensor and sequence parallelism send over the tensor-parallel group in a step."""
    size = trainer.runtime.mesh.tensor_size
    if size == 1:
        return {}
    total: Counter[Key] = Counter()
    for corrupted in batch:
        total += micro_batch_bytes(trainer.config, size, corrupted)
    return dict(total)


def micro_batch_bytes(config: Any, size: int, corrupted: Any) -> Counter[Key]:
    """Of one micro-batch: S = B L D is the hidden state, n blocks of which r are recomputed, N selected rows."""
    model, every = config.model, config.train.activation_checkpoint_every
    item = 2 if config.train.precision == "bf16" else 4
    rows, length = corrupted.xt_BL.shape
    blocks, recomputed = model.num_layers, len(range(0, model.num_layers, every)) if every else 0
    state, num_rows = item * rows * length * model.hidden_size, len(corrupted.rows_N)
    # The table; two a block forward and two backward. Recomputation stops before a block's last sum, which no
    # gradient needs, so it adds two gathers but one sum.
    gathers, sums = 1 + 4 * blocks + 2 * recomputed, 1 + 4 * blocks + recomputed
    # Four float32 a row: largest logit; sum of exponentials, target's logit, sum of logits. Then the hidden gradient.
    loss = 4 * 4 * num_rows + item * num_rows * model.hidden_size
    gains = 2 * model.head_dim * model.qk_norm
    found: Counter[Key] = Counter()
    if config.parallel.sequence_parallel:
        adaln = rows * 6 * model.hidden_size if model.time_conditioning == "adaln" else 0
        gains += 2 * model.hidden_size + adaln
        found["reduce_scatter", "tensor"] = state * sums
        found["all_gather", "tensor"] = state * gathers + item * model.hidden_size * selected(corrupted, size)
    else:
        found["all_reduce", "tensor"] = state * sums
    found["all_reduce", "tensor"] += loss + item * blocks * gains
    if model.num_kv_heads % size:
        tail = item * blocks * 2 * model.head_dim * model.hidden_size
        found["all_reduce", "tensor" if model.num_kv_heads == 1 else f"{size // model.num_kv_heads} ranks"] += tail
    return found


def selected(corrupted: Any, size: int) -> int:
    """Rows that the gather of selected positions moves: the most that one rank has, for every rank."""
    length = corrupted.xt_BL.shape[1]
    owner_N = corrupted.rows_N % length // (length // size)
    return size * int(torch.bincount(owner_N, minlength=size).max()) if len(owner_N) else 0


def expected_bytes(trainer: Any, batch: Sequence[Any]) -> dict[Key, int]:
    return data_bytes(trainer) | tensor_bytes(trainer, batch)


def state_bytes(trainer: Any) -> dict[str, int]:
    """Bytes this rank holds between steps: the weights of the modules, and the optimizer's own tensors."""
    from dlm_scale.engine.state_access import inner_optimizer, masters

    weights = [getattr(p, "ds_tensor", p) for p in trainer.engine.module.parameters()]
    own = {tensor.data_ptr(): tensor for tensor in weights}
    optimizer = inner_optimizer(trainer.engine)
    kept = {}
    for master, _ in masters(trainer.engine, trainer.stage):
        kept |= {t.data_ptr(): t for t in (master, *optimizer.slots_of(master).values()) if t.data_ptr() not in own}
    return {"weights": sum(map(_payload, weights)), "optimizer": sum(map(_payload, kept.values()))}


def gradient_bytes(trainer: Any) -> int:
    """Bytes of gradients that this rank holds between the last backward pass and the update."""
    from dlm_scale.engine.gradients import gradient_fragments

    own = [p.grad for p in trainer.engine.module.parameters() if p.grad is not None]
    own += [values for _, _, values in gradient_fragments(trainer.engine, trainer.stage)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own}
    return sum(storages.values())


def watch_gradients() -> dict[str, int]:
    """A dict that gets the `gradients` bytes of every step from now on."""
    from dlm_scale.engine import step

    held, clip = {}, step.clip_by_global_norm

    def watched(trainer, *options):
        held["gradients"] = gradient_bytes(trainer)
        return clip(trainer, *options)

    step.clip_by_global_norm = watched
    return held


def main(arguments: list[str]) -> int:
    from benchmarks.benchmark_synthetic import synthetic_config
    from dlm_scale.data.loader import open_data
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime, stop_runtime
    from dlm_scale.engine.saving import start_fresh
    from dlm_scale.engine.step import make_batch, train_step

    config = synthetic_config(arguments[0], [*NOT_RESIDENT, "optimizer.name=adamw", *arguments[1:]])
    ledger, held = Ledger().install(), watch_gradients()
    runtime = start_runtime(config.train.device, config.parallel.tensor_parallel_size)
    ledger.name_groups(runtime.mesh)
    data = open_data(f"synthetic:{config.data.synthetic_vocab_size}", config.model.seq_len, config.train.seed)
    trainer = build_trainer(config, runtime, data.vocabulary)
    state = start_fresh(trainer)
    for _ in range(3):
        batch = make_batch(trainer, data, state)
        ledger.clear()
        train_step(trainer, batch, state)
        state = state.advanced(config.train.global_batch_size)
    wrong = report(trainer, ledger, expected_bytes(trainer, batch), held) if runtime.is_first else False
    stop_runtime()
    return int(wrong)


def report(trainer: Any, ledger: Ledger, expected: dict[Key, int], held: dict) -> bool:
    """Print the table and the JSON line; whether anything differs."""
    keys = sorted({*expected, *ledger.bytes})
    lines = [f"{'collective':16}{'group':10}{'calls':>8}{'counted':>16}{'formula':>16}"]
    for key in keys:
        formula = expected.get(key, 0)
        lines.append(f"{key[0]:16}{key[1]:10}{ledger.calls[key]:>8}{ledger.bytes[key]:>16,}{formula:>16,}")
    state = state_bytes(trainer) | held
    print("\n".join(lines), f"state bytes: {state}", sep="\n")
    counted = {" ".join(key): ledger.bytes[key] for key in keys}
    formulas = {" ".join(key): expected.get(key, 0) for key in keys}
    print(json.dumps({"counted": counted, "formula": formulas, "state": state}), flush=True)
    return any(ledger.bytes[key] != expected.get(key, 0) for key in keys if key[0] != "scalars")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Parts of other models that ours do not have, and that are constant: they go into the weights beside them.

A fold gives tensors that stand in the place of others: {name: Folded}. An unfold gives the tensors that a model of the
family has beyond those that its rows name, and the names in rows that it does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dlm_scale.convert.stores import Store

DIT_FEATURES, DIT_WIDTH = 256, 128  # of MDLM's time embedding: sinusoids, conditioning vector
Read = Callable[[str], torch.Tensor]  # of a tensor by name, float64: what is made of several is rounded once


@dataclass(frozen=True)
class Folded:
    """`make(read)` gives a tensor of `shape` from those named in `parts`."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    make: Callable[[Read], torch.Tensor]


def fold_bert(store: Store, config: Mapping[str, Any]) -> dict[str, Folded]:
    """All tokens are of type 0: its embedding goes to every position's."""
    position, kind = "bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"
    shape = (config["max_position_embeddings"], config["hidden_size"])
    return {position: Folded(shape, (position, kind), lambda read: read(position) + read(kind)[0])}


def unfold_bert(shape: Any) -> tuple[dict[str, Folded], tuple[str, ...]]:
    zeros = Folded((2, shape.hidden_size), (), lambda read: torch.zeros(2, shape.hidden_size))
    return {"bert.embeddings.token_type_embeddings.weight": zeros}, ()


def fold_dit(store: Store, config: Mapping[str, Any]) -> dict[str, Folded]:
    """MDLM without time conditioning still runs its modulation, at time 0: one shift, scale and gate for all inputs.

    Shift and scale go into the norm before them, the gate into the projection before it.
    """
    folded, width = {}, config["hidden_dim"]
    time = tuple(f"backbone.sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))

    def part(read: Read, layer: str, number: int) -> torch.Tensor:
        w0, b0, w2, b2 = (read(name) for name in time)
        features = (torch.arange(w0.shape[1]) < w0.shape[1] // 2).to(w0.dtype)  # cosines, then sines
        condition = F.silu(F.linear(F.silu(F.linear(features, w0, b0)), w2, b2))
        rows = slice(number * width, (number + 1) * width)
        return F.linear(condition, read(f"{layer}.weight")[rows], read(f"{layer}.bias")[rows])

    def add_norm(name: str, layer: str, shift: int) -> None:
        parts = (*time, f"{layer}.weight", f"{layer}.bias", f"{name}.weight")
        folded[f"{name}.weight"] = Folded(
            (width,), parts, lambda read: read(f"{name}.weight") * (1 + part(read, layer, shift + 1))
        )
        folded[f"{name}.bias"] = Folded((width,), parts, lambda read: part(read, layer, shift))

    def add_gate(name: str, layer: str, gate: int) -> None:
        shape = store.tensors[name].shape if name in store.tensors else (width,)
        parts = (*time, f"{layer}.weight", f"{layer}.bias", name)
        folded[name] = Folded(shape, parts, lambda read: scaled_rows(read(name), part(read, layer, gate)))

    for number in range(config["n_blocks"]):
        block = f"backbone.blocks.{number}"
        layer = f"{block}.adaLN_modulation"
        add_norm(f"{block}.norm1", layer, 0)
        add_norm(f"{block}.norm2", layer, 3)
        for name, gate in (("attn_out.weight", 2), ("mlp.2.weight", 5), ("mlp.2.bias", 5)):
            add_gate(f"{block}.{name}", layer, gate)
    add_norm("backbone.output_layer.norm_final", "backbone.output_layer.adaLN_modulation", 0)
    return folded


def scaled_rows(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return values * (factor if values.dim() == 1 else factor[:, None])


def unfold_dit(shape: Any) -> tuple[dict[str, Folded], tuple[str, ...]]:
    """A modulation that does nothing but add the norms' biases, which MDLM's norms do not have."""
    width, extra, dropped = shape.hidden_size, {}, []
    for i, columns in ((0, DIT_FEATURES), (2, DIT_WIDTH)):
        extra[f"backbone.sigma_map.mlp.{i}.weight"] = _constant(DIT_WIDTH, columns)
        extra[f"backbone.sigma_map.mlp.{i}.bias"] = _constant(DIT_WIDTH)

    def add(layer: str, norms: tuple[str, ...], parts: int) -> None:
        biases = tuple(f"{norm}.bias" for norm in norms)

        def make(read: Read) -> torch.Tensor:
            zero, one = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
            gates = [one] if parts == 6 else []
            return torch.cat([piece for bias in biases for piece in (read(bias), zero, *gates)])

        extra[f"{layer}.weight"] = _constant(parts * width, DIT_WIDTH)
        extra[f"{layer}.bias"] = Folded((parts * width,), biases, make)
        dropped.extend(biases)

    for number in range(shape.num_layers):
        block = f"backbone.blocks.{number}"
        add(f"{block}.adaLN_modulation", (f"{block}.norm1", f"{block}.norm2"), 6)
    add("backbone.output_layer.adaLN_modulation", ("backbone.output_layer.norm_final",), 2)
    return extra, tuple(dropped)


def _constant(*shape: int) -> Folded:
    return Folded(shape, (), lambda read: torch.zeros(shape))

"""Every class of parameter gets its whole gradient: the sharded Transformer against the whole one, no DeepSpeed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlm_scale.engine.objectives import objective_of
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import local_boxes
from dlm_scale.model.transformer import Transformer
from tests.engine.cases import MODELS, case_config, data_of, import_distributed, noisy_values, whole_batch
from tests.forked import run_ranks

TOLERANCE = 1e-5  # of the largest element of each tensor, float32

CLASSES = {  # class: (model variant, parameters)
    "column": ("base", ("blocks.0.attention.qkv.weight", "blocks.1.mlp.gate_up.weight")),
    "column, gelu": ("gelu", ("blocks.0.mlp.up.weight",)),
    "row": ("base", ("blocks.0.attention.out.weight", "blocks.1.mlp.down.weight")),
    "table": ("base", ("embedding.weight", "head.weight")),
    "tied table": ("adaln", ("embedding.weight",)),
    "replicated, whole": ("base", ("final_norm.gain",)),
    "replicated, partial under tensor parallelism": (
        "base", ("blocks.0.attention.query_norm.gain", "blocks.1.attention.key_norm.gain")),
    "replicated, partial under sequence parallelism": (
        "base", ("blocks.0.attention_norm.gain", "blocks.1.mlp_norm.gain")),
    "conditioning": ("adaln", ("time_embedding.first.weight", "time_embedding.second.weight",
                               "blocks.0.modulation.weight")),
    "conditioning of documents": ("packed", ("time_embedding.first.weight", "time_embedding.second.weight",
                                             "blocks.0.modulation.weight")),
    "shared keys and values": ("mqa", ("blocks.0.attention.qkv.weight", "blocks.1.attention.key_norm.gain")),
    "partly shared keys and values": ("gqa", ("blocks.1.attention.qkv.weight",)),
    "norm of the embeddings, transform of the head": (
        "modern", ("embedding_norm.gain", "blocks.1.attention_norm.gain", "final_norm.gain", "head_transform.dense.weight",
                   "head_transform.norm.gain")),
    "norms behind, with biases": (
        "post", ("embedding_norm.gain", "embedding_norm.bias", "blocks.0.attention_norm.bias", "blocks.1.mlp_norm.bias",
                 "blocks.0.mlp.up.weight", "head_transform.dense.weight", "head_transform.norm.gain",
                 "head_transform.norm.bias")),
    "heads beside the table": ("heads", ("head.critic.weight", "head.sampler.first.weight", "head.sampler.norm.gain",
                                         "head.sampler.second.weight")),
    "a critic's share in what is before it": ("critic", (
        "head.critic.weight", "time_embedding.first.weight", "time_embedding.second.weight", "blocks.0.modulation.weight",
        "embedding.weight", "blocks.1.attention.qkv.weight")),
    "recomputed": ("recompute", ("blocks.0.attention.qkv.weight", "blocks.0.attention_norm.gain")),
}
LAYOUTS = [(2, False), (2, True), (4, False), (4, True)]


def gradients(config, layers=None, rank: int = 0, size: int = 1) -> dict:
    """{name: (boxes, gradient)} of the whole batch on this rank's shards."""
    data = data_of(config)
    table = parameter_table(config.model, data.vocabulary)
    model = Transformer(config.model, data.vocabulary, layers, config.train.activation_checkpoint_every)
    boxes = {name: local_boxes(table[name], rank, size, len(p)) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.cat([noisy_values(table[name], 5, item.box, 0, item.numel) for item in boxes[name]])
            parameter.zero_().view(-1)[: len(values)] = values
    corrupted = whole_batch(config, data, 0)
    loss, _ = objective_of(config)(model, corrupted, 8)  # all heads are trained in that step
    loss.backward()
    return {name: (boxes[name], p.grad.view(-1).numpy()) for name, p in model.named_parameters()}


def _run(size: int, sequence: bool) -> dict:
    from dlm_scale.engine.runtime import start_runtime
    from dlm_scale.parallel.layers import layers_of

    mesh = start_runtime("cpu", size).mesh
    return {model: gradients(case_config(**MODELS[model]), layers_of(mesh, sequence), mesh.tensor_rank, size)
            for model in MODELS}


@pytest.fixture(scope="module")
def whole():
    return {model: gradients(case_config(**changes)) for model, changes in MODELS.items()}


@pytest.fixture(scope="module")
def sharded():
    """`sharded(size, sequence)`: every rank's gradients of all model variants."""
    import_distributed()
    done = {}

    def results(*layout):
        if layout not in done:
            done[layout] = run_ranks(layout[0], _run, *layout)
        return done[layout]

    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: f"TP{v[0]}{'+SP' * v[1]}")
@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_of_parameters_has_its_whole_gradient(kind, layout, sharded, whole):
    model, names = CLASSES[kind]
    table = parameter_table(case_config(**MODELS[model]).model, data_of(case_config()).vocabulary)
    for name in names:
        gradient = whole[model][name][1][: table[name].numel].reshape(table[name].view)
        largest = abs(gradient).max()
        assert largest > 1e-4
        for rank in sharded(*layout):
            boxes, found = rank[model][name]
            wanted = np.concatenate([gradient[tuple(slice(*b) for b in item.box)].reshape(-1) for item in boxes])
            assert abs(found[: len(wanted)] - wanted).max() / largest < TOLERANCE, name
            assert not found[len(wanted) :].any()  # padding


def test_every_parameter_has_a_class(whole):
    named = {(model, name.replace("blocks.1", "blocks.0")) for model, names in CLASSES.values() for name in names}
    for model, found in whole.items():
        rest = {n.replace("blocks.1", "blocks.0") for n in found} - {n for m, n in named if m in (model, "base")}
        assert not rest, (model, rest)

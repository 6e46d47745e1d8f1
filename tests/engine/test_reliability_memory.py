"""Out of memory: the formulas against what torch really keeps, and the one message."""

from __future__ import annotations

import pytest
import torch

from dlm_scale.engine.memory import is_out_of_memory, memory_advice, memory_of_rank
from dlm_scale.model.transformer import Transformer
from tests.engine.cases import case_config, data_of
from tests.engine.reliability import status, train


def kept_by_autograd(config) -> int:
    """Bytes of distinct storages that a forward pass keeps for the backward pass, without the weights."""
    vocabulary = data_of(config).vocabulary
    model = Transformer(config.model, vocabulary, None, config.train.activation_checkpoint_every)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, length = config.train.micro_batch_size, config.model.seq_len
    xt_BL, rows_N = torch.zeros(batch, length, dtype=torch.long), torch.arange(batch * length)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(xt_BL, rows_N=rows_N, readout=lambda head: head.hidden_ND.sum())
    return sum(kept.values())


@pytest.mark.parametrize("overrides", [
    {},
    {"model__mlp": "gelu"},
    {"model__num_kv_heads": 1, "model__num_layers": 4},
    {"train__activation_checkpoint_every": 1, "model__num_layers": 4},
    {"train__activation_checkpoint_every": 2, "model__num_layers": 4},
], ids=str)
def test_activations_are_what_autograd_keeps(overrides):
    shape = {"model__hidden_size": 128, "model__seq_len": 64, "train__micro_batch_size": 8}
    config = case_config(**shape, **overrides)
    formula = memory_of_rank(config, data_of(config).vocabulary, 1)["activations"]
    if config.train.activation_checkpoint_every:  # autograd keeps no block that is recomputed; the formula adds one
        without = case_config(**shape, **overrides | {"train__activation_checkpoint_every": 0})
        block = (kept_by_autograd(without) - kept_by_autograd(config)) / (
            4 // config.train.activation_checkpoint_every)
        assert formula == pytest.approx(kept_by_autograd(config) + block, rel=0.2)
    else:
        assert formula == pytest.approx(kept_by_autograd(config), rel=0.1)


@pytest.mark.parametrize("overrides, parts", [
    ({"zero__stage": 0}, (4, 4, 8)),
    ({"zero__stage": 3}, (1, 1, 3)),  # 4 ranks
    ({"zero__stage": 1, "train__precision": "bf16"}, (2, 6, 3)),
    ({"zero__stage": 2, "train__precision": "bf16", "train__ema_decay": 0.9}, (2, 1, 4)),
])
def test_bytes_a_parameter(overrides, parts):
    config = case_config(train__micro_batch_size=2, **overrides)
    vocabulary = data_of(config).vocabulary
    from dlm_scale.model.parameters import count_parameters

    found = memory_of_rank(config, vocabulary, 4)
    numel = count_parameters(config.model, vocabulary)
    assert [found[name] / numel for name in ("weights", "gradients", "optimizer")] == pytest.approx(list(parts))


def test_advice_names_consumers_changes_and_their_effect():
    config = case_config(train__micro_batch_size=4, train__precision="bf16", zero__stage=1)
    text = memory_advice(config, data_of(config).vocabulary, 2)
    for expected in ("activations ", "optimizer ", "train.micro_batch_size=2 -> ", "GB",
                     "deepspeed.zero_optimization.stage=2 -> ", "parallel.tensor_parallel_size=2 -> "):
        assert expected in text, text


def test_what_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_run_out_of_memory_says_what_to_change(config_file, tmp_path, capfd):
    def change(rank):
        from dlm_scale.engine import step

        step.loss_of = lambda *args: torch.empty(1 << 60)

    assert train(config_file, tmp_path, "data.validation=null", change=change) == [1]
    found = status(tmp_path)
    assert found["status"] == "failed" and "train.micro_batch_size=2 -> " in found["error"]
    said = capfd.readouterr().err
    assert said.count("out of memory. One rank needs about") == 1 and "Traceback" not in said

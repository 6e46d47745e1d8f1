"""What a wrong start looks like: shards that are not what the table says, ranks that read different batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dlm_scale.config import resolve_batch
from dlm_scale.engine.checks import check_against_table, check_precision, check_same_batch
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.transformer import Transformer
from dlm_scale.parallel.mesh import check_layout
from tests.engine.cases import MODELS, case_config, data_of, import_distributed, whole_batch
from tests.forked import run_ranks


def built(layers=None, **overrides):
    config = case_config(**overrides)
    vocabulary = data_of(config).vocabulary
    return Transformer(config.model, vocabulary, layers), parameter_table(config.model, vocabulary)


def _shards_pass(size: int) -> bool:
    from dlm_scale.engine.runtime import start_runtime
    from dlm_scale.parallel.layers import layers_of

    mesh = start_runtime("cpu", size).mesh
    for changes in MODELS.values():
        check_against_table(*built(layers_of(mesh, False), **changes), mesh)
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_the_shards_of_every_model_are_what_the_table_says(size):
    import_distributed()
    assert all(run_ranks(size, _shards_pass, size))


def test_a_shard_of_another_shape_is_named_with_both_shapes():
    model, table = built()
    check_against_table(model, table, SimpleNamespace(tensor_rank=0, tensor_size=1))
    with pytest.raises(RuntimeError) as refused:
        check_against_table(model, table, SimpleNamespace(tensor_rank=1, tensor_size=2))
    text = str(refused.value)
    assert "rank 1 of 2" in text and "blocks.0.attention.qkv.weight is (96, 32), the table says (48, 32)" in text
    assert "blocks.1.mlp.down.weight is (32, 128), the table says (32, 64)" in text
    assert "head.weight is (512, 32), the table says (256, 32)" in text
    assert "norm" not in text


def test_missing_parameters_are_named():
    model, table = built()
    del table["blocks.1.mlp.down.weight"]
    with pytest.raises(RuntimeError, match="blocks.1.mlp.down.weight"):
        check_against_table(model, table, SimpleNamespace(tensor_rank=0, tensor_size=1))


def _compare(changed_rank: int | None) -> str:
    from dlm_scale.engine.runtime import start_runtime

    mesh = start_runtime("cpu", 2).mesh
    config = case_config(train__seed=6 if mesh.rank == changed_rank else 5)
    try:
        check_same_batch([whole_batch(config, data_of(config), 0)], mesh, torch.device("cpu"))
    except RuntimeError as error:
        return str(error)
    return ""


def test_equal_batches_pass():
    assert run_ranks(4, _compare, None) == [""] * 4


def test_a_different_batch_is_refused_by_its_whole_group_and_by_no_other():
    first, second, third, fourth = run_ranks(4, _compare, 3)
    assert first == second == ""
    assert third == fourth and "tensor-parallel ranks [1]" in third and "data-parallel rank 1" in third


def _train_on_own_data(folder) -> str:
    import os

    from dlm_scale.train import train

    config = case_config(parallel__tensor_parallel_size=2, train__out=str(folder), train__num_steps=1)
    for name in ("logs", "checkpoints", "plots"):
        (folder / name).mkdir(exist_ok=True)
    own = case_config(train__seed=5 + int(os.environ["RANK"]))
    try:
        train(config, data_of(own), None)
    except RuntimeError as error:
        return str(error)
    return ""


def test_training_starts_with_the_comparison(tmp_path):
    texts = run_ranks(2, _train_on_own_data, tmp_path)
    assert all("first batch of tensor-parallel ranks [1]" in text for text in texts)


@pytest.mark.parametrize(
    ("overrides", "numbers"),
    [
        ({"parallel__tensor_parallel_size": 3}, "model.num_heads .*= 4 .* parallel.tensor_parallel_size = 3"),
        ({"parallel__tensor_parallel_size": 6, "model__num_heads": 12, "model__head_dim": 8, "model__num_kv_heads": 4,
          "model__ffn_size": 96}, "model.num_kv_heads .*= 4 .* parallel.tensor_parallel_size = 6"),
        ({"parallel__tensor_parallel_size": 4, "model__ffn_size": 126}, "model.ffn_size .*= 126 .* = 4"),
        ({"parallel__tensor_parallel_size": 4, "model__seq_len": 18, "parallel__sequence_parallel": True},
         "model.seq_len .*= 18 .* = 4"),
        ({"model__num_kv_heads": 3}, "model.num_heads .*= 4 .* model.num_kv_heads = 3"),
    ],
)
def test_a_layout_that_does_not_divide_names_the_numbers(overrides, numbers):
    with pytest.raises(UsageError, match=numbers):
        case_config(**overrides)


def test_the_nearest_tensor_parallel_sizes_are_named():
    with pytest.raises(UsageError, match=r"nearest sizes that fit: \[2, 4, 8\]"):
        case_config(parallel__tensor_parallel_size=5, model__num_heads=16, model__head_dim=8)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(UsageError, match=r"8 / \(2 x 3\) = 1.333.*Nearest that fit: train.global_batch_size=6 "):
        resolve_batch(case_config(train__micro_batch_size=2), 3)


def test_a_world_that_does_not_divide_names_the_sizes_that_do():
    with pytest.raises(UsageError, match=r"=4 does not divide the 6 processes .*\[1, 2, 3, 6\]"):
        check_layout(6, 4)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_vocabulary_divides(size):
    """Tables are padded, so there is no vocabulary to refuse."""
    from dlm_scale.parallel.layers import padded_rows

    for rows in (1, 37, 127, 128, 129, 389, 50257, 50258):
        assert padded_rows(rows, size) % (128 * size) == 0 and 0 <= padded_rows(rows, size) - rows < 128 * size


def test_weights_of_another_precision_are_named():
    model, _ = built()
    check_precision(model, "fp32")
    with pytest.raises(RuntimeError, match="precision=bf16, but embedding.weight is torch.float32"):
        check_precision(model, "bf16")


def _types_under_zero3(has_fp16: bool) -> list[str]:
    from deepspeed.accelerator import get_accelerator

    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime

    get_accelerator().is_fp16_supported = lambda: has_fp16
    runtime, found = start_runtime("cpu", 1), []
    for precision in ("fp32", "bf16"):
        config = case_config(zero__stage=3, train__precision=precision)
        trainer = build_trainer(config, runtime, data_of(config).vocabulary)
        found += sorted({str(p.dtype) for p in trainer.engine.module.parameters()})
    return found


@pytest.mark.parametrize("has_fp16", [False, True])
def test_precision_under_zero3_does_not_depend_on_the_processor(has_fp16):
    """DeepSpeed takes a `dtype` of zero.Init for bfloat16 on processors without fp16 units."""
    import_distributed()
    assert run_ranks(1, _types_under_zero3, has_fp16) == [["torch.float32", "torch.bfloat16"]]

"""The linear cross-entropy kernels in Triton's interpreter (run by test_interpreter.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from dlm_scale.kernels import linear_cross_entropy_triton as kernels
from dlm_scale.kernels.linear_cross_entropy import LossTerms, linear_scores_ref
from tests.kernels.oracles import (
    assert_within_twice_plain,
    found_by,
    plain_cross_entropy,
    problem,
    relative_error,
)
from tests.kernels.sharded import TERMS, assert_sharded_equals_whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def rounding_of_a_gpu(monkeypatch):
    """The interpreter cuts float32 off to bfloat16; a GPU rounds to nearest, as torch does."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a row, the last one ragged."""
    monkeypatch.setattr(kernels, "ROW_BLOCK", 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [LossTerms(), TERMS], ids=["plain", "all terms"])
@pytest.mark.parametrize("num_rows, vocab", [(50, 7), (1, 129), (50, 1003)])
def test_at_most_twice_the_error_of_plain_torch(dtype, terms, num_rows, vocab):
    made = problem(num_rows, vocab)
    oracle = plain_cross_entropy(*made.inputs(torch.float64), terms)
    plain = plain_cross_entropy(*made.inputs(dtype), terms)
    assert_within_twice_plain(found_by(kernels.linear_cross_entropy, made.inputs(dtype), terms), plain, oracle)


@pytest.mark.parametrize("terms", [LossTerms(softcap=5.0), LossTerms(z_loss=0.01), LossTerms(label_smoothing=0.2)])
@pytest.mark.parametrize("num_forbidden", [0, 40])
def test_float32_is_within_1e_6_of_the_float64_oracle(terms, num_forbidden, small_blocks):
    made = problem(20, 129, num_forbidden=num_forbidden)
    made.hidden_ND.mul_(0.25)
    oracle = plain_cross_entropy(*made.inputs(torch.float64), terms)
    found = found_by(kernels.linear_cross_entropy, made.inputs(torch.float32), terms)
    for name, wanted in oracle.items():
        if name == "is_correct_N":
            assert torch.equal(found[name], wanted)
        else:
            assert relative_error(found[name], wanted) <= 1e-6, name


@pytest.mark.parametrize("num_rows, weights", [(0, "mixed"), (9, "zero")])
def test_zeros_that_backpropagate(num_rows, weights):
    found = found_by(kernels.linear_cross_entropy, problem(num_rows, 129, weights=weights).inputs(torch.float32), TERMS)
    assert found["loss_sum"] == 0 and not found["dhidden"].any() and not found["dweight"].any()


def test_without_gradients_only_the_statistics_are_made():
    made = problem(9, 129)
    wanted = found_by(kernels.linear_cross_entropy, made.inputs(torch.float32))
    with torch.no_grad():
        out = kernels.linear_cross_entropy(*made.inputs(torch.float32))
    assert torch.equal(out.loss_sum, wanted["loss_sum"]) and torch.equal(out.lse_N, wanted["lse_N"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows, vocab, softcap", [(0, 7, None), (1, 7, 5.0), (50, 129, None), (9, 1003, 5.0)])
def test_scores_are_those_of_the_logits(dtype, num_rows, vocab, softcap):
    """Tiles with no allowed id at all among them; products of the types' numbers, added up in float32."""
    made = problem(num_rows, vocab, num_forbidden=vocab // 2)
    hidden, weight, target, _, bias = made.inputs(dtype)
    found = kernels.linear_scores(hidden, weight, target, bias, softcap=softcap)
    wanted = linear_scores_ref(made.hidden_ND, made.weight_VD, target, made.bias_V, softcap=softcap)
    for name in ("lse_N", "best_N", "picked_N"):
        assert relative_error(getattr(found, name), getattr(wanted, name)) <= 1e-6, name
    assert torch.equal(found.best_id_N, wanted.best_id_N)


def test_ties_go_to_the_smallest_id():
    found = kernels.linear_scores(torch.ones(3, 20), torch.ones(200, 20), torch.tensor([0, 70, 199]))
    assert found.best_id_N.tolist() == [0, 0, 0] and found.picked_N.tolist() == [20.0] * 3


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_equals_one_rank(size):
    assert_sharded_equals_whole(kernels.linear_cross_entropy, kernels.linear_scores, size)


def test_the_self_check_passes_and_sees_a_difference(monkeypatch):
    assert kernels.self_check("cpu") < 1e-5
    monkeypatch.setattr(kernels, "LOWEST", 100.0)
    assert not kernels.self_check("cpu") < 1e-3

"""The kernels on a GPU (pytest -m gpu): against the references, and twenty equal runs to catch races."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from dlm_scale import ops
from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.segments import Rows, cut_rows, row_lengths, segment_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.kernels.linear_cross_entropy import LossTerms
from tests.kernels.oracles import (
    MASK_ID,
    assert_same_masks,
    assert_within_twice_plain,
    found_by,
    masking_case,
    plain_cross_entropy,
    problem,
)
from tests.kernels.sharded import TERMS
from tests.kernels.test_attention import MASKS, assert_is_the_oracle, inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU is visible")
    return "cuda"


def to_gpu(values: list) -> list:
    """Leaves stay leaves."""
    return [None if x is None else x.detach().cuda().requires_grad_(x.requires_grad) for x in values]


def to_cpu(found: dict) -> dict:
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", [LossTerms(), TERMS], ids=["plain", "all terms"])
@pytest.mark.parametrize("num_rows, vocab", [(0, 7), (1, 7), (50, 129), (50, 1003), (700, 50304)])
def test_cross_entropy_at_most_twice_the_error_of_plain_torch(dtype, terms, num_rows, vocab):
    made = problem(num_rows, vocab, width=64)
    oracle = plain_cross_entropy(*made.inputs(torch.float64), terms)
    plain = to_cpu(plain_cross_entropy(*to_gpu(made.inputs(dtype)), terms))
    found = to_cpu(found_by(ops.linear_cross_entropy_outputs, to_gpu(made.inputs(dtype)), terms, backend="triton"))
    assert_within_twice_plain(found, plain, oracle)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 2500), (512, 4096)], ids=str)
def test_masks_are_those_of_numpy(ragged, shape):
    case = masking_case(*shape, ragged=ragged, seed=2**64 - 1)
    x0_BL, index_B, noise, maskable_BL = case.rows(0, shape[0])
    maskable_BL = None if maskable_BL is None else maskable_BL.cuda()
    noise = noise._replace(mask_ratio_S=noise.mask_ratio_S.cuda())
    found = ops.mask_tokens(x0_BL.cuda(), index_B.cuda(), noise, mask_id=MASK_ID, maskable_BL=maskable_BL,
                            backend="triton")  # fmt: skip
    assert_same_masks(type(found)(*(value.cpu() for value in found)), case.numpy)


@pytest.mark.parametrize("packed", [False, True])
def test_a_train_batch_masked_on_the_device_is_numpys(packed):
    x0_BL, index_B, length = torch.randint(0, MASK_ID, (64, 1024)), np.arange(64), 1024
    rows = Rows(x0_BL.numpy(), np.ones((64, length), bool))
    rows = cut_rows(rows, row_lengths(3, index_B, length, 0.5 if packed else 0.0))
    t_S, options = 1 - np.random.default_rng(0).random(64), {}
    if packed:
        t_S = segment_times(3, index_B, t_S, rows.bounds_S1, length)
        options = {"maskable_BL": rows.maskable_BL, "attention": ops.Segments(torch.from_numpy(rows.bounds_S1))}
    options |= {"seed": 3, "schedule": SCHEDULES["linear"], "weighting": WEIGHTINGS["count"], "mask_id": MASK_ID}
    wanted = corrupt(x0_BL, index_B, t_S, denominator=1.0, **options)
    draw = partial(ops.mask_on_device, device=torch.device("cuda", 0))
    found = corrupt(x0_BL, index_B, t_S, denominator=1.0, mask_tokens=draw, **options).to("cpu")
    for name in ("xt_BL", "is_masked_BL", "rows_N", "target_N", "weight_N", "elbo_weight_N", "m_B", "t_B"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_twenty_runs_are_equal():
    made, case = problem(3000, 50304, width=128), masking_case(300, 4096)
    x0_BL, index_B, noise, _ = case.rows(0, 300)
    noise = noise._replace(mask_ratio_S=noise.mask_ratio_S.cuda())
    first = None
    for _ in range(20):
        loss = found_by(ops.linear_cross_entropy_outputs, to_gpu(made.inputs(torch.bfloat16)), TERMS, backend="triton")
        hidden, weight, target, _, bias = to_gpu(made.inputs(torch.bfloat16))
        scores = ops.linear_scores(hidden, weight, target, bias, backend="triton")
        masks = ops.mask_tokens(x0_BL.cuda(), index_B.cuda(), noise, mask_id=MASK_ID, backend="triton")
        found = [*loss.values(), *scores, *masks]
        first = first or found
        assert all(map(torch.equal, first, found))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
@pytest.mark.parametrize("name", list(ops.ATTENTION_BACKENDS))
def test_attention(name, mask):
    if obstacle := ops.why_not(name, "cuda", torch.bfloat16, 64, type(mask)):
        pytest.skip(obstacle)
    if name == "sdpa":
        value = ops.Segments(mask.cu_seqlens.cuda()) if isinstance(mask, ops.Segments) else mask
        on_gpu = [x.detach().cuda().requires_grad_() for x in inputs()]
        assert_is_the_oracle(lambda q, k, v, m: ops.attention(q, k, v, value, backend=name), on_gpu, mask)

"""The vocabulary-parallel loss against torch's whole cross-entropy and megatron-core's vocabulary-parallel one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dlm_scale import ops
from tests.engine.cases import import_distributed
from tests.forked import run_ranks

SIZES = (2, 4)
VOCAB, WIDTH = 48, 7
SUPPRESSED = (0, 13, 47)  # the first id, one inside, the last (as a mask at the end is)


def targets(size: int) -> torch.Tensor:
    """First and last id of every shard that may be predicted, and some inside."""
    part = VOCAB // size
    borders = [i for r in range(size) for i in (r * part, (r + 1) * part - 1)] + [1, 46, 5, 29, 5]
    return torch.tensor([i for i in borders if i not in SUPPRESSED])


def inputs(size: int):
    """hidden [N,D], weight [V,D], target [N], weight_N, bias [V]; the last two rows of the weights count nothing."""
    generator = torch.Generator().manual_seed(size)
    target_N = targets(size)
    hidden_ND = 2 * torch.randn(len(target_N), WIDTH, generator=generator)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator)
    weight_N = torch.rand(len(target_N), generator=generator)
    weight_N[-2:] = 0.0
    bias_V = torch.zeros(VOCAB)
    bias_V[list(SUPPRESSED)] = -torch.inf
    return hidden_ND, weight_VD, target_N, weight_N, bias_V


def whole_loss(hidden_ND, weight_VD, target_N, weight_N, bias_V):
    ce_N = F.cross_entropy(hidden_ND @ weight_VD.t() + bias_V, target_N, reduction="none")
    return (ce_N * weight_N).sum(), ce_N


def _ours(size: int, rows: slice, group, rank: int) -> dict:
    hidden_ND, weight_VD, target_N, weight_N, bias_V = inputs(size)
    start = rank * VOCAB // size
    own = slice(start, start + VOCAB // size)
    hidden_ND, weight_VD = hidden_ND[rows].requires_grad_(), weight_VD[own].clone().requires_grad_()
    loss, ce_N, correct_N = ops.linear_cross_entropy(
        hidden_ND, weight_VD, target_N[rows], weight_N[rows], bias_V[own], start, group)
    (3.0 * loss).backward()
    return {"loss": loss.item(), "ce": ce_N.numpy(), "correct": correct_N.numpy(),
            "dhidden": hidden_ND.grad.numpy(), "dweight": weight_VD.grad.numpy(),
            "logits": ops.linear_logits(hidden_ND, weight_VD, bias_V[own], group).detach().numpy()}


def _megatron(size: int, rank: int) -> dict:
    """Its logits come from the local rows; it knows no suppressed ids, so they are set to -1e30."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    hidden_ND, weight_VD, target_N, weight_N, bias_V = inputs(size)
    own = slice(rank * VOCAB // size, (rank + 1) * VOCAB // size)
    hidden_ND, weight_VD = hidden_ND.requires_grad_(), weight_VD[own].clone().requires_grad_()
    logits_NV = copy_to_tensor_model_parallel_region(hidden_ND) @ weight_VD.t() + bias_V[own].clamp(min=-1e30)
    ce_N = vocab_parallel_cross_entropy(logits_NV[:, None], target_N[:, None])[:, 0]
    (3.0 * (ce_N * weight_N).sum()).backward()
    return {"ce": ce_N.detach().numpy(), "dhidden": hidden_ND.grad.numpy(), "dweight": weight_VD.grad.numpy()}


def _run(size: int) -> dict:
    from megatron.core import parallel_state

    from dlm_scale.engine.runtime import start_runtime

    mesh = start_runtime("cpu", size).mesh
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    everything, none = slice(None), slice(0, 0)
    ours = {name: _ours(size, rows, mesh.tensor_group, mesh.tensor_rank)
            for name, rows in (("some", everything), ("none", none))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlm_scale.kernels.linear_cross_entropy._chunk_rows", lambda *_: 3)
        chunked = _ours(size, everything, mesh.tensor_group, mesh.tensor_rank)
    return ours | {"chunked": chunked, "megatron": _megatron(size, mesh.tensor_rank)}


@pytest.fixture(scope="module")
def ran():
    import_distributed()
    return {size: run_ranks(size, _run, size) for size in SIZES}


def shards(ranks: list, kind: str, key: str) -> np.ndarray:
    return np.concatenate([rank[kind][key] for rank in ranks])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["some", "chunked"])
def test_it_equals_torch_on_the_whole_vocabulary(kind, size, ran):
    hidden_ND, weight_VD, target_N, weight_N, bias_V = inputs(size)
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    loss, ce_N = whole_loss(hidden_ND, weight_VD, target_N, weight_N, bias_V)
    (3.0 * loss).backward()
    for rank in ran[size]:
        assert rank[kind]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        np.testing.assert_allclose(rank[kind]["ce"], ce_N.detach().numpy(), atol=3e-6)
        np.testing.assert_allclose(rank[kind]["dhidden"], hidden_ND.grad.numpy(), atol=1e-5)
        logits_NV = (hidden_ND @ weight_VD.t() + bias_V).detach()
        np.testing.assert_array_equal(rank[kind]["correct"], (logits_NV.argmax(1) == target_N).numpy())
        np.testing.assert_allclose(rank[kind]["logits"], logits_NV.numpy(), atol=1e-5)
    np.testing.assert_allclose(shards(ran[size], kind, "dweight"), weight_VD.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_it_equals_megatron_core(size, ran):
    for rank in ran[size]:
        for key, tolerance in (("ce", 3e-6), ("dhidden", 1e-5), ("dweight", 1e-5)):
            np.testing.assert_allclose(rank["some"][key], rank["megatron"][key], atol=tolerance, err_msg=key)


@pytest.mark.parametrize("size", SIZES)
def test_suppressed_ids_get_no_gradient_and_no_probability(size, ran):
    gradient_VD = shards(ran[size], "some", "dweight")
    assert not gradient_VD[list(SUPPRESSED)].any()
    assert abs(np.delete(gradient_VD, SUPPRESSED, axis=0)).max(axis=1).min() > 0
    assert np.isneginf(ran[size][0]["some"]["logits"][:, list(SUPPRESSED)]).all()


@pytest.mark.parametrize("size", SIZES)
def test_no_rows_give_zero_and_zero_gradients(size, ran):
    for rank in ran[size]:
        none = rank["none"]
        assert none["loss"] == 0.0 and none["ce"].shape == (0,) and none["dhidden"].shape == (0, WIDTH)
        assert none["dweight"].shape == (VOCAB // size, WIDTH) and not none["dweight"].any()


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_weight_zero_give_no_gradient(size, ran):
    assert not ran[size][0]["some"]["dhidden"][-2:].any()
    assert ran[size][0]["some"]["dhidden"][:-2].any(axis=1).all()

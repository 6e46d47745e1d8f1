"""Linear cross-entropy in torch, the kernels' specification and the CPU's implementation, against autograd."""

from __future__ import annotations

import pytest
import torch

from dlm_scale import ops
from dlm_scale.kernels import linear_cross_entropy as module
from dlm_scale.kernels.linear_cross_entropy import (
    LossTerms,
    linear_cross_entropy_ref,
    linear_scores_ref,
)
from tests.kernels.oracles import (
    assert_within_twice_plain,
    found_by,
    plain_cross_entropy,
    problem,
    relative_error,
)
from tests.kernels.sharded import TERMS, assert_sharded_equals_whole

ALL_TERMS = [LossTerms(), LossTerms(softcap=5.0), LossTerms(z_loss=1e-2), LossTerms(label_smoothing=0.2), TERMS]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Shapes this small are one chunk of one block; they must give the same in several."""
    if request.param == "many chunks":
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # 16 rows, the least
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 4 * 129)


@pytest.mark.parametrize("terms", ALL_TERMS, ids=str)
@pytest.mark.parametrize("num_rows, vocab", [(1, 7), (50, 129), (50, 1003)])
def test_float32_is_within_1e_6_of_the_float64_oracle(num_rows, vocab, terms, chunks):
    made = problem(num_rows, vocab, width=16)
    made.hidden_ND.mul_(0.25)
    oracle = plain_cross_entropy(*made.inputs(torch.float64), terms)
    found = found_by(linear_cross_entropy_ref, made.inputs(torch.float32), terms)
    for name, wanted in oracle.items():
        if name == "is_correct_N":
            assert torch.equal(found[name], wanted)
        else:
            assert relative_error(found[name], wanted) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", [LossTerms(), TERMS], ids=["plain", "all terms"])
@pytest.mark.parametrize("num_rows, vocab", [(1, 7), (50, 129), (50, 1003)])
def test_at_most_twice_the_error_of_plain_torch(dtype, terms, num_rows, vocab, chunks):
    made = problem(num_rows, vocab)
    oracle = plain_cross_entropy(*made.inputs(torch.float64), terms)
    plain = plain_cross_entropy(*made.inputs(dtype), terms)
    assert_within_twice_plain(found_by(linear_cross_entropy_ref, made.inputs(dtype), terms), plain, oracle)


@pytest.mark.parametrize("terms", [LossTerms(), TERMS], ids=["plain", "all terms"])
def test_gradcheck(terms, chunks):
    made = problem(20, 7, width=3)
    inputs = made.inputs(torch.float64)
    inputs[3] = inputs[3].clamp(max=10.0)

    def loss(hidden_ND, weight_VD):
        return linear_cross_entropy_ref(hidden_ND, weight_VD, *inputs[2:], terms=terms).loss_sum

    assert torch.autograd.gradcheck(loss, inputs[:2])


@pytest.mark.parametrize("num_rows, weights", [(0, "mixed"), (50, "zero")])
def test_zeros_that_backpropagate(num_rows, weights):
    inputs = problem(num_rows, 129, weights=weights).inputs(torch.float32)
    found = found_by(linear_cross_entropy_ref, inputs, TERMS)
    assert found["loss_sum"] == 0 and found["ce_N"].shape == (num_rows,) and found["is_correct_N"].dtype == torch.bool
    assert not found["dhidden"].any() and not found["dweight"].any()


def test_a_forbidden_id_has_no_probability_and_no_gradient():
    inputs = problem(50, 129, num_forbidden=40).inputs(torch.float32)
    found = found_by(linear_cross_entropy_ref, inputs, TERMS)
    assert not found["dweight"][89:].any() and found["dweight"][:89].abs().amin(0).gt(0).all()


def test_two_backward_passes_add_up_and_one_gradient_does_not_touch_the_other():
    inputs = problem(9, 129).inputs(torch.float32)
    loss = linear_cross_entropy_ref(*inputs).loss_sum
    first = torch.autograd.grad(3 * loss, inputs[:2], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs[:2])
    for a, b, c in zip(first, second, kept):
        torch.testing.assert_close(a, 3 * b, rtol=1e-6, atol=0)
        assert torch.equal(a, c)


def test_a_frozen_table_and_no_gradients_at_all():
    made = problem(9, 129)
    wanted = found_by(linear_cross_entropy_ref, made.inputs(torch.float32))
    hidden, weight, *rest = made.inputs(torch.float32)
    out = linear_cross_entropy_ref(hidden, weight.detach(), *rest)
    assert torch.equal(torch.autograd.grad(out.loss_sum, hidden)[0], wanted["dhidden"])
    with torch.no_grad():
        quiet = linear_cross_entropy_ref(hidden, weight, *rest)
    assert torch.equal(quiet.loss_sum, wanted["loss_sum"]) and not quiet.loss_sum.requires_grad


def test_no_tensor_of_rows_times_vocabulary_exists(monkeypatch):
    """The largest allocation is a chunk or the table's gradient."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 64 * 1003 * 4)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))
            return out

    inputs = problem(640, 1003).inputs(torch.float32)
    with Watch():
        linear_cross_entropy_ref(*inputs).loss_sum.backward()
    assert max(seen) <= 64 * 1003


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows, vocab", [(0, 7), (1, 7), (50, 129)])
def test_scores_are_those_of_the_logits(dtype, num_rows, vocab, chunks):
    made = problem(num_rows, vocab)
    hidden, weight, target, _, bias = made.inputs(dtype)
    scores = linear_scores_ref(hidden, weight, target, bias, softcap=5.0)
    with torch.no_grad():
        logits = 5.0 * torch.tanh((hidden @ weight.t()).to(bias.dtype) / 5.0) + bias
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(scores.lse_N, torch.logsumexp(logits, 1), **tolerance)
    torch.testing.assert_close(scores.picked_N, logits.gather(1, target[:, None])[:, 0], **tolerance)
    torch.testing.assert_close(scores.best_N, logits.amax(1), **tolerance)
    assert torch.equal(scores.best_id_N, logits.argmax(1)) and not scores.lse_N.requires_grad


def test_ties_go_to_the_smallest_id_and_count_as_correct():
    hidden, weight, target = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([4, 0])
    assert linear_scores_ref(hidden, weight, target).best_id_N.tolist() == [0, 0]
    assert linear_cross_entropy_ref(hidden, weight, target, torch.ones(2)).is_correct_N.tolist() == [True, True]


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_equals_one_rank(size):
    assert_sharded_equals_whole(linear_cross_entropy_ref, linear_scores_ref, size)


def test_ops_hands_everything_through():
    made = problem(9, 129)
    wanted = linear_cross_entropy_ref(*made.inputs(torch.float32), terms=TERMS)
    found = ops.linear_cross_entropy_outputs(*made.inputs(torch.float32), terms=TERMS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    plain = linear_cross_entropy_ref(*made.inputs(torch.float32))
    assert all(map(torch.equal, ops.linear_cross_entropy(*made.inputs(torch.float32)), plain[:3]))
    hidden, weight, target, _, bias = made.inputs(torch.float32)
    assert torch.equal(ops.linear_scores(hidden, weight, target, bias).best_id_N,
                       (hidden @ weight.t() + bias).argmax(1))  # fmt: skip

"""The entropy of the wrong ids against brute force in float64 and against the closed form, whole and sharded."""

import math

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale import ops
from dlm_scale.kernels import linear_cross_entropy
from dlm_scale.parallel.dist_env import dist_env, start_process_group
from tests.forked import run_ranks

N, D, V = 40, 8, 24
FORBIDDEN = (3, V - 1)


def inputs(scale: float = 1.0):
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight_VD = scale * torch.randn(V, D, generator=generator, dtype=torch.float64)
    allowed = torch.tensor([i for i in range(V) if i not in FORBIDDEN])
    target_N = allowed[torch.randint(len(allowed), (N,), generator=generator)]
    bias_V = torch.zeros(V, dtype=torch.float64)
    bias_V[list(FORBIDDEN)] = -torch.inf
    return hidden_ND, weight_VD, target_N, bias_V


def brute_force(hidden_ND, weight_VD, target_N, bias_V, softcap=None) -> list[float]:
    """Straight from the definition, id by id."""
    found = []
    for hidden, target in zip(hidden_ND.tolist(), target_N.tolist()):
        z = [sum(a * b for a, b in zip(hidden, row)) for row in weight_VD.tolist()]
        z = [softcap * math.tanh(value / softcap) for value in z] if softcap else z
        wrong = [value for i, value in enumerate(z) if i != target and bias_V[i] == 0]
        top = max(wrong)
        total = sum(math.exp(value - top) for value in wrong)
        q = [math.exp(value - top) / total for value in wrong]
        count = sum(value > 1e-8 for value in q)
        entropy = -sum(value * math.log(value) for value in q if value > 0)
        found.append(min(1.0, entropy / math.log(count)) if count > 1 else 0.0)
    return found


def test_it_is_the_definition(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 16 * V * 8)  # three chunks
    for scale, softcap in ((0.3, None), (1.0, 2.0), (8.0, None)):  # 8: many a q lies below 1e-8
        made = inputs(scale)
        np.testing.assert_allclose(ops.wrong_entropy(*made, softcap=softcap), brute_force(*made, softcap), atol=1e-12)


def test_it_is_the_closed_form_and_stays_right_where_that_cancels():
    """H = -(E - p_t ln p_t) / (1 - p_t) + ln(1 - p_t), E = sum p ln p over all ids."""
    hidden_ND, weight_VD, target_N, bias_V = inputs(0.3)
    log_p = torch.log_softmax(hidden_ND @ weight_VD.t() + bias_V, 1)
    p, p_t = log_p.exp(), log_p.exp().gather(1, target_N[:, None])[:, 0]
    whole = torch.where(p > 0, p * log_p, 0.0).sum(1)
    closed = (-(whole - p_t * p_t.log()) / (1 - p_t) + (1 - p_t).log()) / math.log(V - len(FORBIDDEN) - 1)
    torch.testing.assert_close(ops.wrong_entropy(hidden_ND, weight_VD, target_N, bias_V), closed, rtol=1e-10, atol=0)
    sure_VD = torch.cat([weight_VD, 1e4 * torch.ones(1, D, dtype=torch.float64)])  # p_t = 1 to the last bit
    sure = (hidden_ND.abs(), sure_VD, torch.full((N,), V), torch.cat([bias_V, torch.zeros(1)]))
    np.testing.assert_allclose(ops.wrong_entropy(*sure), brute_force(*sure), atol=1e-12)


def test_one_wrong_id_has_no_entropy_and_no_row_is_no_error():
    hidden_ND, weight_VD, _, _ = inputs()
    two = slice(0, 2)
    assert ops.wrong_entropy(hidden_ND, weight_VD[two], torch.zeros(N, dtype=torch.int64)).tolist() == [0.0] * N
    assert ops.wrong_entropy(hidden_ND[:0], weight_VD, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def _sharded() -> np.ndarray:
    start_process_group(dist_env(), "gloo")
    hidden_ND, weight_VD, target_N, bias_V = (x.float() if x.is_floating_point() else x for x in inputs())
    start = dist.get_rank() * V // 2
    own = slice(start, start + V // 2)
    return ops.wrong_entropy(hidden_ND, weight_VD[own], target_N, bias_V[own], start, dist.group.WORLD).numpy()


def test_two_shards_of_the_vocabulary_give_the_same():
    first, second = run_ranks(2, _sharded)
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, brute_force(*inputs()), atol=2e-6)

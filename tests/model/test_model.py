"""The transformer against what must hold of it: first loss, no leaks, masks, time conditioning, gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from dlm_scale import ops
from dlm_scale.config import ModelConfig
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.engine.evaluation import cross_entropy_fn
from dlm_scale.inference import Inference
from dlm_scale.model.initialise import initial_values
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.sharding import contiguous_runs, full_box
from dlm_scale.model.transformer import Transformer

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "seq_len": 12}
LAST = Vocabulary(12, 11)
INSIDE = Vocabulary(12, 4, (7,))


def made(vocabulary=LAST, seed: int = 3, **changes) -> Transformer:
    config = ModelConfig(**{**SHAPE, **changes})
    model, table = Transformer(config, vocabulary), parameter_table(config, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = table[name]
            values = initial_values(spec, seed, full_box(spec.view), 0, spec.numel)
            parameter.zero_()
            parameter[: spec.shape[0]] = torch.from_numpy(values).view(spec.shape)
    return model


def randomised(model: Transformer) -> Transformer:
    """Every parameter nonzero, as after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model, x_BL, **options):
    rows = torch.arange(x_BL.numel())
    return model(x_BL, rows_N=rows, readout=lambda head: head.logits(), **options).view(*x_BL.shape, -1)


def cross_entropy(model, x_BL, target_N, weight_N=None, **options):
    weight_N = torch.ones(x_BL.numel()) if weight_N is None else weight_N
    rows = torch.arange(x_BL.numel())
    return model(x_BL, rows_N=rows, readout=lambda head: head.cross_entropy(target_N, weight_N), **options)


def ids(vocabulary, rows=2, length=12, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocabulary.size, (rows, length)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary, real", [(LAST, 11), (INSIDE, 10)])
def test_first_loss_is_exactly_ln_v_and_the_model_learns(tied, vocabulary, real):
    model = made(vocabulary, tied=tied)
    x_BL, target_N = ids(vocabulary), torch.arange(24) % 4
    _, ce_N, _ = cross_entropy(model, x_BL, target_N)
    torch.testing.assert_close(ce_N, torch.full((24,), math.log(real)), rtol=0, atol=1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = cross_entropy(model, x_BL, target_N)[0] / 24
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(real)


def test_the_mask_and_suppressed_ids_are_never_predicted():
    scores = logits(randomised(made(INSIDE)), ids(INSIDE))
    assert scores.shape[-1] == INSIDE.num_outputs
    assert torch.isneginf(scores[..., [4, 7]]).all() and torch.isfinite(scores[..., [0, 5, 11]]).all()
    assert logits(made(LAST), ids(LAST)).shape[-1] == 11


@pytest.mark.parametrize("weights", [None, "random"])
def test_cross_entropy_and_gradients_equal_plain_torch(weights):
    """Invariant I13: d loss / d logits = weight (softmax - onehot); visible rows get nothing."""
    model = randomised(made(INSIDE))
    x_BL, target_N = ids(INSIDE), torch.arange(24) % 4
    rows, generator = torch.tensor([1, 5, 20]), torch.Generator().manual_seed(1)
    weight_N = torch.ones(3) if weights is None else 1e3 * torch.rand(3, generator=generator)
    loss, ce_N, _ = model(x_BL, rows_N=rows, readout=lambda h: h.cross_entropy(target_N[rows], weight_N))
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    wanted = F.cross_entropy(logits(model, x_BL).flatten(0, 1)[rows], target_N[rows], reduction="none")
    torch.testing.assert_close(ce_N, wanted, rtol=1e-5, atol=1e-6)
    (wanted * weight_N).sum().backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_no_masked_row_gives_a_zero_that_backpropagates():
    model = randomised(made())
    empty = torch.zeros(0, dtype=torch.long)
    loss, _, _ = model(ids(LAST), rows_N=empty, readout=lambda h: h.cross_entropy(empty, torch.zeros(0)))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_attention_is_bidirectional():
    model = randomised(made())
    x_BL = ids(LAST)
    changed = x_BL.clone()
    changed[0, -1] = (x_BL[0, -1] + 1) % 11
    assert (logits(model, x_BL)[0, 0] - logits(model, changed)[0, 0]).abs().max() > 1e-5
    assert torch.equal(logits(model, x_BL)[1], logits(model, changed)[1])


@pytest.mark.parametrize("mask, sees", [(ops.Causal(), lambda q, k: k <= q),
                                        (ops.Blocks(4), lambda q, k: k // 4 <= q // 4)])
def test_a_mask_hides_exactly_what_it_says(mask, sees):
    model, x_BL = randomised(made()), ids(LAST, rows=1)
    base = logits(model, x_BL, attention=mask)[0]
    for key in range(12):
        changed = x_BL.clone()
        changed[0, key] = (x_BL[0, key] + 1) % 11
        moved = (logits(model, changed, attention=mask)[0] - base).abs().amax(dim=-1) > 0
        assert moved.tolist() == [bool(sees(query, key)) for query in range(12)]


def test_segments_equal_each_document_alone():
    """Packed documents: no leak, and positions restart in each."""
    model, x_BL = randomised(made()), ids(LAST)
    mask = ops.Segments(torch.tensor([0, 5, 12, 15, 24], dtype=torch.int32))
    packed = logits(model, x_BL, attention=mask).flatten(0, 1)
    for start, stop in ((0, 5), (5, 12), (12, 15), (15, 24)):
        alone = logits(model, x_BL.view(1, -1)[:, start:stop])[0]
        torch.testing.assert_close(packed[start:stop], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_cap_of_the_logits_is_in_every_reading_of_the_head(softcap):
    """Training, log-probabilities (sampling) and evaluation speak of one distribution."""
    model, plain = (randomised(made(tied=False, logit_softcap=cap)) for cap in (softcap, None))
    x_BL, target_N = ids(LAST), torch.arange(24) % 4
    wanted = logits(plain, x_BL)
    wanted = wanted if softcap is None else softcap * torch.tanh(wanted / softcap)
    wanted[..., LAST.mask_id :] = -torch.inf
    capped, rows = logits(model, x_BL), torch.arange(24)
    torch.testing.assert_close(capped, wanted)
    log_probs = model(x_BL, rows_N=rows, readout=lambda head: head.log_probs())
    torch.testing.assert_close(log_probs, F.log_softmax(wanted.flatten(0, 1), -1))
    loss, ce_N, _ = cross_entropy(model, x_BL, target_N)
    torch.testing.assert_close(ce_N, -log_probs.gather(1, target_N[:, None])[:, 0])
    with_z = model(x_BL, rows_N=rows, readout=lambda head: head.cross_entropy(target_N, torch.ones(24), 0.1))
    torch.testing.assert_close(with_z[0], loss + 0.1 * torch.logsumexp(wanted.flatten(0, 1), -1).square().sum())
    assert torch.equal(with_z[1], ce_N)
    ask = SimpleNamespace(xt_BL=x_BL, m_B=None, rows_N=rows, target_N=target_N, weight_N=torch.ones(24), attention=None,
                          to=lambda device: ask)
    assert torch.equal(cross_entropy_fn(model, torch.device("cpu"))(ask), ce_N)
    config, meta = SimpleNamespace(objective=SimpleNamespace(kind="masked")), SimpleNamespace(vocabulary=LAST)
    made_for = Inference(model, config, meta, None, torch.device("cpu"), None, "param")
    assert torch.equal(made_for.predict(x_BL, rows), log_probs)


def test_a_packed_document_is_conditioned_on_its_own_mask_ratio():
    model, x_BL = randomised(made(time_conditioning="adaln")), ids(LAST)
    mask, m_S = ops.Segments(torch.tensor([0, 5, 12, 15, 24], dtype=torch.int32)), torch.tensor([0.1, 0.9, 0.4, 0.7])
    packed = logits(model, x_BL, attention=mask, m_B=m_S).flatten(0, 1)
    for segment, (start, stop) in enumerate(((0, 5), (5, 12), (12, 15), (15, 24))):
        alone = logits(model, x_BL.view(1, -1)[:, start:stop], m_B=m_S[segment : segment + 1])[0]
        torch.testing.assert_close(packed[start:stop], alone, rtol=1e-5, atol=1e-5)


def test_means_are_of_rows_or_of_segments():
    x_BL = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert ops.segment_means(x_BL, None).tolist() == ops.segment_means(x_BL, ops.Causal()).tolist() == [0.5, 0.75]
    mask = ops.Segments(torch.tensor([0, 1, 4, 6, 8], dtype=torch.int32))
    torch.testing.assert_close(ops.segment_means(x_BL, mask), torch.tensor([1.0, 1 / 3, 1.0, 0.5]))


def test_time_conditioning_starts_as_the_identity_then_matters():
    x_BL, m_B = ids(LAST), torch.tensor([0.2, 0.9])
    plain, conditioned = made(tied=False), made(tied=False, time_conditioning="adaln")
    with torch.no_grad():
        for model in (plain, conditioned):
            model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(logits(plain, x_BL), logits(conditioned, x_BL, m_B=m_B))
    randomised(conditioned)
    assert (logits(conditioned, x_BL, m_B=m_B) - logits(conditioned, x_BL, m_B=1 - m_B)).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{"num_kv_heads": 2}, {"mlp": "gelu"}, {"qk_norm": False}, {"head_dim": 16}])
def test_variants_run_and_match_their_parameter_table(changes):
    config = ModelConfig(**{**SHAPE, **changes})
    model, table = randomised(made(**changes)), parameter_table(config, LAST)
    assert [name for name, _ in model.named_parameters()] == list(table)
    assert torch.isfinite(logits(model, ids(LAST))).all()


def test_grouped_queries_equal_repeated_keys():
    """GQA with each key/value head written out twice is ordinary attention."""
    grouped, whole = randomised(made(num_kv_heads=2)), made()
    with torch.no_grad():
        for (name, target), source in zip(whole.named_parameters(), grouped.parameters()):
            if name.endswith("qkv.weight"):
                group = source.view(2, 4, 8, 32)
                parts = [(group[h // 2, h % 2], group[h // 2, 2], group[h // 2, 3]) for h in range(4)]
                source = torch.stack([torch.stack(part) for part in parts])
            target.copy_(source.reshape(target.shape))
    torch.testing.assert_close(logits(grouped, ids(LAST)), logits(whole, ids(LAST)), rtol=1e-5, atol=1e-5)


def test_recomputation_changes_no_gradient():
    x_BL, target_N = ids(LAST), torch.arange(24) % 4
    gradients = []
    for every in (0, 1, 2):
        model = randomised(made())
        model.checkpoint_every = every
        cross_entropy(model, x_BL, target_N)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other))


def test_vocabulary_padding_changes_nothing():
    """Invariant I11: rows beyond the vocabulary have no weight in any probability."""
    model = randomised(made())
    before = cross_entropy(model, ids(LAST), torch.arange(24) % 4)[1]
    with torch.no_grad():
        model.embedding.weight[12:] = 1e3
    assert model.embedding.weight.shape[0] > 12
    assert torch.equal(before, cross_entropy(model, ids(LAST), torch.arange(24) % 4)[1])


@pytest.mark.parametrize("view, box", [((6, 4), ((2, 5), (0, 4))), ((6, 4), ((1, 6), (1, 3))), ((5,), ((1, 4),)),
                                       ((2, 6, 3), ((0, 2), (2, 5), (0, 3)))])
def test_initial_values_are_a_function_of_the_logical_index(view, box):
    config = ModelConfig(**SHAPE)
    spec = next(s for s in parameter_table(config, LAST).values() if s.init_std)
    spec = type(spec)("some.weight", (math.prod(view),), view, 0, init_std=0.5)
    whole = initial_values(spec, 9, full_box(view), 0, spec.numel).reshape(view)
    part = whole[tuple(slice(*bounds) for bounds in box)].reshape(-1)
    assert sum(length for _, length in contiguous_runs(view, box)) == part.size
    for start in range(0, part.size, 3):
        found = initial_values(spec, 9, box, start, min(3, part.size - start))
        assert np.array_equal(found, part[start : start + 3])
    assert not np.array_equal(whole, initial_values(spec, 10, full_box(view), 0, spec.numel).reshape(view))


def test_compiled_blocks_are_compiled_twice_whatever_the_number_of_segments():
    compiled, plain, counter = *(randomised(made(time_conditioning="adaln")) for _ in range(2)), CompileCounter()
    for block in compiled.blocks:
        block.compile(dynamic=None, backend=counter)
    for cut in (1, 3, 5, 7, 9):
        mask = ops.Segments(torch.tensor([*range(cut), 12, 24], dtype=torch.int32))
        m_S = torch.rand(cut + 1, generator=torch.Generator().manual_seed(cut))
        found, wanted = (logits(model, ids(LAST), attention=mask, m_B=m_S) for model in (compiled, plain))
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 2

"""The masking kernel in Triton's interpreter (run by test_interpreter.py)."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dlm_scale import ops
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.step import make_batch
from dlm_scale.kernels import masking_triton
from dlm_scale.kernels.masking import Noise, mask_tokens_ref
from dlm_scale.kernels.masking_triton import mask_tokens
from tests.engine.cases import MODELS, case_config, data_of
from tests.kernels.oracles import MASK_ID, assert_same_masks, assert_split_gives_the_same, masking_case


def run(case, **options):
    x0_BL, index_B, noise, maskable_BL = case.rows(0, len(case.x0_BL))
    return mask_tokens(x0_BL, index_B, noise, mask_id=MASK_ID, maskable_BL=maskable_BL, **options)


@pytest.mark.parametrize("weighting, schedule", [("count", "linear"), ("elbo", "cosine"), ("simple", "loglinear")])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 129), (5, 2500)], ids=str)
def test_equals_the_numpy_path_in_every_field(weighting, schedule, ragged, shape):
    case = masking_case(*shape, weighting, schedule, ragged=ragged, seed=2**64 - 3)
    assert_same_masks(run(case), case.numpy)


def test_a_million_positions(monkeypatch):
    """More programs than a waiting block holds, and a block size that the interpreter is quick with."""
    monkeypatch.setattr(masking_triton, "BLOCK", 8192)
    case = masking_case(140, 7500)
    assert case.x0_BL.numel() > 1e6
    assert_same_masks(run(case), case.numpy)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_split_over_ranks(num_ranks):
    assert_split_gives_the_same(mask_tokens, masking_case(8, 700, ragged=True), num_ranks)


def test_segments_with_their_own_mask_ratio():
    """Documents of length 1 up, none crossing a row, with prompts and padding inside them."""
    rng, length = np.random.default_rng(4), 1300
    cuts = [np.sort(rng.choice(np.arange(1, length), 6, replace=False)) + row * length for row in range(3)]
    edges = np.arange(4) * length
    bounds = torch.from_numpy(np.unique(np.concatenate([*cuts, edges, [1]])).astype(np.int32))
    ratio_S = torch.from_numpy(rng.random(len(bounds) - 1))
    ratio_S[:3] = torch.tensor([1.0, 0.0, 1.0])
    x0_BL = torch.from_numpy(rng.integers(0, MASK_ID, (3, length)))
    maskable_BL = torch.from_numpy(rng.random((3, length)) < 0.8)
    index_B = torch.tensor([0, 2**32 - 1, 2**50])
    for rate_S in (None, torch.from_numpy(rng.random(len(ratio_S))).float()):
        arguments = (x0_BL, index_B, Noise(ratio_S, rate_S, seed=9))
        options = {"mask_id": MASK_ID, "cu_seqlens": bounds, "maskable_BL": maskable_BL}
        found, wanted = mask_tokens(*arguments, **options), mask_tokens_ref(*arguments, **options)
        assert all(map(torch.equal, found, wanted))


def test_a_known_count_needs_no_question_to_the_device_and_a_bound_is_padded_with_nothing():
    case = masking_case(4, 300)
    exact = case.numpy.rows_N.numel()
    assert_same_masks(run(case, num_rows=exact), case.numpy)
    padded = run(case, num_rows=exact + 7)
    assert torch.equal(padded.rows_N[:exact], case.numpy.rows_N)
    assert not padded.rows_N[exact:].any() and not padded.weight_N[exact:].any() and len(padded.weight_N) == exact + 7


def test_the_stream_changes_the_masks():
    case = masking_case(4, 300)
    x0_BL, index_B, noise, _ = case.rows(0, 4)
    other = noise._replace(stream=10 + 256 * 3)
    found = mask_tokens(x0_BL, index_B, other, mask_id=MASK_ID)
    assert torch.equal(found.is_masked_BL, mask_tokens_ref(x0_BL, index_B, other, mask_id=MASK_ID).is_masked_BL)
    assert not torch.equal(found.is_masked_BL, case.numpy.is_masked_BL)


def test_the_self_check_passes_and_sees_a_difference(monkeypatch):
    assert masking_triton.self_check("cpu") == 0.0
    monkeypatch.setattr(masking_triton, "signed_key", lambda seed: 5)
    assert masking_triton.self_check("cpu") == 1.0


@pytest.mark.parametrize(
    "model, weighting, schedule",
    [("base", "count", "linear"), ("packed", "count", "linear"), ("packed", "elbo", "cosine")],
)
def test_a_train_batch_by_the_kernel_is_numpys_in_every_bit(model, weighting, schedule, monkeypatch):
    """Whole rows, and documents packed into rows of random length; two micro-batches of a rank."""
    changes = {"train__micro_batch_size": 4, "diffusion__weighting": weighting, "diffusion__schedule": schedule}
    config = case_config(**MODELS[model] | changes)
    data, cpu = data_of(config), torch.device("cpu")
    runtime = SimpleNamespace(device=cpu, mesh=SimpleNamespace(data_size=1, data_rank=0))
    trainer = SimpleNamespace(config=config, vocabulary=data.vocabulary, runtime=runtime, accumulation=2)
    by_numpy = make_batch(trainer, data, TrainState(2, 16))
    draw = Mock(wraps=partial(ops.mask_on_device, device=cpu))
    monkeypatch.setattr(ops, "masks_on", lambda device: draw)
    by_kernel = make_batch(trainer, data, TrainState(2, 16))
    assert draw.call_count == len(by_kernel) == 2
    for found, wanted in zip(by_kernel, by_numpy, strict=True):
        for field in dataclasses.fields(wanted):
            a, b = getattr(found, field.name), getattr(wanted, field.name)
            if field.name == "attention":
                a, b = (getattr(value, "cu_seqlens", None) for value in (a, b))
            assert torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(b) else a == b, field.name

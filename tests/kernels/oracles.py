"""What the kernels are compared with: plain torch on full logits, and the numpy forward process."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from dlm_scale.diffusion.corruption import Corrupted, corrupt
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.kernels.linear_cross_entropy import LossTerms
from dlm_scale.kernels.masking import Masked, Noise

MASK_ID = 50257
SIDE_OUTPUTS = ("ce_N", "lse_N")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs of one linear cross-entropy, in float64."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor
    bias_V: torch.Tensor | None

    def inputs(self, dtype: torch.dtype) -> list:
        """hidden and weight of this type, requiring gradients, then the rest."""
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (self.hidden_ND, self.weight_VD)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [*leaves, self.target_N, self.weight_N.to(wide), None if self.bias_V is None else self.bias_V.to(wide)]


def problem(num_rows: int, vocab: int, width: int = 24, *, weights: str = "mixed", num_forbidden: int = 1) -> Problem:
    """Targets reach the first and the last allowed id; `weights`: mixed (0, 1e3 and in between), or zero."""
    generator = torch.Generator().manual_seed(num_rows * 10_000 + vocab)
    allowed = vocab - num_forbidden
    target_N = torch.randint(0, allowed, (num_rows,), generator=generator)
    target_N[: num_rows // 2 : 2], target_N[1 : num_rows // 2 : 2] = 0, allowed - 1
    weight_N = torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.5
    weight_N[::5], weight_N[1::5] = 0.0, 1e3
    bias_V = torch.zeros(vocab, dtype=torch.float64)
    bias_V[allowed:] = -torch.inf
    # the inputs are bfloat16 numbers, so that every type starts from the same ones
    hidden_ND = torch.randn(num_rows, width, generator=generator).bfloat16().double()
    weight_VD = torch.randn(vocab, width, generator=generator).mul(0.5).bfloat16().double()
    return Problem(hidden_ND, weight_VD, target_N, weight_N if weights == "mixed" else 0 * weight_N,
                   bias_V if num_forbidden else None)  # fmt: skip


def plain_cross_entropy(hidden_ND, weight_VD, target_N, weight_N, bias_V, terms: LossTerms) -> dict:
    """The formula on full logits by autograd: loss, ce_N, lse_N, is_correct_N and the gradients."""
    logits_NV = F.linear(hidden_ND, weight_VD).to(weight_N.dtype)
    if terms.softcap is not None:
        logits_NV = terms.softcap * torch.tanh(logits_NV / terms.softcap)
    allowed_V = torch.ones(len(weight_VD), dtype=torch.bool) if bias_V is None else ~bias_V.isneginf()
    logits_NV = logits_NV if bias_V is None else logits_NV + bias_V
    lse_N = torch.logsumexp(logits_NV, 1)
    ce_N = lse_N - logits_NV.gather(1, target_N[:, None])[:, 0]
    smooth_N = lse_N - logits_NV[:, allowed_V].mean(1)
    loss_N = (1 - terms.label_smoothing) * ce_N + terms.label_smoothing * smooth_N
    loss = (loss_N * weight_N).sum() + terms.z_loss * lse_N[weight_N != 0].square().sum()
    loss.backward()
    is_correct_N = logits_NV.argmax(1) == target_N
    found = {"loss_sum": loss, "ce_N": ce_N, "lse_N": lse_N, "is_correct_N": is_correct_N}
    return _detached(found | {"dhidden": hidden_ND.grad, "dweight": weight_VD.grad})


def found_by(function, inputs: list, terms: LossTerms = LossTerms(), **options) -> dict:
    """The same of an implementation under test."""
    out = function(*inputs, terms=terms, **options)
    out.loss_sum.backward()
    return _detached(out._asdict() | {"dhidden": inputs[0].grad, "dweight": inputs[1].grad})


def _detached(values: dict) -> dict:
    return {name: value.detach() for name, value in values.items()}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    if wanted.numel() == 0:
        return 0.0
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def assert_within_twice_plain(found: dict, plain: dict, oracle: dict) -> None:
    """The error is at most twice plain torch's in the same precision, both against float64, plus 1e-6."""
    for name in ("loss_sum", "dhidden", "dweight", *SIDE_OUTPUTS):
        error, allowed = relative_error(found[name], oracle[name]), relative_error(plain[name], oracle[name])
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e}, plain torch {allowed:.2e}"


@dataclasses.dataclass(frozen=True)
class MaskingCase:
    """Clean rows, their sample indices, times, and the numpy path's noised batch."""

    x0_BL: torch.Tensor
    index_B: torch.Tensor
    noise: Noise
    maskable_BL: torch.Tensor | None
    numpy: Corrupted

    def rows(self, start: int, stop: int) -> tuple:
        """Arguments of mask_tokens for some of the rows."""
        rate = self.noise.rate_S if self.noise.rate_S is None else self.noise.rate_S[start:stop]
        noise = self.noise._replace(mask_ratio_S=self.noise.mask_ratio_S[start:stop], rate_S=rate)
        maskable = None if self.maskable_BL is None else self.maskable_BL[start:stop]
        return self.x0_BL[start:stop], self.index_B[start:stop], noise, maskable


def masking_case(num_rows: int, length: int, weighting: str = "count", schedule: str = "linear", *, seed: int = 11,
                 ragged: bool = False) -> MaskingCase:  # fmt: skip
    """Times include 1 and one so small that nothing is masked; `ragged`: rows of random length, with a prompt each."""
    rng = np.random.default_rng(num_rows)
    x0_BL, index_B = rng.integers(0, MASK_ID, (num_rows, length)), rng.integers(0, 2**40, num_rows)
    t_B = 1 - rng.random(num_rows)
    t_B[0], t_B[-1] = 1.0, 1e-9
    maskable_BL = None
    if ragged:
        column_L, length_B1 = np.arange(length), rng.integers(0, length + 1, (num_rows, 1))
        maskable_BL = (column_L < length_B1) & (column_L >= length_B1 // 4)
    noised = corrupt(x0_BL, index_B, t_B, seed=seed, schedule=SCHEDULES[schedule], weighting=WEIGHTINGS[weighting],
                     mask_id=MASK_ID, denominator=1.0, maskable_BL=maskable_BL)  # fmt: skip
    mask_ratio_S = SCHEDULES[schedule].mask_ratio(noised.t_B)
    rate_S = None
    if weighting != "count":
        rate_S = WEIGHTINGS[weighting].fn(SCHEDULES[schedule], noised.t_B, None, None).float()
    maskable = None if maskable_BL is None else torch.from_numpy(maskable_BL)
    return MaskingCase(torch.from_numpy(x0_BL), torch.from_numpy(index_B), Noise(mask_ratio_S, rate_S, seed), maskable,
                       noised)  # fmt: skip


def assert_same_masks(found: Masked, wanted: Corrupted) -> None:
    """Bit for bit, in every field that both have."""
    for name in ("xt_BL", "is_masked_BL", "rows_N", "target_N", "weight_N"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(found.num_masked_S, wanted.is_masked_BL.sum(1).int())
    assert torch.equal(found.num_maskable_S, wanted.num_maskable_B.int())


def assert_split_gives_the_same(mask_tokens, case: MaskingCase, num_ranks: int) -> None:
    """The rows dealt to ranks, each noised alone, are those of the whole batch."""
    length, parts = case.x0_BL.shape[1], np.array_split(np.arange(len(case.x0_BL)), num_ranks)
    wanted = case.numpy
    for part in parts:
        x0_BL, index_B, noise, maskable_BL = case.rows(part[0], part[-1] + 1)
        found = mask_tokens(x0_BL, index_B, noise, mask_id=MASK_ID, maskable_BL=maskable_BL)
        here = (wanted.rows_N // length >= part[0]) & (wanted.rows_N // length <= part[-1])
        assert torch.equal(found.xt_BL, wanted.xt_BL[part[0] : part[-1] + 1])
        assert torch.equal(found.rows_N + part[0] * length, wanted.rows_N[here])
        assert torch.equal(found.target_N, wanted.target_N[here]) and torch.equal(found.weight_N, wanted.weight_N[here])

"""The one choice point per op: which implementation runs, and why.

Shapes: B rows, L positions, H heads, G key/value heads, E head width; N selected rows, D width, V local vocabulary.

On a CPU the torch references run. On a GPU a backend that is not torch's own must first agree with the reference on a
small case, once per process; one that fails is passed over, and `chosen_backends` says why. A backend that is asked
for by name (argument `backend`, or the variables DLM_ATTENTION and DLM_KERNELS) runs, or is an error.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dlm_scale.errors import UsageError
from dlm_scale.kernels.linear_cross_entropy import (
    CrossEntropy,
    LossTerms,
    Scores,
    linear_cross_entropy_ref,
    linear_scores_ref,
    wrong_entropy_ref,
)
from dlm_scale.kernels.masking import Masked, Noise, mask_tokens_ref

REQUESTED_ATTENTION = os.environ.get("DLM_ATTENTION", "auto")
REQUESTED_KERNELS = os.environ.get("DLM_KERNELS", "auto")


class BackendError(UsageError, ValueError):
    """A backend that was asked for by name cannot run here: what is missing, and what to do."""


@dataclass(frozen=True)
class Full:
    """Every position sees every position."""


@dataclass(frozen=True)
class Causal:
    """Position i sees positions 0..i (the autoregressive twin, annealing)."""

    def to(self, device, non_blocking: bool = False) -> Causal:
        return self


@dataclass(frozen=True)
class Segments:
    """Documents packed into the rows; a position sees its own document only, and positions restart in each.

    `cu_seqlens` int32 [S+1]: ascending bounds of the segments in the flattened batch, from 0 to B*L; every row
    boundary is one of them.
    """

    cu_seqlens: torch.Tensor

    def ids_BL(self, num_rows: int, length: int) -> torch.Tensor:
        """Number of the segment that each position belongs to, int64."""
        flat = torch.arange(num_rows * length, device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.bucketize(flat, self.cu_seqlens[1:], right=True).view(num_rows, length)

    def to(self, device, non_blocking: bool = False) -> Segments:
        return Segments(self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        return Segments(self.cu_seqlens.pin_memory())


@dataclass(frozen=True)
class Blocks:
    """Block-causal: a position sees its own block of `size` positions and all earlier blocks."""

    size: int


@dataclass(frozen=True)
class Lookahead:
    """Position i sees positions 0..i+size: from causal (0) to full, as annealing goes."""

    size: int


@dataclass(frozen=True)
class Queries:
    """The rows of `mask` at position_BS: S queries a row, keys at all positions (sampling with kept keys)."""

    mask: Causal | Blocks
    position_BS: torch.Tensor


AttentionMask = Full | Causal | Segments | Blocks | Lookahead | Queries


def allowed_BLL(
    mask: AttentionMask, num_rows: int, length: int, device: torch.device, window: int | None = None
) -> torch.Tensor | None:
    """Boolean [B or 1, L or S, L], True where query (dim 1) may see key (dim 2), at most `window` positions away; None
    stands for all. `length` counts keys."""
    if window is not None:
        position = torch.arange(length, device=device)
        is_near_LL = (position[:, None] - position[None, :]).abs() <= window
        allowed = allowed_BLL(mask, num_rows, length, device)
        return is_near_LL[None] if allowed is None else allowed & is_near_LL
    if isinstance(mask, Full):
        return None
    if isinstance(mask, Queries):
        all_BLL = allowed_BLL(mask.mask, num_rows, length, device)
        return all_BLL[0][mask.position_BS]
    if isinstance(mask, Segments):
        ids_BL = mask.ids_BL(num_rows, length)
        return ids_BL[:, :, None] == ids_BL[:, None, :]
    position = torch.arange(length, device=device)
    if isinstance(mask, Lookahead):
        return (position[:, None] + mask.size >= position[None, :])[None]
    block = position if isinstance(mask, Causal) else position // mask.size
    return (block[:, None] >= block[None, :])[None]


def positions_BL(mask: AttentionMask, num_rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Position ids [1 or B, L] int64; they restart at each packed document."""
    position_L = torch.arange(length, device=device)
    if not isinstance(mask, Segments):
        return position_L[None]
    flat_BL = torch.arange(num_rows * length, device=device).view(num_rows, length)
    return flat_BL - mask.cu_seqlens[mask.ids_BL(num_rows, length)].long()


def segment_means(x_BL: torch.Tensor, mask: AttentionMask | None) -> torch.Tensor:
    """Mean of each row [B], or with `Segments` of each segment [S]."""
    if not isinstance(mask, Segments):
        return x_BL.mean(dim=1)
    return torch.segment_reduce(x_BL.flatten(), "mean", lengths=mask.cu_seqlens.diff().long())


def _eager(q_BLHE, k_BLGE, v_BLGE, mask, window=None):
    """The formula, step by step; the weights [B,H,L,L] exist."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BLGE, v_BLGE))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
    allowed = allowed_BLL(mask, q.shape[0], k.shape[2], q.device, window)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _sdpa(q_BLHE, k_BLGE, v_BLGE, mask, window=None):
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BLGE, v_BLGE))
    is_causal = isinstance(mask, Causal) and window is None
    allowed = None if is_causal else allowed_BLL(mask, q.shape[0], k.shape[2], q.device, window)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if allowed is None else allowed[:, None],
        is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def _packed(kernel: Callable, q_BLHE, k_BLGE, v_BLGE, mask: Segments):
    """Run a kernel over documents [T, heads, E] with bounds; L bounds their lengths without asking the device."""
    q, k, v = (x.flatten(0, 1) for x in (q_BLHE, k_BLGE, v_BLGE))
    bounds, longest = mask.cu_seqlens.to(device=q.device, dtype=torch.int32), q_BLHE.shape[1]
    return kernel(q, k, v, bounds, bounds, longest, longest).view(q_BLHE.shape)


def _flash_attn_2(q_BLHE, k_BLGE, v_BLGE, mask):
    flash_attn = importlib.import_module("flash_attn")
    options = {"causal": isinstance(mask, Causal), "deterministic": torch.are_deterministic_algorithms_enabled()}
    if not isinstance(mask, Segments):
        return flash_attn.flash_attn_func(q_BLHE, k_BLGE, v_BLGE, **options)
    return _packed(lambda *packed: flash_attn.flash_attn_varlen_func(*packed, **options), q_BLHE, k_BLGE, v_BLGE, mask)


def _torch_varlen(q_BLHE, k_BLGE, v_BLGE, mask):
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    gqa = q_BLHE.shape[2] != k_BLGE.shape[2]
    return _packed(lambda *packed: varlen_attn(*packed, window_size=(-1, -1), enable_gqa=gqa), q_BLHE, k_BLGE, v_BLGE,
                   mask)  # fmt: skip


def _switched(q_BLHE, k_BLGE, v_BLGE, mask):
    """FlashAttention 3 or 4 under torch's own functions, once activated."""
    return (_torch_varlen if isinstance(mask, Segments) else _sdpa)(q_BLHE, k_BLGE, v_BLGE, mask)


@dataclass(frozen=True)
class AttentionBackend:
    """`module` must be importable; `switch` is torch's name of the implementation to activate, if it is one."""

    run: Callable
    masks: tuple[type, ...]
    module: str = "torch"
    least_capability: tuple[int, int] = (0, 0)
    switch: str | None = None
    advice: str = ""

    @property
    def is_torch_only(self) -> bool:
        return self.run in (_sdpa, _eager)


ATTENTION_BACKENDS = {
    "sdpa": AttentionBackend(_sdpa, (Full, Causal, Segments, Blocks, Lookahead, Queries)),
    "eager": AttentionBackend(_eager, (Full, Causal, Segments, Blocks, Lookahead, Queries)),
    "flash_attn_2": AttentionBackend(
        _flash_attn_2, (Full, Causal, Segments), "flash_attn", (8, 0), advice="pip install flash-attn"
    ),
    "flash_attn_3": AttentionBackend(
        _switched, (Full, Causal, Segments), "flash_attn_interface", (9, 0), "FA3",
        "build flash-attention's folder hopper/ for this torch",
    ),
    "flash_attn_4": AttentionBackend(
        _switched, (Full, Causal, Segments), "flash_attn.cute", (9, 0), "FA4", "pip install --pre flash-attn-4"
    ),
    "torch_varlen": AttentionBackend(
        _torch_varlen, (Segments,), "torch.nn.attention.varlen", (8, 0), advice="install torch 2.10 or newer"
    ),
}  # fmt: skip
# flash_attn_4 has no final release yet: only by name. Unmasked sdpa is FlashAttention 2 already.
AUTO_DENSE = ("flash_attn_3", "sdpa")
AUTO_PACKED = ("flash_attn_3", "flash_attn_2", "torch_varlen", "sdpa")


def attention(
    q_BLHE, k_BLGE, v_BLGE, mask: AttentionMask, backend: str | None = None, window: int | None = None
) -> torch.Tensor:
    """Softmax attention [B,L,H,E]; G divides H (grouped queries). `window`: keys farther away are not seen (torch's own
    backends only).

    `backend`: a name of ATTENTION_BACKENDS, "auto", or None for what DLM_ATTENTION says. Raises BackendError where a
    named backend is unknown, absent, or cannot do this device, type or mask.
    """
    backend = REQUESTED_ATTENTION if backend is None else backend
    if window is not None and backend not in ("auto", "sdpa", "eager"):
        raise BackendError(f"attention backend {backend!r} cannot run here: it has no window; use auto, sdpa or eager")
    if backend == "auto" and (window is not None or not q_BLHE.is_cuda):
        return _sdpa(q_BLHE, k_BLGE, v_BLGE, mask, window)
    name = _attention_name(backend, q_BLHE.device.type, q_BLHE.dtype, q_BLHE.shape[-1], type(mask))
    options = {} if window is None else {"window": window}
    return ATTENTION_BACKENDS[name].run(q_BLHE, k_BLGE, v_BLGE, mask, **options)


@torch.compiler.assume_constant_result
def _attention_name(*call) -> str:
    return choose_attention(*call)[0]


@lru_cache(maxsize=None)
def choose_attention(requested: str, device: str, dtype: torch.dtype, head_dim: int, mask: type) -> tuple[str, str]:
    """(name, why) of the backend for this kind of call. Decided once per process."""
    if requested not in (*ATTENTION_BACKENDS, "auto"):
        raise BackendError(f"attention backend {requested!r} is unknown: use auto or one of {list(ATTENTION_BACKENDS)}")
    if requested != "auto":
        if obstacle := why_not(requested, device, dtype, head_dim, mask):
            raise BackendError(f"attention backend {requested!r} cannot run here: {obstacle}; or use auto")
        return requested, "asked for by name"
    if device != "cuda":
        return "sdpa", f"torch's own; on {device} there is no other"
    passed_over = []
    for name in AUTO_PACKED if mask is Segments else AUTO_DENSE:
        obstacle = why_not(name, device, dtype, head_dim, mask)
        if obstacle is None:
            return name, "; ".join(passed_over) or "first choice"
        passed_over.append(f"not {name}: {obstacle}")
    raise AssertionError("sdpa runs everywhere")


def why_not(name: str, device: str, dtype: torch.dtype, head_dim: int, mask: type) -> str | None:
    """What keeps a backend from running such a call, and what to do; None if nothing does."""
    backend = ATTENTION_BACKENDS[name]
    if mask not in backend.masks:
        return f"it has no mask {mask.__name__}"
    if backend.is_torch_only:
        return None
    if device != "cuda":
        return f"it needs a CUDA device, and the tensors are on {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in bfloat16 and float16 only, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability() < backend.least_capability:
        return f"it needs compute capability {backend.least_capability}, not {torch.cuda.get_device_capability()}"
    try:
        importlib.import_module(backend.module)
        if backend.switch:
            importlib.import_module("torch.nn.attention").activate_flash_attention_impl(backend.switch)
        with torch.inference_mode(False), torch.enable_grad():
            error = _attention_error(backend, device, dtype, head_dim, mask)
    except Exception as failure:  # whatever a foreign package raises: it is not usable, and this says why
        obstacle = f"{type(failure).__name__}: {failure} ({backend.advice})"
    else:
        obstacle = None if error < 2e-2 else f"it differs from the reference by {error:.1e}"
    if obstacle and backend.switch:
        importlib.import_module("torch.nn.attention").restore_flash_attention_impl(_raise_warn=False)
    return obstacle


def _attention_error(backend: AttentionBackend, device: str, dtype: torch.dtype, head_dim: int, mask: type) -> float:
    """Largest relative difference from the float32 reference, output and gradients, on two rows of 96 positions."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(3, 2, 96, 2, head_dim, device=device, generator=generator).to(dtype)
    value = Segments(torch.tensor([0, 17, 96, 192], dtype=torch.int32, device=device)) if mask is Segments else mask()
    results = []
    for run, kind in ((backend.run, dtype), (_sdpa, torch.float32)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        out = run(*leaves, value)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(*results))


def linear_cross_entropy(
    hidden_ND, weight_VD, target_N, weight_N, bias_V=None, vocab_start=0, group=None, terms: LossTerms = LossTerms()
):
    """Weighted cross-entropy of the vocabulary projection, on selected rows only.

    hidden [N,D], weight [V,D] (this rank's rows of the table, from `vocab_start`), target [N] int64 ids, weight_N [N]
    float32, bias [V] float32 added to the logits (-inf suppresses an id). `group` shards the vocabulary. `terms`:
    softcap, z-loss and label smoothing (kernels/linear_cross_entropy.py).

    Returns (sum of weight*ce and of the terms, float32 scalar connected to the graph also at N = 0; ce [N] float32,
    detached, without terms but of the capped logits; is_correct [N] bool).
    """
    return linear_cross_entropy_outputs(hidden_ND, weight_VD, target_N, weight_N, bias_V, vocab_start, group, terms)[:3]


def linear_cross_entropy_outputs(
    hidden_ND, weight_VD, target_N, weight_N, bias_V=None, vocab_start=0, group=None,
    terms: LossTerms = LossTerms(), backend: str | None = None,
) -> CrossEntropy:  # fmt: skip
    """The same with the log-sum-exp among the side outputs, and a choice of the backend."""
    if _kernels(backend, "linear_cross_entropy", hidden_ND) == "reference":
        run = linear_cross_entropy_ref
    else:
        run = _triton("linear_cross_entropy").linear_cross_entropy
    return run(hidden_ND, weight_VD, target_N, weight_N, bias_V, vocab_start, group, terms)


def linear_scores(
    hidden_ND, weight_VD, picked_id_N, bias_V=None, vocab_start=0, group=None, softcap: float | None = None,
    backend: str | None = None,
) -> Scores:  # fmt: skip
    """Log-sum-exp, best logit and its id, and the logit of picked_id [N]; no gradients, and no [N,V] logits."""
    if _kernels(backend, "linear_cross_entropy", hidden_ND) == "reference":
        run = linear_scores_ref
    else:
        run = _triton("linear_cross_entropy").linear_scores
    return run(hidden_ND, weight_VD, picked_id_N, bias_V, vocab_start, group, softcap)


def wrong_entropy(
    hidden_ND, weight_VD, target_N, bias_V=None, vocab_start=0, group=None, softcap: float | None = None
) -> torch.Tensor:
    """Entropy [N] of the ids that are not the target, in [0, 1]; no gradients. The torch reference everywhere: it runs
    only where `objective.entropy_threshold` is set, at a third of the head's matmuls."""
    return wrong_entropy_ref(hidden_ND, weight_VD, target_N, bias_V, vocab_start, group, softcap)


def mask_tokens(x0_BL, sample_index_B, noise: Noise, *, backend: str | None = None, **options) -> Masked:
    """Mask clean ids where they lie; see kernels/masking.py. The bits are those of diffusion.corruption.corrupt."""
    if _kernels(backend, "masking", x0_BL) == "reference":
        return mask_tokens_ref(x0_BL, sample_index_B, noise, **options)
    return _triton("masking").mask_tokens(x0_BL, sample_index_B, noise, **options)


def masks_on(device: torch.device) -> Callable | None:
    """What draws the masks of a training batch for `diffusion.corruption.corrupt`; None: numpy, on the host."""
    if choose_masking(REQUESTED_KERNELS, device.type)[0] == "numpy":
        return None
    return partial(mask_on_device, device=device)


def choose_masking(requested: str, device: str) -> tuple[str, str]:
    """("numpy" or "triton", why). Not the kernel unless it is asked for: numpy works a step ahead in the loader's
    thread, 19 million tokens a second, and the host must know how many positions are masked before the device is
    asked to gather them; the kernel's launch would be followed by a wait for that number."""
    if requested == "triton":
        return choose_kernels("masking", requested, device)
    if requested not in ("auto", "reference"):
        raise BackendError(f"kernels {requested!r} are unknown: use auto, triton or reference")
    return "numpy", "on the host, a step ahead of the device, which then waits for nothing"


def mask_on_device(
    x0_BL, sample_index_B, maskable_BL, bounds_S1, m_S, *, seed: int, mask_id: int, device: torch.device
) -> Masked:
    """The masks of `diffusion.corruption.mask_tokens_here` by the kernel: numpy arrays in, tensors on `device` out.

    Works from any thread; the caller's thread waits for the number of masked positions.
    """
    arrays = (x0_BL, sample_index_B, maskable_BL, bounds_S1, m_S)
    x0_BL, sample_index_B, maskable_BL, bounds_S1, m_S = (torch.from_numpy(values).to(device) for values in arrays)
    options = {"mask_id": mask_id, "cu_seqlens": bounds_S1, "maskable_BL": maskable_BL}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _triton("masking").mask_tokens(x0_BL, sample_index_B, Noise(m_S, None, seed), **options)


def _triton(op: str):
    return importlib.import_module(f"dlm_scale.kernels.{op}_triton")


def _kernels(backend: str | None, op: str, x: torch.Tensor) -> str:
    if x.dtype == torch.float64:  # for checking gradients; the kernels add up in float32
        return "reference"
    return choose_kernels(op, REQUESTED_KERNELS if backend is None else backend, x.device.type)[0]


@lru_cache(maxsize=None)
def choose_kernels(op: str, requested: str, device: str) -> tuple[str, str]:
    """("triton" or "reference", why) of an op. Decided once per process. Raises BackendError as attention does."""
    if requested not in ("auto", "triton", "reference"):
        raise BackendError(f"kernels {requested!r} are unknown: use auto, triton or reference")
    if requested == "reference":
        return requested, "asked for by name"
    obstacle = _kernel_obstacle(op, device)
    if obstacle is None:
        return "triton", "agrees with the reference here"
    if requested == "triton":
        raise BackendError(f"the Triton kernel of {op} cannot run here: {obstacle}; or use auto")
    return "reference", f"not triton: {obstacle}"


def _kernel_obstacle(op: str, device: str) -> str | None:
    if device != "cuda":
        return f"it needs a CUDA device, and the tensors are on {device}"
    try:
        with torch.inference_mode(False), torch.enable_grad():
            error = _triton(op).self_check(device)
    except Exception as failure:  # no triton, no compiler, an old driver: the reference runs, and this says why
        return f"{type(failure).__name__}: {failure} (install the triton that this torch names)"
    return None if error < 1e-3 else f"it differs from the reference by {error:.1e}"


def linear_logits(hidden_ND, weight_VD, bias_V=None, group=None, softcap: float | None = None) -> torch.Tensor:
    """Float32 logits [N, V of the whole table] of selected rows, gathered over `group`."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    if group is None:
        return logits_NV
    parts = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits_NV.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def chosen_backends() -> dict[str, str]:
    """What each op runs here, and why: for `dlm doctor`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    calls = {
        "attention": lambda: choose_attention(REQUESTED_ATTENTION, device, dtype, 64, Full),
        "attention, packed": lambda: choose_attention(REQUESTED_ATTENTION, device, dtype, 64, Segments),
        "linear_cross_entropy": lambda: choose_kernels("linear_cross_entropy", REQUESTED_KERNELS, device),
        "masking": lambda: choose_masking(REQUESTED_KERNELS, device),
    }
    return {op: _told(choose) for op, choose in calls.items()}


def _told(choose: Callable[[], tuple[str, str]]) -> str:
    try:
        return "{} ({})".format(*choose())
    except BackendError as error:
        return f"none: {error}"

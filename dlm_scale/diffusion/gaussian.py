"""Gaussian diffusion of token vectors: schedules, conversions between predictions, reverse steps, the forward process.

x is the vector E[id] of a token, E dimensions; z_i = alpha_i x + sigma_i eps with alpha_i^2 = abar_i, sigma_i^2 =
1 - abar_i at the steps i = 1 ... T of time t = i/T (variance preserving). The reverse law has the form of the posterior
q(z_s | z_i, x) with a prediction in x's place. -log p(row) is at most, in nats (Ho et al., arXiv 2006.11239)

    KL(q(z_T|x) || N(0, 1)) + sum over i = f+1 ... T of (SNR_{i-1} - SNR_i)/2 |x - xhat(z_i)|^2 - log p(row | z_f)

all three in expectation over the noise; `bound_weights` has the factors. f is the first step whose SNR is at most
`max_snr`: nothing is learnt below it, where tokens are plain to see, and the least doubt would cost thousands of nats.

Sources: cosine: Nichol and Dhariwal (arXiv 2102.09672); linear: DDPM; sqrt: Diffusion-LM (2205.14217); v: Salimans and
Ho (2202.00512); eta: DDIM (2010.02502); xhat by softmax: CDCD (2211.15089), Plaid (2305.18619); self-conditioning:
Analog Bits (2208.04202).

Legend: B rows, L positions, E dimensions of a token's vector, N positions that carry loss.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlm_scale.diffusion.corruption import Corrupted, assemble, clean_rows, count_in
from dlm_scale.diffusion.corruption import replace as masked_at
from dlm_scale.diffusion.rng import Stream, box_muller, counter_of, philox, uniform24
from dlm_scale.diffusion.segments import row_bounds

MAX_BETA = 0.999
SCHEDULES = ("cosine", "linear", "sqrt")
SOFTMAX, V, EPS = "x0_softmax", "v", "eps"


@lru_cache(maxsize=16)
def alpha_bars(schedule: str, num_steps: int) -> Tensor:
    """float64 [T+1]: abar_0 ... abar_T, falling; no step loses more than 0.999 of it.

    `linear` has DDPM's betas 1e-4 ... 2e-2 of 1000 steps, scaled to T; abar_0 is 1, but 0.99 for `sqrt`.
    """
    if schedule == "linear":
        beta = (np.linspace(1e-4, 2e-2, num_steps) * (1000 / num_steps)).clip(max=MAX_BETA)
        return torch.from_numpy(np.cumprod(np.concatenate([[1.0], 1 - beta])))
    t = np.arange(num_steps + 1) / num_steps
    if schedule == "cosine":
        curve = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        curve /= curve[0]
    else:
        curve = 1 - np.sqrt(t + 1e-4)
    kept = (curve[1:] / curve[:-1]).clip(min=1 - MAX_BETA)
    return torch.from_numpy(np.cumprod(np.concatenate([curve[:1], kept])))


def x0_from_v(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * z - sigma * v


def eps_from_v(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return sigma * z + alpha * v


def x0_from_eps(z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (z - sigma * eps) / alpha


def eps_from_x0(z: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (z - alpha * x0) / sigma


def reverse_variance(abar: Tensor, abar_s: Tensor, eta: float) -> Tensor:
    """Variance of a step from abar to abar_s: 0 for DDIM, at eta = 1 that of DDPM's posterior."""
    return eta**2 * (1 - abar_s) / (1 - abar) * (1 - abar / abar_s)


def reverse_step(z: Tensor, x0: Tensor, abar: Tensor, abar_s: Tensor, eta: float, noise: Tensor) -> Tensor:
    """z at the earlier step s from z and the prediction of x; abar, abar_s are float64 scalars."""
    variance = reverse_variance(abar, abar_s, eta)
    eps = eps_from_x0(z, x0, abar.sqrt(), (1 - abar).sqrt())
    return abar_s.sqrt() * x0 + (1 - abar_s - variance).clamp(min=0).sqrt() * eps + variance.sqrt() * noise


def guided(x0_given: Tensor, x0_blind: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): (1 + w) given - w blind."""
    return (1 + weight) * x0_given - weight * x0_blind


@dataclass(frozen=True)
class Process:
    """A schedule over `num_steps` steps, and what the network predicts: `x0_softmax`, `v` or `eps`."""

    schedule: str
    num_steps: int
    prediction: str
    dim: int
    self_conditioning: bool = False
    max_snr: float = math.inf

    @property
    def first(self) -> int:
        """The step at which the process begins and a sample ends."""
        return min(1 + int((self.snr[1:] > self.max_snr).sum()), self.num_steps - 1)

    @property
    def num_used(self) -> int:
        """Steps first ... T."""
        return self.num_steps - self.first + 1

    @property
    def abar(self) -> Tensor:
        return alpha_bars(self.schedule, self.num_steps)

    @property
    def snr(self) -> Tensor:
        return self.abar / (1 - self.abar)

    def steps(self, t: np.ndarray) -> np.ndarray:
        """int64: the step of times in (0, 1], uniform on first ... T where time is."""
        return self.first - 1 + np.clip(np.ceil(np.asarray(t) * self.num_used), 1, self.num_used).astype(np.int64)

    def step_of(self, t: Tensor) -> Tensor:
        """int64: the step of times i/T, on any device."""
        return (t * self.num_steps).round().long()

    def bound_weights(self) -> Tensor:
        """float64 [T+1]: of |x - xhat(z_i)|^2 in the bound, (SNR_{i-1} - SNR_i)/2; 0 up to `first`."""
        weight, snr = torch.zeros_like(self.abar), self.snr[self.first :]
        weight[self.first + 1 :] = (snr[:-1] - snr[1:]) / 2
        return weight

    def error_factor(self) -> Tensor:
        """float64 [T+1]: |x - xhat|^2 over the squared error of what is predicted."""
        alone = {SOFTMAX: torch.ones_like(self.snr), V: 1 / (self.snr + 1), EPS: 1 / self.snr}
        return alone[self.prediction]

    def scales(self, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of steps, in the type and on the device of `like`."""
        abar = self.abar.to(like.device)[step]
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def x0(self, z: Tensor, predicted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x from what the network predicts."""
        if self.prediction == SOFTMAX:
            return predicted
        return (x0_from_v if self.prediction == V else x0_from_eps)(z, predicted, alpha, sigma)

    def prior(self, x0_NE: Tensor) -> Tensor:
        """KL(q(z_T | x) || N(0, 1)), nats, [N]."""
        last = float(self.abar[-1])
        return 0.5 * (last * x0_NE.square().sum(-1) - self.dim * (last + math.log1p(-last)))


@dataclass(frozen=True)
class Latent:
    """What the network reads in place of tokens. `vectors_BLE`: z itself; or else it is alpha_B E[id] + sigma_B
    noise_BLE where the position is noised, E[id] elsewhere. guess_BLE: an earlier xhat, of self-conditioning."""

    alpha_B: Tensor | None = None
    sigma_B: Tensor | None = None
    noise_BLE: Tensor | None = None
    is_noised_BL: Tensor | None = None
    guess_BLE: Tensor | None = None
    vectors_BLE: Tensor | None = None


def normals(key: int, c0, c1, c2, c3, dim: int) -> Tensor:
    """float32 normals [..., dim], for counter words that broadcast to [..., ceil(dim / 4)]: four of each."""
    words = np.stack(philox(key, c0, c1, c2, c3))
    return torch.from_numpy(box_muller(words.reshape(4, -1)).reshape(*words.shape[1:-1], -1)[..., :dim].copy())


def row_noise(seed: int, sample_index_B: np.ndarray, length: int, dim: int, stream: int = Stream.GAUSS) -> Tensor:
    """float32 [B, L, E] from Philox(seed; row low, high, column * ceil(E/4) + block, stream)."""
    low_B, high_B = (word[:, None, None] for word in counter_of(np.asarray(sample_index_B)))
    blocks = -(-dim // 4)
    return normals(seed, low_B, high_B, np.arange(length * blocks).reshape(length, blocks), int(stream), dim)


def noised(
    x0_BL, sample_index_B: np.ndarray, step_B: np.ndarray, *, seed: int, process: Process, mask_id: int,
    denominator: float | None, maskable_BL=None, attention: Any = None, stream: int = Stream.GAUSS,
) -> Corrupted:  # fmt: skip
    """The rows at their steps, with the noise of their token vectors: a `Corrupted` that says the step by t = m = i/T.

    xt_BL are the clean ids: their vectors exist only inside the network. Positions that are not maskable (prompts,
    padding) are read without noise and carry no loss; all segments of a row have its step. Word 1 of Philox(seed; sample
    low, high, 0, PART) says which rows read their own guess (one half).
    """
    x0_BL, sample_index_B, maskable_BL = clean_rows(x0_BL, sample_index_B, maskable_BL, mask_id)
    own_B = uniform24(philox(seed, *counter_of(sample_index_B), 0, int(Stream.PART))[1])
    bounds_S1 = row_bounds(*x0_BL.shape) if attention is None else np.asarray(attention.cu_seqlens)
    t_S = (np.asarray(step_B) / process.num_steps)[bounds_S1[:-1] // x0_BL.shape[1]]
    masked, ones_S = masked_at(x0_BL, maskable_BL, bounds_S1, mask_id), torch.ones(t_S.size)
    corrupted = assemble(
        masked._replace(xt_BL=torch.from_numpy(x0_BL)), weight_S=ones_S, elbo_weight_S=ones_S, m_S=t_S,
        t_S=t_S.copy(), num_maskable_S=count_in(maskable_BL, bounds_S1), denominator=denominator, attention=attention,
    )  # fmt: skip
    noise_BLE = row_noise(seed, sample_index_B, x0_BL.shape[1], process.dim, stream)
    return replace(corrupted, noise_BLE=noise_BLE, reads_guess_B=torch.from_numpy(own_B < 2**23))

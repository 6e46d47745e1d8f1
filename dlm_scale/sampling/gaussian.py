"""Sampling of Gaussian diffusion: from noise to token vectors, by DDPM's or DDIM's steps, all rows in step.

A sample is a function of (seed, request hash, sample index, settings) and of what `denoise` says, as in engine.py: the
normals of step k are Philox(key; request hash, sample, k ceil(E/4) + block, position). Fixed positions (prompts, text
around an infill) carry their own noised vectors at each step. That is approximate: the rest is steered by them, but not
drawn from the exact conditional law. A network that was trained on prompts reads them without noise instead.

Shapes: B rows, L positions, E dimensions of a token's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlm_scale.diffusion.gaussian import Process, guided, normals, reverse_step
from dlm_scale.sampling.checks import check_rows
from dlm_scale.sampling.noise import Noise, make_noise
from dlm_scale.sampling.samplers import GAUSSIAN_SAMPLERS


@dataclass(frozen=True)
class GaussianState:
    """What sampling/engine.py's State shows of a pass. x_BL: the fixed ids, and those nearest to the prediction."""

    x_BL: Tensor
    is_fixed_BL: Tensor
    is_masked_BL: Tensor
    is_fresh_BL: Tensor
    is_revised_BL: Tensor
    step_B: Tensor
    nfe_B: Tensor
    is_done_B: Tensor


def grid(num_steps: int, first: int, last: int) -> list[int]:
    """Steps last ... first of the forward process at which the network looks: `num_steps` of them, or all."""
    count = min(num_steps, last - first + 1)
    return [last] if count == 1 else [first + round((last - first) * k / (count - 1)) for k in range(count - 1, -1, -1)]


@torch.no_grad()
def stream(
    denoise: Callable[..., tuple[Tensor, Tensor]],
    token_vectors: Callable[[Tensor], Tensor],
    process: Process,
    x_BL: Tensor,
    is_fixed_BL: Tensor,
    *,
    sampler: str,
    num_steps: int,
    seed: int,
    request_hashes: Sequence[int],
    sample_indices: Sequence[int],
    temperature: float = 1.0,
    eta: float | None = None,
    guidance: float = 0.0,
    is_told: bool = False,
    mask_id: int = 0,
    **_of_others: Any,
) -> Iterator[GaussianState]:
    """The start state, then the state after each of the passes.

    denoise(z_BLE, step, guess_BLE, temperature) -> (x0_BLE, ids_BL). eta in [0, 1] (None: the sampler's own): 0 adds no
    noise on the way, 1 is DDPM's. is_told: the network was trained on prompts, which it reads without noise; then the rest is
    drawn given them. guidance: w of (1+w) x0 - w x0 of a second look, in which the fixed positions hold the mask's vector.
    Raises ValueError on settings that make no sense.
    """
    check_rows(x_BL, is_fixed_BL, num_steps, request_hashes, sample_indices, temperature, 0, 1.0)
    eta = GAUSSIAN_SAMPLERS[sampler] if eta is None else eta
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is in [0, 1], not {eta}")
    if guidance and not is_told:
        raise ValueError("guidance needs a network that was trained on prompts (is_told)")
    noise, abar = make_noise(seed, request_hashes, sample_indices), process.abar.to(x_BL.device)
    fixed_BLE, hidden_BLE = (token_vectors(torch.where(is_fixed_BL, ids, 0)) for ids in (x_BL, mask_id))
    draw = lambda number: _normals(noise, number, x_BL.shape[1], process.dim).to(fixed_BLE)  # noqa: E731
    steps = grid(num_steps, process.first, process.num_steps)
    z_BLE, guess_BLE = draw(0), torch.zeros_like(fixed_BLE)
    yield _state(x_BL, is_fixed_BL, is_fixed_BL, 0, is_done=False)
    for number, step in enumerate(steps, 1):
        noise_BLE = draw(number)
        held_BLE = abar[step].sqrt() * fixed_BLE + (1 - abar[step]).sqrt() * noise_BLE
        z_BLE = torch.where(is_fixed_BL[..., None], fixed_BLE if is_told else held_BLE, z_BLE)
        x0_BLE, ids_BL = denoise(z_BLE, step, guess_BLE, temperature)
        if guidance:
            blind_BLE = torch.where(is_fixed_BL[..., None], hidden_BLE, z_BLE)
            x0_BLE = guided(x0_BLE, denoise(blind_BLE, step, guess_BLE, temperature)[0], guidance)
        guess_BLE = torch.where(is_fixed_BL[..., None], 0.0, x0_BLE) if is_told else x0_BLE
        if not bool(guess_BLE.isfinite().all()):
            raise ValueError("the network's prediction is not finite: check the checkpoint")
        ids_BL = torch.where(is_fixed_BL, x_BL, ids_BL)
        passes = number * (2 if guidance else 1)
        yield _state(ids_BL, is_fixed_BL, torch.ones_like(is_fixed_BL), passes, is_done=number == len(steps))
        if number < len(steps):
            z_BLE = reverse_step(z_BLE, x0_BLE, abar[step], abar[steps[number]], eta, noise_BLE)


def one_by_one(denoise: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same a row at a time: the bits of a row then do not depend on its neighbours."""

    def apart(z_BLE: Tensor, step: int, guess_BLE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows = zip(z_BLE.split(1), guess_BLE.split(1))
        x0, ids = zip(*(denoise(z, step, guess, temperature) for z, guess in rows))
        return torch.cat(x0), torch.cat(ids)

    return apart


def _normals(noise: Noise, number: int, length: int, dim: int) -> Tensor:
    """float32 [B, L, E]: the normals of a pass, 0 for the start."""
    blocks = -(-dim // 4)
    rows = (column[:, None, None] for column in (noise.request_hash_B, noise.sample_B))
    return normals(noise.key, *rows, number * blocks + np.arange(blocks), np.arange(length)[:, None], dim)


def _state(x_BL: Tensor, is_fixed_BL: Tensor, is_known_BL: Tensor, number: int, is_done: bool) -> GaussianState:
    of_rows = torch.full_like(x_BL[:, 0], number)
    nothing_BL = torch.zeros_like(is_fixed_BL)
    return GaussianState(x_BL, is_fixed_BL, ~is_known_BL, nothing_BL, nothing_BL, of_rows, of_rows,
                         torch.full_like(is_fixed_BL[:, 0], is_done))  # fmt: skip

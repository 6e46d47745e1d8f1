"""What a network of Gaussian diffusion is trained on and judged by: cross-entropy, the bound, or a squared error.

`ce` (x0_softmax): -log softmax of the clean token, every step alike (CDCD, arXiv 2211.15089). `vlb`: the bound of
gaussian.py. `mse` (v, eps): the mean squared error of what is predicted, and nothing else. With token vectors that are
trained, `mse` has a trivial optimum: vectors that are all alike, or small beside the noise, make noise easy to tell.

`hidden_fn` is that of docs/design.md, signature 2, with `latent=` (gaussian.Latent) beside it; its head also offers
`clean_NE` (E[id] of the rows), `mean(temperature)` (softmax-weighted mean of all vectors), `output()` (the linear
head), `nearest(y_NE, sharpness_N, target_N, weight_N)` (cross-entropy under exp(-sharpness |y - E|^2 / 2)) and
`nearest_ids(y_NE)`. N: positions that carry loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.gaussian import EPS, SOFTMAX, Latent, Process
from dlm_scale.diffusion.objective import Stats, masked_stats

LOSSES = {SOFTMAX: ("ce", "vlb"), "v": ("vlb", "mse"), EPS: ("vlb", "mse")}  # the first is the default


class Terms(NamedTuple):
    """loss_sum: a scalar in the graph. The rest, detached, [N] in nats: kl_N (the summand of step i of the bound),
    reconstruction_N (valid at the first step), prior_N; ce_N, and is_correct_N of the token nearest to the prediction."""

    loss_sum: Tensor
    kl_N: Tensor
    reconstruction_N: Tensor
    prior_N: Tensor
    ce_N: Tensor
    is_correct_N: Tensor


def latent_of(corrupted: Corrupted, process: Process, guess_BLE: Tensor | None = None) -> Latent:
    """What the network reads of a noised batch."""
    alpha_B, sigma_B = process.scales(process.step_of(corrupted.row_t_B), corrupted.noise_BLE)
    return Latent(alpha_B, sigma_B, corrupted.noise_BLE, corrupted.is_masked_BL, guess_BLE)


def predicted_x0(head: Any, process: Process, z_NE: Tensor, alpha_N1: Tensor, sigma_N1: Tensor) -> Tensor:
    """float32 [N, E]: the prediction of x at positions whose noised vectors are z."""
    return process.x0(z_NE, head.mean() if process.prediction == SOFTMAX else head.output(), alpha_N1, sigma_N1)


def run_network(hidden_fn: Callable, corrupted: Corrupted, process: Process, readout: Callable) -> Any:
    """What `readout(head)` makes of the noised rows; with self-conditioning after a first pass, whose prediction the
    rows with `reads_guess_B` are given at their noised positions (without gradient, zeros elsewhere)."""
    guess_BLE, options = None, {"m_B": corrupted.m_B, "attention": corrupted.attention}
    if process.self_conditioning:
        first, (num_rows, length) = latent_of(corrupted, process), corrupted.xt_BL.shape
        z_scales = [scale_B.repeat_interleave(length)[:, None] for scale_B in (first.alpha_B, first.sigma_B)]

        def predict(head):
            z_NE = z_scales[0] * head.clean_NE + z_scales[1] * corrupted.noise_BLE.flatten(0, 1)
            return predicted_x0(head, process, z_NE, *z_scales)

        every_N = torch.arange(num_rows * length, device=corrupted.xt_BL.device)
        with torch.no_grad():
            guess_NE = hidden_fn(corrupted.xt_BL, rows_N=every_N, readout=predict, latent=first, **options)
        is_read_BL = corrupted.reads_guess_B[:, None] & corrupted.is_masked_BL
        guess_BLE = guess_NE.view(num_rows, length, -1) * is_read_BL[..., None]
    latent = latent_of(corrupted, process, guess_BLE)
    return hidden_fn(corrupted.xt_BL, rows_N=corrupted.rows_N, readout=readout, latent=latent, **options)


def terms_of(head: Any, corrupted: Corrupted, process: Process, loss: str) -> Terms:
    """The loss and the parts of the bound at the positions that carry loss."""
    step_N = process.step_of(corrupted.row_t_B)[corrupted.rows_N // corrupted.xt_BL.shape[1]]
    look_up = lambda values_T1: values_T1.to(step_N.device)[step_N].float()  # noqa: E731
    clean_NE, noise_NE = head.clean_NE, corrupted.noise_BLE.flatten(0, 1)[corrupted.rows_N]
    weight_N, factor_N = look_up(process.bound_weights()), look_up(process.error_factor())
    is_first_N = step_N == process.first
    prior_N, target_N, num_steps = process.prior(clean_NE), corrupted.target_N, process.num_used
    if process.prediction == SOFTMAX:
        error_N = (clean_NE - head.mean()).square().sum(-1)
        ce_weight_N = corrupted.weight_N if loss == "ce" else num_steps * is_first_N.float()
        loss_sum, reconstruction_N, is_correct_N = head.cross_entropy(target_N, ce_weight_N)
    else:
        alpha_N1, sigma_N1 = (scale_N[:, None] for scale_N in process.scales(step_N, noise_NE))
        wanted_NE = noise_NE if process.prediction == EPS else alpha_N1 * noise_NE - sigma_N1 * clean_NE
        raw_N = (wanted_NE - (predicted_NE := head.output())).square().sum(-1)
        error_N = factor_N * raw_N
        snr, is_bound = float(process.snr[process.first]), float(loss == "vlb")
        seen_NE = clean_NE + snr**-0.5 * noise_NE  # z / alpha at the first step
        sharpness_N, ones_N = torch.full_like(raw_N, snr), torch.full_like(raw_N, is_bound)
        loss_sum, reconstruction_N, _ = head.nearest(seen_NE, sharpness_N, target_N, ones_N)
        z_NE = alpha_N1 * clean_NE + sigma_N1 * noise_NE
        is_correct_N = head.nearest_ids(process.x0(z_NE, predicted_NE, alpha_N1, sigma_N1)) == target_N
    if loss == "vlb":
        loss_sum = loss_sum + (num_steps * weight_N * error_N + prior_N).sum()
    elif loss == "mse":
        loss_sum = loss_sum + raw_N.sum() / process.dim
    kl_N = (weight_N * error_N).detach()
    return Terms(loss_sum, kl_N, reconstruction_N, prior_N.detach(), reconstruction_N, is_correct_N)


def gaussian_diffusion(
    hidden_fn: Callable, corrupted: Corrupted, process: Process, loss: str
) -> tuple[Tensor, Stats]:
    """(loss_sum, stats) of one micro-batch, as `objective.masked_diffusion` gives them: `nelbo_sum` estimates the bound
    in nats; the bins are of time in place of the mask ratio."""
    terms = run_network(hidden_fn, corrupted, process, lambda head: terms_of(head, corrupted, process, loss))
    step_N = process.step_of(corrupted.row_t_B)[corrupted.rows_N // corrupted.xt_BL.shape[1]]
    seen_N = (step_N == process.first) * process.num_used if process.prediction == SOFTMAX else 1
    bound_N = process.num_used * terms.kl_N + seen_N * terms.reconstruction_N + terms.prior_N
    stats = masked_stats(corrupted, terms.ce_N, terms.is_correct_N)
    return terms.loss_sum, stats | {"nelbo_sum": bound_N.double().sum()}


def bound_of_row_step(
    hidden_fn: Callable, corrupted: Corrupted, process: Process
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N] each: the bound's summand at the rows' step, the reconstruction (valid at the first), the prior, the ce."""
    loss = LOSSES[process.prediction][0]
    terms = run_network(hidden_fn, corrupted, process, lambda head: terms_of(head, corrupted, process, loss))
    return terms.kl_N, terms.reconstruction_N, terms.prior_N, terms.ce_N

"""What: the id that a revealed position gets, from its log-probabilities and one uniform.

One uniform a position and an inverse CDF in vocabulary order: V times fewer random numbers than Gumbel noise over
the vocabulary, no truncated tail (the largest Gumbel of a float32 uniform is 16.6), and ids that are easy to split
over vocabulary shards. Ids at -inf can never be drawn.
"""

from typing import Callable

import torch
from torch import Tensor

from dlm_scale.diffusion.fill import categorical

_MAX_ELEMENTS = 1 << 24


def inverse_cdf(log_probs_NV: Tensor, uniform_N: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Ids [N] drawn from softmax(log_probs / temperature), cut to its top_k ids and then its top_p nucleus.

    top_k = 0 and top_p = 1 cut nothing. Probabilities are float32 (or the input's type), their sums float64.
    """
    best_N1 = log_probs_NV.amax(-1, keepdim=True)
    weight_NV = ((log_probs_NV - best_N1) / temperature).exp()
    if 0 < top_k < weight_NV.shape[1]:
        weight_NV = weight_NV * _is_top_k(weight_NV, top_k)
    if top_p < 1:
        weight_NV = weight_NV * _is_nucleus(weight_NV, top_p)
    return categorical(weight_NV, uniform_N)


def argmax(log_probs_NV: Tensor, uniform_N: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The likeliest ids [N], the smallest id among equals: the limit of temperature 0."""
    is_best_NV = log_probs_NV == log_probs_NV.amax(-1, keepdim=True)
    return is_best_NV.to(torch.uint8).argmax(-1)


def _is_top_k(weight_NV: Tensor, top_k: int) -> Tensor:
    """Exactly top_k True a row; among ids equal to the last one, the smallest are kept."""
    last_N1 = weight_NV.topk(top_k, dim=-1).values[:, -1:]
    is_above_NV, is_equal_NV = weight_NV > last_N1, weight_NV == last_N1
    room_N1 = top_k - is_above_NV.sum(-1, keepdim=True)
    return is_above_NV | (is_equal_NV & (is_equal_NV.cumsum(-1) <= room_N1))


def _is_nucleus(weight_NV: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest ids whose probability reaches top_p, the one that crosses it included."""
    sorted_NV, order_NV = weight_NV.sort(dim=-1, descending=True, stable=True)
    total_NV = sorted_NV.cumsum(-1, dtype=torch.float64)
    is_kept_NV = (total_NV - sorted_NV) < top_p * total_NV[:, -1:]
    return torch.zeros_like(is_kept_NV).scatter(1, order_NV, is_kept_NV)


# local_waves: each id is drawn so, from a law that knows the ids beside it (waves.py).
TOKEN_SAMPLERS = {"inverse_cdf": inverse_cdf, "argmax": argmax, "local_waves": inverse_cdf}


def sample_tokens(
    draw: Callable, log_probs_NV: Tensor, uniform_N: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """`draw` over blocks of rows, so that the float64 sums of a large vocabulary stay within ~128 MiB.

    Raises ValueError where a row has no possible id (NaN, or -inf everywhere): the model has diverged.
    """
    if not bool(log_probs_NV.amax(-1).isfinite().all()):
        raise ValueError("predict gave log-probabilities without any possible id (NaN or -inf): check the checkpoint")
    rows = max(1, _MAX_ELEMENTS // log_probs_NV.shape[1])
    blocks = zip(log_probs_NV.split(rows), uniform_N.split(rows))
    return torch.cat([draw(log_probs, uniform, temperature, top_k, top_p) for log_probs, uniform in blocks])

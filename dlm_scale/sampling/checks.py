"""Settings of a sampling call that make no sense, refused with a ValueError before anything runs."""

import inspect

import torch

from dlm_scale.sampling.blocks import num_open_blocks
from dlm_scale.sampling.samplers import CACHES, HEADS
from dlm_scale.sampling.selectors import SELECTORS


def check_rows(x_BL, is_fixed_BL, num_steps, request_hashes, sample_indices, temperature, top_k, top_p):
    if x_BL.dim() != 2 or x_BL.shape != is_fixed_BL.shape or is_fixed_BL.dtype != torch.bool:
        raise ValueError(f"x and is_fixed are [B, L], is_fixed bool: {tuple(x_BL.shape)}, {tuple(is_fixed_BL.shape)}")
    if not len(request_hashes) == len(sample_indices) == len(x_BL):
        raise ValueError(
            f"one request hash and one sample index a row: {len(request_hashes)} and {len(sample_indices)} "
            f"for {len(x_BL)} rows"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps is 1 or more, not {num_steps}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not temperature={temperature}, top_k={top_k}, "
            f"top_p={top_p}"
        )


def check_blocks(is_fixed_BL, num_steps, block_size, window, context):
    length = is_fixed_BL.shape[1]
    if block_size < 1 or window < 1:
        raise ValueError(f"block_size and context are 1 or more, not {block_size} and {context}")
    if window < length and block_size > window:
        raise ValueError(
            f"rows of {length} positions are longer than the context of {window}: fill them in blocks (block_size) "
            f"of at most {window}"
        )
    least = num_open_blocks(~is_fixed_BL, block_size) if len(is_fixed_BL) else 0
    if num_steps < least:
        raise ValueError(f"{least} blocks need {least} steps at least, not {num_steps}: more steps or larger blocks")


def check_extras(predict, sampler, guidance, cache, refresh_every, confidence_bias):
    if cache not in CACHES:
        raise ValueError(f"cache is one of {', '.join(CACHES)}, not {cache!r}")
    if cache != "none" and "cache" not in inspect.signature(predict).parameters:
        raise ValueError(f"cache {cache!r} needs a predict that takes the argument `cache`: leave it at 'none' here")
    if refresh_every < 0 or (refresh_every and cache == "none"):
        raise ValueError(f"refresh_every is a number of passes and needs a cache, not {refresh_every} with {cache!r}")
    if not guidance >= 0:
        raise ValueError(f"guidance is not negative, but is {guidance}")
    if confidence_bias and (SELECTORS[sampler.selector].score is None or sampler.selector == "all"):
        raise ValueError(f"confidence_bias needs an order by score, and selector {sampler.selector!r} has none")
    if sampler.needs and getattr(predict, sampler.needs, None) is None:
        raise ValueError(f"this sampler needs a predict that offers `{sampler.needs}`: {HEADS[sampler.needs]}")
    if sampler.needs == "local" and (guidance or cache != "none"):
        raise ValueError("local_waves knows neither guidance nor kept keys and values: leave both off")

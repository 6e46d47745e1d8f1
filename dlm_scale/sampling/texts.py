"""Samples of a text from a loaded checkpoint: what `dlm sample` and the Python interface share."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dlm_scale.errors import UsageError
from dlm_scale.sampling.requests import (
    Canvas,
    Sample,
    chat_canvas,
    finished,
    infill_canvas,
    prompt_canvas,
    require_prompt,
)
from dlm_scale.sampling.settings import (
    add_sampling_arguments,
    check_sampling,
    goes_left_to_right,
    is_gaussian,
    longest_canvas,
    num_steps,
    stream_settings,
)

BATCH_SIZE = 16


def text_canvas(inference: Any, text: str, is_infill: bool, options: Mapping[str, Any]) -> Canvas:
    """The canvas of a prompt (with a chat template: of a question) or of an infill text, as long as the options allow.
    Raises UsageError."""
    if inference.tokenizer is None:
        raise UsageError("this checkpoint was trained on synthetic tokens: it has no tokenizer, so no text to sample")
    longest = longest_canvas(options, inference)
    if is_infill and options["chat"] is not None:
        raise UsageError("--chat puts a prompt into a template, and an infill text has its own words: give one of them")
    if is_infill:
        canvas = infill_canvas(text, inference.tokenizer, longest)
        return require_prompt(canvas) if goes_left_to_right(inference) else canvas
    size = options["max_new_tokens"], inference.vocabulary.mask_id, longest
    if options["chat"] is not None:
        return chat_canvas(inference.chat(options["chat"]).asked(text), *size)
    return prompt_canvas(inference.tokenizer.encode(text), *size)


def text_settings(inference: Any, canvas: Canvas, options: Mapping[str, Any]) -> dict[str, Any]:
    """All keyword settings of `stream` but those of the rows."""
    return stream_settings(options, inference) | {"num_steps": num_steps(options, inference, canvas.num_open)}


def stream_canvas(inference: Any, text: str, canvas: Canvas, indices: Sequence[int], settings: Mapping) -> Iterator:
    """States of these samples of one text; its random numbers have the text's CRC-32 as their request hash.

    Raises UsageError for settings that only the canvas shows to be impossible, and for a model that has diverged.
    """
    import torch

    x_BL = torch.tensor([canvas.ids] * len(indices), device=inference.device)
    is_fixed_BL = torch.tensor([canvas.is_fixed] * len(indices), device=inference.device)
    hashes = [zlib.crc32(text.encode())] * len(indices)
    rows = {"request_hashes": hashes, "sample_indices": indices}
    try:
        yield from states(inference, x_BL, is_fixed_BL, **rows, **settings)
    except ValueError as error:
        raise UsageError(f"cannot sample: {error}") from error


def states(inference: Any, x_BL: Any, is_fixed_BL: Any, *, predict: Any = None, **settings: Any) -> Iterator:
    """The States of sampling by the checkpoint's kind of diffusion. predict: in place of its own `predict`, or of its
    `denoise` where it is Gaussian."""
    if is_gaussian(inference):
        from dlm_scale.sampling.gaussian import stream

        denoise, vectors = predict or inference.denoise, inference.token_vectors
        return stream(denoise, vectors, inference.process, x_BL, is_fixed_BL, **settings)
    from dlm_scale.sampling.engine import stream

    return stream(predict or inference.predict, x_BL, is_fixed_BL, **settings)


def samples_of(inference: Any, canvas: Canvas, state: Any, indices: Sequence[int], settings: Mapping) -> list[Sample]:
    """The rows of the last State as Samples."""
    rows = zip(indices, state.x_BL.tolist(), state.nfe_B.tolist())
    return [finished(*row, canvas, settings["stop_ids"], inference.tokenizer) for row in rows]


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the defaults of the flags of the same names, checked. Raises UsageError."""
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser, num_samples=1)
    defaults = vars(parser.parse_args([]))
    if unknown := sorted(options.keys() - defaults.keys() | options.keys() & {"num_samples", "device"}):
        raise UsageError(f"{unknown[0]} is not an option of sampling; these are: {', '.join(sorted(defaults))}")
    made = defaults | dict(options)
    check_sampling(made)
    return made


def stream_text(
    inference: Any, text: str, indices: Sequence[int], is_infill: bool, options: Mapping[str, Any]
) -> Iterator:
    """The States of samples `indices` of one text."""
    made = with_defaults(options)
    canvas = text_canvas(inference, text, is_infill, made)
    return stream_canvas(inference, text, canvas, indices, text_settings(inference, canvas, made))


def generate_texts(
    inference: Any, texts: Sequence[str], num_samples: int, is_infill: bool, options: Mapping[str, Any]
) -> list[list[Sample]]:
    """`num_samples` samples of each text."""
    if isinstance(texts, str):
        raise UsageError("give a list of texts, not one text")
    made = with_defaults(options)
    return [_samples(inference, text, num_samples, is_infill, made) for text in texts]


def _samples(inference: Any, text: str, num_samples: int, is_infill: bool, options: dict) -> list[Sample]:
    canvas, samples = text_canvas(inference, text, is_infill, options), []
    settings = text_settings(inference, canvas, options)
    for first in range(0, num_samples, BATCH_SIZE):
        indices, state = range(first, min(first + BATCH_SIZE, num_samples)), None
        for state in stream_canvas(inference, text, canvas, indices, settings):
            pass
        samples += samples_of(inference, canvas, state, indices, settings)
    return samples

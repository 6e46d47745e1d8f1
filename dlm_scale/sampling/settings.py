"""The flags that all commands which sample share, and the keyword settings of `sampling.stream` that they become."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm_scale.errors import UsageError
from dlm_scale.sampling.samplers import SAMPLERS

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
RANGES = {
    "steps": (0, 2**31), "max_new_tokens": (1, 2**31), "num_samples": (1, 2**31), "seed": (0, 2**64 - 1),
    "temperature": (0, 1e6), "top_k": (0, 2**31), "top_p": (1e-6, 1),
}  # fmt: skip


def boolean(value: str) -> bool:
    """True or False as the command line spells them."""
    if value.lower() in ("true", "1", "yes", "on"):
        return True
    if value.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False; write --flag=True or --flag=False")


FLAG = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}


def add_sampling_arguments(parser: argparse.ArgumentParser, num_samples: int) -> None:
    """The shared flags; each takes `--key=value` too. `num_samples` is the default of that flag."""
    add = parser.add_argument
    add("--sampler", help=f"one of {', '.join(SAMPLERS)} (default: the checkpoint's)")
    add("--steps", "--diffusion_steps", type=int, default=0, help="most passes a sample; 0 = the checkpoint's default")
    add("--max_new_tokens", type=int, help="tokens after the prompt (default: 256, or what the context leaves)")
    add("--num_samples", "-n", type=int, default=num_samples, help="how many samples (default: %(default)s)")
    add("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="below 1 sharpens; 0 = likeliest tokens (default: %(default)s)")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens only; 0 = all (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="draw from the smallest set of this probability (default: 1)")
    add("--sample", default=True, **FLAG, help="False takes the likeliest token everywhere")
    add("--stop_token", action="append", default=[], help="a token that ends the text; `eos` is the tokenizer's own")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def check_ranges(options: Mapping[str, Any], ranges: Mapping[str, tuple]) -> None:
    """Raises UsageError where a value is given and lies outside its range."""
    for name, (least, most) in ranges.items():
        value = options[name]
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} must be between {least} and {most}, not {value}")


def check_sampling(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an unknown sampler or a value outside its range."""
    name = options["sampler"]
    if name is not None and name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(SAMPLERS)}"
        raise UsageError(f"--sampler {name!r} is not a sampler; {hint}")
    check_ranges(options, RANGES)


def stream_settings(options: Mapping[str, Any], inference: Any) -> dict[str, Any]:
    """The keyword settings of `stream` that do not depend on the canvas: all but num_steps."""
    return {
        "sampler": options["sampler"] or inference.default_sampler,
        "seed": options["seed"],
        "mask_id": inference.vocabulary.mask_id,
        "temperature": options["temperature"] if options["sample"] else 0.0,
        "top_k": options["top_k"],
        "top_p": options["top_p"],
        "stop_ids": [_stop_id(token, inference.tokenizer) for token in options["stop_token"]],
    }


def num_steps(options: Mapping[str, Any], inference: Any, num_open: int) -> int:
    """Most passes of a canvas with `num_open` positions to fill: what was asked for, else the sampler's default."""
    name = options["sampler"] or inference.default_sampler
    default = num_open if SAMPLERS[name].one_token_a_step else inference.default_num_steps
    return options["steps"] or max(1, default)


def _stop_id(token: str, tokenizer: Any) -> int:
    if tokenizer is None:
        raise UsageError(f"--stop_token {token!r}: this checkpoint has no tokenizer to read it with")
    if token == "eos" and tokenizer.eos_id is not None:
        return tokenizer.eos_id
    ids = list(tokenizer.encode(text_of(token)))
    if len(ids) != 1:
        raise UsageError(f"--stop_token {token!r} is {len(ids)} tokens of this tokenizer; it must be exactly one")
    return int(ids[0])


def text_of(value: str) -> str:
    r"""The text that a flag names: FILE:path is read as it stands, else \n, \t, \r and \\ are escapes."""
    try:
        if value.startswith("FILE:"):
            return Path(value.removeprefix("FILE:")).read_text(encoding="utf-8")
        value.encode()  # bytes of the command line that are not UTF-8 fail here
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read the text {value[:80]!r}: {error}") from error
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], value)

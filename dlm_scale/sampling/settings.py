"""The flags that all commands which sample share, and the keyword settings of `sampling.stream` that they become."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm_scale.errors import UsageError
from dlm_scale.sampling.requests import LONGEST_IN_BLOCKS
from dlm_scale.sampling.samplers import (
    AUTOREGRESSIVE_SAMPLERS,
    CACHES,
    GAUSSIAN_SAMPLERS,
    HEADS,
    LEFT_TO_RIGHT,
    SAMPLERS,
    resolve,
)

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
RANGES = {
    "steps": (0, 2**31), "max_new_tokens": (1, 2**31), "num_samples": (1, 2**31), "seed": (0, 2**64 - 1),
    "temperature": (0, 1e6), "top_k": (0, 2**31), "top_p": (1e-6, 1), "block_size": (1, 2**31), "guidance": (0, 1e6),
    "eta": (0, 1), "refresh_every": (0, 2**31),
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
    add("--sampler", help=f"one of {', '.join(SAMPLERS)}; {LEFT_TO_RIGHT} of autoregressive checkpoints, "
        f"{' or '.join(GAUSSIAN_SAMPLERS)} of Gaussian ones (default: the checkpoint's)")  # fmt: skip
    add("--steps", "--diffusion_steps", type=int, default=0, help="most passes a sample; 0 = the checkpoint's default")
    add("--max_new_tokens", type=int, help="tokens after the prompt (default: 256, or what the context leaves)")
    add("--num_samples", "-n", type=int, default=num_samples, help="how many samples (default: %(default)s)")
    add("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="below 1 sharpens; 0 = likeliest tokens (default: %(default)s)")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens only; 0 = all (default: %(default)s)")
    add("--allow_edits", default=False, **FLAG,
        help="draw visible tokens anew now and then; needs a checkpoint with an edit stage")  # fmt: skip
    add("--top_p", type=float, default=1.0, help="draw from the smallest set of this probability (default: 1)")
    add("--sample", default=True, **FLAG, help="False takes the likeliest token everywhere")
    add("--chat", nargs="?", const="chatml", metavar="TEMPLATE",
        help="the prompt is a user's message, the text the answer: by chatml (default) or a Jinja file")  # fmt: skip
    add("--stop_token", action="append", default=[], help="a token that ends the text; `eos` is the tokenizer's own")
    add("--block_size", type=int, metavar="N", help="fill N positions after the other; text may exceed the context")
    add("--guidance", type=float, default=0.0, help="strengthen the prompt's say; two passes a step (default: 0, off)")
    add("--eta", type=float, help="noise on the way of ddim, 0 to 1 (default: 0; 1 is ddpm)")
    add("--cache", choices=CACHES, default="none", help="keep keys and values within a block: faster, approximate")
    add("--refresh_every", type=int, default=0, metavar="N", help="whole passes within a block (0: only at its start)")
    add("--confidence_bias", action="append", default=[], metavar="TOKEN=VALUE",
        help="added to the score of positions that say TOKEN; eos=-inf reveals the end last")  # fmt: skip
    add("--logit_bias", action="append", default=[], metavar="TOKEN=VALUE", help="added to TOKEN's logit; -inf bans it")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def check_ranges(options: Mapping[str, Any], ranges: Mapping[str, tuple]) -> None:
    """Raises UsageError where a value is given and lies outside its range."""
    for name, (least, most) in ranges.items():
        value = options[name]
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} must be between {least} and {most}, not {value}")


def check_sampling(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an unknown sampler or a value outside its range."""
    name, known = options["sampler"], [*SAMPLERS, *AUTOREGRESSIVE_SAMPLERS, *GAUSSIAN_SAMPLERS]
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"
        raise UsageError(f"--sampler {name!r} is not a sampler; {hint}")
    check_ranges(options, RANGES)
    if options["cache"] != "none" and options["block_size"] is None:
        raise UsageError(f"--cache {options['cache']} keeps keys within a block: name one with --block_size")
    if options["refresh_every"] and options["cache"] == "none":
        raise UsageError("--refresh_every needs --cache prefix or --cache dual")


def stream_settings(options: Mapping[str, Any], inference: Any) -> dict[str, Any]:
    """The keyword settings of `stream` that do not depend on the canvas: all but num_steps.

    Raises UsageError for tokens that are none, and for what a checkpoint of this kind cannot do.
    """
    _check_kind(options, inference)
    name = options["sampler"] or inference.default_sampler
    if is_gaussian(inference):
        own = {"eta": options["eta"], "is_told": options["chat"] is not None}
    else:
        check_head(name, inference)
        own = edit_settings(name, options["allow_edits"], inference)
    return own | {
        "sampler": name,
        "seed": options["seed"],
        "mask_id": inference.vocabulary.mask_id,
        "temperature": options["temperature"] if options["sample"] else 0.0,
        "top_k": options["top_k"],
        "top_p": options["top_p"],
        "stop_ids": _stop_ids(options, inference),
        "block_size": options["block_size"],
        "context": None if options["block_size"] is None else inference.seq_len,
        "guidance": options["guidance"],
        "cache": options["cache"],
        "refresh_every": options["refresh_every"],
        "confidence_bias": _biases("confidence_bias", options, inference.tokenizer),
        "logit_bias": _biases("logit_bias", options, inference.tokenizer),
    }


def edit_settings(sampler: str, allow_edits: bool, inference: Any) -> dict[str, Any]:
    """The settings of `stream` that let it edit, none where nothing is to be edited.

    Raises UsageError where the sampler cannot edit, or the checkpoint has not learnt to.
    """
    chosen = resolve(sampler)
    if not allow_edits and not chosen.edits:
        return {}
    if chosen.reviser != "none":
        raise UsageError(f"--allow_edits: sampler {sampler!r} masks tokens again, which edits would draw anew: choose "
                         "another sampler, or leave edits out")
    if chosen.needs == "local":
        raise UsageError(f"--allow_edits: sampler {sampler!r} draws by the sampler head, which has learnt masked "
                         "positions alone: choose another sampler, or leave edits out")
    return {"allow_edits": True, "edit_ids": inference.edit_ids}


def goes_left_to_right(inference: Any) -> bool:
    """Whether the checkpoint is autoregressive."""
    return inference.default_sampler in AUTOREGRESSIVE_SAMPLERS


def is_gaussian(inference: Any) -> bool:
    """Whether the checkpoint denoises token vectors."""
    return inference.default_sampler in GAUSSIAN_SAMPLERS


_OFF = {"top_k": 0, "top_p": 1.0, "block_size": None, "cache": "none", "confidence_bias": [],
        "logit_bias": [], "allow_edits": False}  # fmt: skip


def _check_gaussian(name: str, options: Mapping[str, Any]) -> None:
    if name not in GAUSSIAN_SAMPLERS:
        raise UsageError(f"--sampler {name} fills in tokens, and this checkpoint is gaussian: choose one of "
                         f"{', '.join(GAUSSIAN_SAMPLERS)}, or take another checkpoint")
    for flag, off in _OFF.items():
        if options[flag] != off:
            raise UsageError(f"--{flag} has no meaning for this checkpoint, which is gaussian: leave it out")
    if options["guidance"] and options["chat"] is None:
        raise UsageError(f"--guidance {options['guidance']:g} strengthens what a prompt says, and a gaussian checkpoint knows "
                         "prompts by a chat template alone: add --chat, or leave it out")


def _check_kind(options: Mapping[str, Any], inference: Any) -> None:
    name, is_autoregressive = options["sampler"] or inference.default_sampler, goes_left_to_right(inference)
    if is_gaussian(inference):
        return _check_gaussian(name, options)
    if name in GAUSSIAN_SAMPLERS or options["eta"] is not None:
        given = f"--sampler {name}" if name in GAUSSIAN_SAMPLERS else "--eta"
        raise UsageError(f"{given} is of Gaussian diffusion, and this checkpoint is not: leave it out, or take a checkpoint "
                         "of objective.kind=gaussian")
    if is_autoregressive != (name in AUTOREGRESSIVE_SAMPLERS):
        raise UsageError(f"--sampler {name}: " + (
            "this checkpoint is autoregressive and can only fill from left to right; leave --sampler out"
            if is_autoregressive else
            f"only autoregressive checkpoints have it, and this one is not; choose one of: {', '.join(SAMPLERS)}"))
    if not is_autoregressive:
        return
    neutral = {"steps": 0, "allow_edits": False, "guidance": 0, "cache": "none",
               "block_size": None if options["block_size"] is None else 1}  # fmt: skip
    for flag, value in neutral.items():
        if options[flag] != value:
            raise UsageError(f"--{flag} {options[flag]}: this checkpoint is autoregressive and fills from left to right, "
                             "a pass for each token; leave it out"
                             + (", or give 1 for text beyond the context" if flag == "block_size" else ""))


def _stop_ids(options: Mapping[str, Any], inference: Any) -> list[int]:
    """Those asked for, and where there is a chat template the token with which it ends an answer."""
    asked = [_token_id("stop_token", token, inference.tokenizer) for token in options["stop_token"]]
    return asked if options["chat"] is None else [*asked, inference.chat(options["chat"]).end_id]


def check_head(name: str, inference: Any) -> None:
    """UsageError where the checkpoint has not the head that a sampler needs."""
    needed = resolve(name).needs
    if needed and getattr(inference.predict, needed, None) is None:
        raise UsageError(f"--sampler {name} needs {HEADS[needed]}; this checkpoint has none: take another sampler")


def longest_canvas(options: Mapping[str, Any], inference: Any) -> int:
    """Most tokens of prompt and answer together: only blocks go beyond the context."""
    return inference.seq_len if options["block_size"] is None else LONGEST_IN_BLOCKS


def num_steps(options: Mapping[str, Any], inference: Any, num_open: int) -> int:
    """Most passes of a canvas with `num_open` positions to fill: what was asked for, else the sampler's default."""
    name = options["sampler"] or inference.default_sampler
    is_one_a_token = not is_gaussian(inference) and (
        resolve(name).one_token_a_step or options["block_size"] is not None)
    default = num_open if is_one_a_token else inference.default_num_steps
    return options["steps"] or max(1, default)


def _biases(flag: str, options: Mapping[str, Any], tokenizer: Any) -> dict[int, float]:
    biases = {}
    for text in options[flag]:
        token, _, value = text.rpartition("=")
        try:
            bias = float(value)
        except ValueError:
            bias = math.nan
        if not token or not bias < math.inf:
            raise UsageError(f"--{flag} {text!r} is not TOKEN=VALUE with a number, such as eos=-inf or a=2.5")
        biases[_token_id(flag, token, tokenizer)] = bias
    return biases


def _token_id(flag: str, token: str, tokenizer: Any) -> int:
    if tokenizer is None:
        raise UsageError(f"--{flag} {token!r}: this checkpoint has no tokenizer to read it with")
    if token == "eos" and tokenizer.eos_id is not None:
        return tokenizer.eos_id
    if token in tokenizer.special_ids:
        return tokenizer.special_ids[token]
    ids = list(tokenizer.encode(text_of(token)))
    if len(ids) != 1:
        raise UsageError(f"--{flag} {token!r} is {len(ids)} tokens of this tokenizer; it must be exactly one")
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

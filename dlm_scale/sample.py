"""`dlm sample CKPT`: text from a checkpoint, with the denoising live in a terminal and plain text in a pipe."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_scale.errors import UsageError
from dlm_scale.sampling import SAMPLERS

SEPARATOR = "---------------"
_MASK_SPAN = re.compile(r"<mask(?::(\d+))?>")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
_BATCH_SIZE = 16
_RANGES = {
    "steps": (0, 2**31), "max_new_tokens": (1, 2**31), "num_samples": (1, 2**31), "seed": (0, 2**64 - 1),
    "temperature": (0, 1e6), "top_k": (0, 2**31), "top_p": (1e-6, 1),
    "animate_delay": (0, 60), "animate_step": (1, 2**31),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What to fill: ids [L] with the mask id at the open positions, and the hash that names its random numbers."""

    ids: list[int]
    is_fixed: list[bool]
    hash: int


@dataclass(frozen=True)
class Sample:
    """One result: ids up to and with the stop id, the text before it, the passes it took."""

    index: int
    ids: list[int]
    text: str
    nfe: int


def boolean(value: str) -> bool:
    """True or False as the command line spells them."""
    if value.lower() in ("true", "1", "yes", "on"):
        return True
    if value.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False; write --flag=True or --flag=False")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm sample`; each takes `--key=value` too."""
    add, flag = parser.add_argument, {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add("checkpoint", metavar="CKPT", nargs="?", help="a run folder (its last good checkpoint) or a checkpoint folder")
    add("--out_dir", metavar="CKPT", help="the same, as a flag")
    add("--prompt", "--start", default="", help=r"text to continue; \n is a newline, FILE:path.txt a file")
    add("--infill", metavar="TEXT", help="text with holes: <mask> is one token, <mask:12> twelve")
    add("--sampler", help=f"one of {', '.join(SAMPLERS)} (default: the checkpoint's)")
    add("--steps", "--diffusion_steps", type=int, default=0, help="most passes a sample; 0 = the checkpoint's default")
    add("--max_new_tokens", type=int, help="tokens after the prompt (default: 256, or what the context leaves)")
    add("--num_samples", "-n", type=int, default=3, help="how many samples (default: %(default)s)")
    add("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="below 1 sharpens; 0 = likeliest tokens (default: %(default)s)")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens only; 0 = all (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="draw from the smallest set of this probability (default: 1)")
    add("--sample", default=True, **flag, help="False takes the likeliest token everywhere")
    add("--stop_token", action="append", default=[], help="a token that ends the text; `eos` is the tokenizer's own")
    add("--animate", default=None, **flag, help="show the denoising (default: in a terminal)")
    add("--animate_delay", type=float, default=0.05, metavar="SECONDS", help="pause a frame (default: %(default)s)")
    add("--animate_step", type=int, default=1, metavar="N", help="show every N-th pass (default: %(default)s)")
    add("--mask_char", default="_", help="how a masked token is shown (default: %(default)s)")
    add("--html", metavar="FILE", help="save the denoising of the first sample as a web page")
    add("--png", metavar="FILE", help="save six frames of the first sample as a picture (needs matplotlib)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--json", default=False, **flag, help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Sample and print. Raises UsageError on bad flags, prompts or checkpoints; returns the exit code 0."""
    _check(args)
    request_text = _text_of(args.prompt if args.infill is None else args.infill)
    from dlm_scale.inference import load_for_inference

    inference = load_for_inference(args.checkpoint or args.out_dir, device=args.device)
    if inference.tokenizer is None:
        raise UsageError("this checkpoint was trained on synthetic tokens: it has no tokenizer, so no text to sample")
    request = make_request(request_text, args.infill is not None, args.max_new_tokens, inference)
    settings = _settings(args, inference, request.is_fixed.count(False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    samples = []
    for batch in _batches(args, inference, request, settings):
        if not args.json:
            _print(batch)
        samples += batch
    if args.json:
        print(json.dumps(_report(args, inference, settings, samples)))
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.checkpoint is None) == (args.out_dir is None):
        raise UsageError("name one checkpoint: dlm sample CKPT, or --out_dir=CKPT")
    if args.infill is not None and args.prompt:
        raise UsageError("--prompt and --infill exclude each other: put the prompt into the infill text")
    if args.sampler is not None and args.sampler not in SAMPLERS:
        near = difflib.get_close_matches(args.sampler, SAMPLERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(SAMPLERS)}"
        raise UsageError(f"--sampler {args.sampler!r} is not a sampler; {hint}")
    for name, (least, most) in _RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} must be between {least} and {most}, not {value}")
    for path in filter(None, (args.html, args.png)):
        if not Path(path).resolve().parent.is_dir():
            raise UsageError(f"cannot write {path}: its folder does not exist; make it first")


def _text_of(value: str) -> str:
    r"""The text that a flag names: FILE:path is read as it stands, else \n, \t, \r and \\ are escapes."""
    try:
        if value.startswith("FILE:"):
            return Path(value.removeprefix("FILE:")).read_text(encoding="utf-8")
        value.encode()  # bytes of the command line that are not UTF-8 fail here
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read the text {value[:80]!r}: {error}") from error
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], value)


def make_request(text: str, is_infill: bool, max_new_tokens: "int | None", inference: Any) -> Request:
    """The canvas of a prompt (text, then max_new_tokens masks) or of an infill text. Raises UsageError if too long."""
    mask_id = inference.tokenizer.vocabulary.mask_id
    ids = _infill_ids(text, inference.tokenizer) if is_infill else list(inference.tokenizer.encode(text))
    length, seq_len = len(ids), inference.seq_len
    if not is_infill:
        new_tokens = min(256, max(1, seq_len - length)) if max_new_tokens is None else max_new_tokens
        ids += [mask_id] * new_tokens
    if len(ids) > seq_len:
        parts = "--infill" if is_infill else f"prompt ({length} tokens) + --max_new_tokens ({new_tokens})"
        excess = len(ids) - seq_len
        raise UsageError(f"{parts} = {len(ids)} tokens, but the checkpoint's seq_len is {seq_len}: shorten by {excess}")
    is_fixed = [token != mask_id for token in ids]
    return Request([int(token) for token in ids], is_fixed, zlib.crc32(text.encode()))


def _infill_ids(text: str, tokenizer: Any) -> list[int]:
    pieces = _MASK_SPAN.split(text)
    if len(pieces) == 1:
        raise UsageError("--infill needs a hole: <mask> for one token, <mask:12> for twelve")
    ids = list(tokenizer.encode(pieces[0]))
    for count, piece in zip(pieces[1::2], pieces[2::2]):
        ids += [tokenizer.vocabulary.mask_id] * int(count or 1) + list(tokenizer.encode(piece))
    return ids


def _settings(args: argparse.Namespace, inference: Any, num_tokens: int) -> dict[str, Any]:
    """The keyword settings of sampling.stream that all samples share."""
    name = args.sampler or inference.default_sampler
    default_steps = num_tokens if SAMPLERS[name].one_token_a_step else inference.default_num_steps
    return {
        "sampler": name,
        "num_steps": args.steps or max(1, default_steps),
        "seed": args.seed,
        "mask_id": inference.tokenizer.vocabulary.mask_id,
        "temperature": args.temperature if args.sample else 0.0,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "stop_ids": [_stop_id(token, inference.tokenizer) for token in args.stop_token],
    }


def _stop_id(token: str, tokenizer: Any) -> int:
    if token == "eos" and tokenizer.eos_id is not None:
        return tokenizer.eos_id
    ids = list(tokenizer.encode(_text_of(token)))
    if len(ids) != 1:
        raise UsageError(f"--stop_token {token!r} is {len(ids)} tokens of this tokenizer; it must be exactly one")
    return int(ids[0])


def _batches(args: argparse.Namespace, inference: Any, request: Request, settings: dict) -> Iterator[list[Sample]]:
    """Samples in order: one by one while they are watched, else many at once. The text is the same."""
    from dlm_scale.sampling.strip import Screen, save_strip_html, save_strip_png

    is_tty = sys.stdout.isatty()
    is_animated = (is_tty if args.animate is None else args.animate) and not args.json
    size = 1 if is_animated else _BATCH_SIZE
    for first in range(0, args.num_samples, size):
        screen = Screen(sys.stdout, is_tty, args.animate_delay, args.animate_step) if is_animated else None
        frames = [] if first == 0 and (args.html or args.png) else None
        indices = range(first, min(first + size, args.num_samples))
        yield _sample(inference, request, settings, indices, _watcher(inference, args.mask_char, screen, frames))
        for path, save in ((args.html, save_strip_html), (args.png, save_strip_png)):
            if frames and path:
                save(frames, path)


def _watcher(inference: Any, mask_char: str, screen: Any, frames: "list | None") -> "Callable[[Any], None] | None":
    """What looks at the first row after each pass: the screen, the list of frames, both or nothing."""
    if screen is None and frames is None:
        return None
    from dlm_scale.sampling.strip import frame_of

    def watch(state: Any) -> None:
        frame = frame_of(state, 0, inference.tokenizer.decode, mask_char)
        if frames is not None:
            frames.append(frame)
        if screen is not None:
            screen.show(frame, is_last=bool(state.is_done_B[0]))

    return watch


def _sample(inference: Any, request: Request, settings: dict[str, Any], indices: range, watch: Any) -> list[Sample]:
    import torch

    from dlm_scale.sampling.engine import generate

    x_BL = torch.tensor([request.ids] * len(indices), device=inference.device)
    is_fixed_BL = torch.tensor([request.is_fixed] * len(indices), device=inference.device)
    hashes = [request.hash] * len(indices)
    own = {"request_hashes": hashes, "sample_indices": indices, "on_step": watch}
    made = generate(inference.predict, x_BL, is_fixed_BL, **own, **settings)
    rows = zip(indices, made.ids_BL.tolist(), made.nfe_B.tolist())
    return [_finished(index, ids, nfe, request, settings, inference.tokenizer) for index, ids, nfe in rows]


def _finished(index, ids, nfe, request: Request, settings: dict[str, Any], tokenizer: Any) -> Sample:
    """Cut a row after its first generated stop id; the text leaves that id out."""
    stops = (i for i, token in enumerate(ids) if token in settings["stop_ids"] and not request.is_fixed[i])
    stop = next(stops, len(ids))
    return Sample(index, ids[: stop + 1], tokenizer.decode(ids[:stop]), nfe)


def _print(batch: list[Sample]) -> None:
    from dlm_scale.sampling.strip import printable

    for sample in batch:
        text = printable(sample.text) if sys.stdout.isatty() else sample.text
        print(f"{SEPARATOR}\n" * (sample.index > 0) + text, flush=True)


def _report(args: argparse.Namespace, inference: Any, settings: dict, samples: list[Sample]) -> dict[str, Any]:
    results = [{"sample": s.index, "text": s.text, "tokens": s.ids, "nfe": s.nfe} for s in samples]
    return {"checkpoint": args.checkpoint or args.out_dir, "step": inference.step} | settings | {"samples": results}

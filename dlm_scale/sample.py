"""`dlm sample CKPT`: text from a checkpoint, with the denoising live in a terminal and plain text in a pipe."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlm_scale.errors import UsageError
from dlm_scale.sampling.requests import Canvas, Sample
from dlm_scale.sampling.settings import FLAG, add_sampling_arguments, check_ranges, check_sampling, text_of
from dlm_scale.sampling.texts import BATCH_SIZE, samples_of, stream_canvas, text_canvas, text_settings

SEPARATOR = "---------------"
_RANGES = {"animate_delay": (0, 60), "animate_step": (1, 2**31)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm sample`; each takes `--key=value` too."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?", help="a run folder (its last good checkpoint) or a checkpoint folder")
    add("--out_dir", metavar="CKPT", help="the same, as a flag")
    add("--prompt", "--start", default="", help=r"text to continue; \n is a newline, FILE:path.txt a file")
    add("--infill", metavar="TEXT", help="text with holes: <mask> is one token, <mask:12> twelve")
    add_sampling_arguments(parser, num_samples=3)
    add("--animate", default=None, **FLAG, help="show the denoising (default: in a terminal)")
    add("--animate_delay", type=float, default=0.05, metavar="SECONDS", help="pause a frame (default: %(default)s)")
    add("--animate_step", type=int, default=1, metavar="N", help="show every N-th pass (default: %(default)s)")
    add("--mask_char", default="_", help="how a masked token is shown (default: %(default)s)")
    add("--html", metavar="FILE", help="save the denoising of the first sample as a web page")
    add("--png", metavar="FILE", help="save six frames of the first sample as a picture (needs matplotlib)")
    add("--json", default=False, **FLAG, help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Sample and print. Raises UsageError on bad flags, prompts or checkpoints; returns the exit code 0."""
    _check(args)
    text = text_of(args.prompt if args.infill is None else args.infill)
    from dlm_scale.inference import load_for_inference

    inference = load_for_inference(args.checkpoint or args.out_dir, device=args.device)
    canvas = text_canvas(inference, text, args.infill is not None, vars(args))
    settings = text_settings(inference, canvas, vars(args))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    samples = []
    for batch in _batches(args, inference, text, canvas, settings):
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
    check_sampling(vars(args))
    check_ranges(vars(args), _RANGES)
    for path in filter(None, (args.html, args.png)):
        if not Path(path).resolve().parent.is_dir():
            raise UsageError(f"cannot write {path}: its folder does not exist; make it first")


def _batches(
    args: argparse.Namespace, inference: Any, text: str, canvas: Canvas, settings: dict
) -> Iterator[list[Sample]]:
    """Samples in order: one by one while they are watched, else many at once. The text is the same."""
    from dlm_scale.sampling.strip import Screen, save_strip_html, save_strip_png

    is_tty = sys.stdout.isatty()
    is_animated = (is_tty if args.animate is None else args.animate) and not args.json
    size = 1 if is_animated else BATCH_SIZE
    for first in range(0, args.num_samples, size):
        screen = Screen(sys.stdout, is_tty, args.animate_delay, args.animate_step) if is_animated else None
        frames = [] if first == 0 and (args.html or args.png) else None
        indices = range(first, min(first + size, args.num_samples))
        watch = _watcher(inference, args.mask_char, screen, frames)
        yield _sample(inference, text, canvas, settings, indices, watch)
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


def _sample(
    inference: Any, text: str, canvas: Canvas, settings: dict[str, Any], indices: range, watch: Any
) -> list[Sample]:
    state = None
    for state in stream_canvas(inference, text, canvas, indices, settings):
        if watch is not None:
            watch(state)
    return samples_of(inference, canvas, state, indices, settings)


def _print(batch: list[Sample]) -> None:
    from dlm_scale.sampling.strip import printable

    for sample in batch:
        text = printable(sample.text) if sys.stdout.isatty() else sample.text
        print(f"{SEPARATOR}\n" * (sample.index > 0) + text, flush=True)


def _report(args: argparse.Namespace, inference: Any, settings: dict, samples: list[Sample]) -> dict[str, Any]:
    results = [{"sample": s.index, "text": s.text, "tokens": s.ids, "nfe": s.nfe} for s in samples]
    biases = {name: _finite(settings[name]) for name in ("logit_bias", "confidence_bias")}
    head = {"checkpoint": args.checkpoint or args.out_dir, "step": inference.step}
    return head | settings | biases | {"samples": results}


def _finite(biases: dict[int, float]) -> dict[int, "float | str"]:
    """JSON has no infinity."""
    return {token: value if value > -math.inf else "-inf" for token, value in biases.items()}

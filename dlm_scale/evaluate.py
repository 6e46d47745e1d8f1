"""`dlm evaluate CKPT --data PREFIX`: the NELBO with its standard errors; one process or data-parallel."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from dlm_scale.cli import launched_main
from dlm_scale.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder (its last good checkpoint) or a checkpoint")
    parser.add_argument("--data", metavar="PREFIX", help="dataset prefix; default: the run's data.validation")
    parser.add_argument("--max_rows", type=int, help="evaluate the first N rows only")
    parser.add_argument("--num_draws", type=int, default=8, help="masks a row, even (default 8)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows a forward pass (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks; the same for checkpoints to be compared")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: EMA if there is one")
    parser.add_argument("--json", action="store_true", help="only one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Evaluate; rank 0 prints. Raises UsageError for input that does not fit."""
    _check_arguments(args)
    from dlm_scale.engine.runtime import start_runtime, stop_runtime
    from dlm_scale.inference import load_for_inference

    runtime = start_runtime(args.device, 1)
    inference = load_for_inference(args.checkpoint, runtime.device.type, use_ema=args.weights != "raw")
    if args.weights == "ema" and inference.weights != "ema":
        raise UsageError(f"--weights=ema: {args.checkpoint} holds no averaged weights (train.ema_decay was 0)")
    report = evaluate_checkpoint(inference, args, runtime)
    if runtime.is_first:
        _print(report, args.json)
    stop_runtime()


def _check_arguments(args: argparse.Namespace) -> None:
    if args.num_draws < 2 or args.num_draws % 2:
        raise UsageError(f"--num_draws={args.num_draws}: must be even and at least 2 (two independent halves give the "
                         "standard error)")
    for name in ("batch_size", "max_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value}: must be at least 1")


def evaluate_checkpoint(inference: Any, args: argparse.Namespace, runtime: Any) -> dict[str, Any]:
    """The report: nelbo (nats/token, an upper bound), its standard errors, ppl, bits per byte. Collective."""
    from dlm_scale.data.loader import ValidationData, require_same_tokenizer
    from dlm_scale.diffusion.likelihood import bits_per_byte, perplexity
    from dlm_scale.engine.evaluation import evaluate

    prefix = args.data or inference.config.data.validation
    if prefix is None:
        raise UsageError(f"--data is needed: the run of {args.checkpoint} had no validation set")
    data = ValidationData(prefix, inference.seq_len, args.max_rows or 0)
    require_same_tokenizer(inference.tokenizer_meta, data.meta, args.checkpoint, prefix)
    progress = _Progress(data.num_rows, args.batch_size, runtime)
    estimate = evaluate(inference.model, data, inference.vocabulary.mask_id, args.batch_size, args.num_draws,
                        runtime.mesh, runtime.device, seed=args.seed, on_batch=progress)
    num_bytes = estimate.tokens * data.bytes_per_token if data.bytes_per_token else None
    return {
        "nelbo": estimate.nelbo,
        "nelbo_se": _finite(estimate.nelbo_se),
        "nelbo_se_mc": estimate.nelbo_se_mc,
        "ppl": perplexity(estimate.nelbo),
        "tokens": estimate.tokens,
        "bits_per_byte": bits_per_byte(estimate.nelbo, estimate.tokens, num_bytes) if num_bytes else None,
        "bits_per_byte_se": bits_per_byte(_finite(estimate.nelbo_se) or 0.0, estimate.tokens, num_bytes)
        if num_bytes else None,
        "rows": estimate.rows,
        "ce_by_mask_ratio": list(estimate.ce_by_mask_ratio),
        "step": inference.step,
        "weights": "ema" if inference.weights == "ema" else "raw",
        "num_draws": args.num_draws,
        "seed": args.seed,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Progress:
    """A counting line on stderr where that is a terminal."""

    def __init__(self, num_rows: int, batch_size: int, runtime: Any):
        self.total = -(-num_rows // batch_size // runtime.mesh.data_size)
        self.shown = runtime.is_first and sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        if self.shown:
            end = "\n" if done >= self.total else ""
            print(f"\revaluating: batch {done} of {self.total}", end=end, file=sys.stderr)


def _print(report: dict[str, Any], as_json: bool) -> None:
    if not as_json:
        se = report["nelbo_se"]
        print(f"NELBO <= {report['nelbo']:.4f} nats/token (95 % interval +- {1.96 * (se or 0):.4f}, Monte-Carlo part "
              f"{1.96 * report['nelbo_se_mc']:.4f}); perplexity <= {report['ppl']:.3f}; "
              f"{report['tokens']:,} tokens, step {report['step']}, {report['weights']} weights")
        if report["bits_per_byte"] is not None:
            print(f"bits per byte <= {report['bits_per_byte']:.4f}, standard error {report['bits_per_byte_se']:.4f}")
    print(json.dumps(report))


if __name__ == "__main__":
    launched_main("evaluate")

"""`dlm evaluate CKPT`: likelihood of a data set under one checkpoint or two; one process or data-parallel."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dlm_scale.cli import launched_main
from dlm_scale.errors import UsageError

LIKELIHOODS = ("nelbo", "duel", "l2r")
ORDERS = ("max_prob", "margin", "entropy", "entropy_bounded", "threshold")
ESTIMATORS = ("pairs", "exact", "quadrature")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a run folder (its last good checkpoint) or a checkpoint")
    add("other", metavar="CKPT2", nargs="?", help="a second one: adds the paired difference, first minus second")
    add("--data", metavar="PREFIX", help="dataset prefix; default: the run's data.validation")
    add("--max_rows", type=int, help="evaluate the first N rows only")
    add("--likelihood", choices=LIKELIHOODS, default="nelbo",
        help="nelbo: the bound; duel, l2r: exact, of the sampler with --order, or from left to right (default nelbo)")
    add("--estimator", choices=ESTIMATORS, help="of the bound; default: pairs where --num_draws is a multiple of 4")
    add("--num_draws", type=int, default=8, help="masks a row, even (default 8)")
    add("--order", choices=ORDERS, default="max_prob", help="which positions duel reveals first (default max_prob)")
    add("--tokens_per_step", type=int, default=1, help="how many positions duel reveals a pass (default 1)")
    add("--batch_size", type=int, default=16, help="rows a forward pass (default 16)")
    add("--seed", type=int, default=0, help="of the masks; the same for checkpoints to be compared")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: EMA if there is one")
    add("--json", action="store_true", help="only one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Evaluate; rank 0 prints. Raises UsageError for input that does not fit."""
    check_arguments(args)
    from dlm_scale.engine.runtime import start_runtime, stop_runtime

    runtime = start_runtime(args.device, 1)
    report = evaluate_likelihood(args, runtime)
    if runtime.is_first:
        print_report(report, args.json)
    stop_runtime()


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for numbers that make no sense."""
    multiple = 4 if args.estimator == "pairs" else 2
    if args.num_draws < multiple or args.num_draws % multiple:
        raise UsageError(f"--num_draws={args.num_draws}: must be a multiple of {multiple} for this estimator (two "
                         "independent halves give the standard error)")
    for name in ("batch_size", "max_rows", "tokens_per_step"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value}: must be at least 1")


def load(path: str, args: argparse.Namespace, runtime: Any) -> Any:
    """The checkpoint with the weights that --weights names."""
    from dlm_scale.inference import load_for_inference

    inference = load_for_inference(path, runtime.device.type, use_ema=args.weights != "raw")
    if args.weights == "ema" and inference.weights != "ema":
        raise UsageError(f"--weights=ema: {path} holds no averaged weights (train.ema_decay was 0)")
    return inference


def evaluate_likelihood(args: argparse.Namespace, runtime: Any) -> dict[str, Any]:
    """The likelihood of the data set, of one checkpoint or two. Collective."""
    from dlm_scale.data.loader import ValidationData, require_same_tokenizer
    from dlm_scale.evaluation.likelihoods import LikelihoodOptions, evaluate_checkpoints

    inferences = [load(path, args, runtime) for path in filter(None, (args.checkpoint, args.other))]
    first = inferences[0]
    prefix = args.data or first.config.data.validation
    if prefix is None:
        raise UsageError(f"--data is needed: the run of {args.checkpoint} had no validation set")
    data = ValidationData(prefix, first.seq_len, args.max_rows or 0)
    require_same_tokenizer(first.tokenizer_meta, data.meta, args.checkpoint, prefix)
    options = LikelihoodOptions(args.likelihood, args.estimator, args.num_draws, args.batch_size, args.seed, args.order,
                                args.tokens_per_step)
    return evaluate_checkpoints(inferences, data, options, runtime)


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Lines to read, then the JSON object."""
    if not as_json:
        print(likelihood_text(report))
        if "difference" in report:
            print(likelihood_text(report["other"]))
            found = report["difference"]
            between = "one row has no interval" if found["interval"] is None else (
                "95 % interval {:+.4f} to {:+.4f}".format(*found["interval"]))
            print(f"difference, first minus second: {found['nelbo']:+.4f} nats/token ({between}, paired by row)")
    print(json.dumps(report))


def likelihood_text(report: dict[str, Any]) -> str:
    """One checkpoint's figures. `<=` marks a bound."""
    sign, name = ("<=", "NELBO") if report["likelihood"] == "nelbo" else ("=", f"NLL ({report['likelihood']})")
    width, width_mc = (1.96 * (report[key] or 0.0) for key in ("nelbo_se", "nelbo_se_mc"))
    text = (f"{name} {sign} {report['nelbo']:.4f} nats/token (95 % interval +- {width:.4f}, Monte-Carlo part "
            f"{width_mc:.4f}); perplexity {sign} {report['ppl']:.3f}; {report['tokens']:,} tokens, step "
            f"{report['step']}, {report['weights']} weights")
    if report["bits_per_byte"] is None:
        return text
    return (f"{text}\nbits per byte {sign} {report['bits_per_byte']:.4f}, standard error "
            f"{report['bits_per_byte_se']:.4f}")


if __name__ == "__main__":
    launched_main("evaluate")

"""`dlm evaluate CKPT`: likelihoods, generated text, sweeps, the zero-shot suite; alone or on many ranks."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dlm_scale.cli import launched_main
from dlm_scale.errors import UsageError
from dlm_scale.parallel.dist_env import dist_env, from_first
from dlm_scale.parallel.mesh import check_layout

LIKELIHOODS = ("nelbo", "duel", "l2r")
ORDERS = ("max_prob", "margin", "entropy", "entropy_bounded", "threshold")
ESTIMATORS = ("pairs", "exact", "quadrature")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a run folder (its last good checkpoint) or a checkpoint")
    add("other", metavar="CKPT2", nargs="?", help="a second one: adds the paired difference, first minus second")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: EMA if there is one")
    add("--batch_size", type=int, default=16, help="rows a forward pass (default 16)")
    add("--seed", type=int, default=0, help="of masks and samples; the same for checkpoints to be compared")
    add("--json", action="store_true", help="only one JSON object on stdout")
    add("--tensor_parallel_size", type=int, default=1, metavar="T", help="ranks that share one model (default 1)")
    _add_likelihood_arguments(parser.add_argument_group("likelihood of a dataset (what is done without further flags)"))
    _add_text_arguments(parser.add_argument_group("quality of generated text"))
    suite = parser.add_argument_group("zero-shot likelihoods")
    suite.add_argument("--suite", choices=("mdlm",), help="the held-out sets of MDLM's zero-shot table")
    suite.add_argument("--from", dest="source", metavar="DIR", help="NAME.jsonl or NAME.parquet instead of the Hub")
    suite.add_argument("--sets", metavar="NAMES", help="some of the sets, as in ptb,lambada (default: all)")


def _add_likelihood_arguments(group: Any) -> None:
    add = group.add_argument
    add("--data", metavar="PREFIX", help="dataset prefix; default: the run's data.validation")
    add("--max_rows", type=int, metavar="N", help="evaluate N rows, spread evenly over the set (default: all)")
    add("--eval_tokens", type=int, metavar="N", help="the same in tokens: as many whole rows as fit into N")
    add("--likelihood", choices=LIKELIHOODS, default="nelbo",
        help="nelbo: the bound; duel, l2r: exact, of the sampler with --order, or from left to right (default nelbo)")
    add("--estimator", choices=ESTIMATORS, help="of the bound; default: pairs where --num_draws is a multiple of 4")
    add("--num_draws", type=int, default=8, help="masks a row, even (default 8)")
    add("--order", choices=ORDERS, default="max_prob", help="which positions duel reveals first (default max_prob)")
    add("--tokens_per_step", type=int, default=1, help="how many positions duel reveals a pass (default 1)")


def _add_text_arguments(group: Any) -> None:
    add = group.add_argument
    add("--samples", metavar="FILE", help="score these samples: JSON Lines with text and, if there, tokens and nfe")
    add("--generate", type=int, metavar="N", help="score N samples made now, by --sampler in --steps")
    add("--sampler", help="of --generate (default ancestral; autoregressive: left_to_right)")
    add("--sweep", metavar="S1,S2", help="samplers: quality against passes at all --steps, to OUT.png and OUT.json")
    add("--steps", default="0", metavar="N1,N2", help="most passes a sample; 0: as many as tokens (default 0)")
    add("--length", type=int, help="tokens a sample (default: the context length)")
    add("--temperature", type=float, default=1.0)
    add("--top_p", type=float, default=1.0)
    add("--judge", default="ngram", metavar="J", help="ngram, or the folder of a Hugging Face causal model")
    add("--judge_text", metavar="T", help="what ngram counts: a text file or a dataset prefix (default: the run's)")
    add("--out", default="sweep", metavar="OUT", help="of --sweep (default sweep)")


def run(args: argparse.Namespace) -> None:
    """Evaluate; rank 0 prints. Raises UsageError for input that does not fit."""
    check_arguments(args)
    from dlm_scale.engine.runtime import start_runtime, stop_runtime

    runtime = start_runtime(args.device, args.tensor_parallel_size)
    evaluated, text = MODES[mode_of(args)]
    report = evaluated(args, runtime)
    if runtime.is_first:
        if not args.json:
            print(text(report))
        print(json.dumps(report))
    stop_runtime()


def mode_of(args: argparse.Namespace) -> str:
    """What is asked for. Raises UsageError for two things at once."""
    asked = [name for name in ("samples", "generate", "sweep", "suite") if getattr(args, name) is not None]
    if asked == ["generate", "sweep"]:
        return "sweep"  # --generate says how many samples
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)} exclude each other: run one after the other")
    if asked and args.other:
        raise UsageError(f"a second checkpoint is for likelihoods: --{asked[0]} takes one")
    return asked[0] if asked else "likelihood"


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for numbers that make no sense."""
    multiple = 4 if args.estimator in ("pairs", "quadrature") else 2
    if args.num_draws < multiple or args.num_draws % multiple:
        raise UsageError(f"--num_draws={args.num_draws}: must be a multiple of {multiple} for this estimator (two "
                         "independent halves give the standard error)")
    mode_of(args)
    _steps(args)
    if args.max_rows is not None and args.eval_tokens is not None:
        raise UsageError("--max_rows and --eval_tokens say the same quantity: give one of the two")
    for name in ("batch_size", "max_rows", "eval_tokens", "tokens_per_step", "generate", "length",
                 "tensor_parallel_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value}: must be at least 1")
    check_layout(dist_env().world_size, args.tensor_parallel_size, "--tensor_parallel_size")


def _max_rows(args: argparse.Namespace, seq_len: int) -> int:
    """Most rows of `seq_len` tokens to evaluate; 0: all."""
    if args.eval_tokens is None:
        return args.max_rows or 0
    if args.eval_tokens < seq_len:
        raise UsageError(f"--eval_tokens={args.eval_tokens}: less than one row, which has {seq_len} tokens")
    return args.eval_tokens // seq_len


def _steps(args: argparse.Namespace) -> list[int]:
    try:
        steps = [int(word) for word in args.steps.split(",")]
    except ValueError:
        steps = [-1]
    if min(steps) < 0:
        raise UsageError(f"--steps={args.steps}: whole numbers, 0 or more, as in 8,16,32")
    return steps


def load(path: str, args: argparse.Namespace, runtime: Any) -> Any:
    """The checkpoint with the weights that --weights names; each rank of a tensor-parallel group has a part of them."""
    from dlm_scale.inference import load_for_inference

    use_ema, local_rank = args.weights != "raw", runtime.env.local_rank
    inference = load_for_inference(path, runtime.device.type, use_ema, local_rank, runtime.mesh)
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
    data = ValidationData(prefix, first.seq_len, _max_rows(args, first.seq_len))
    require_same_tokenizer(first.tokenizer_meta, data.meta, args.checkpoint, prefix)
    options = LikelihoodOptions(args.likelihood, args.estimator, args.num_draws, args.batch_size, args.seed, args.order,
                                args.tokens_per_step)
    return evaluate_checkpoints(inferences, data, options, runtime)


def evaluate_text(args: argparse.Namespace, runtime: Any) -> dict[str, Any]:
    """Samples of a file, or made now, under a judge, beside held-out text under the same judge. Collective."""
    from dlm_scale.evaluation.generative import make_samples, read_samples, text_report

    inference, judge = _load_with_judge(args, runtime)
    if args.samples is not None:
        samples, made = read_samples(args.samples, inference.tokenizer), {}
    else:
        sampler = args.sampler or inference.default_sampler
        check_samplers([sampler], inference)
        options = _sampling_options(args, inference, sampler, _steps(args)[0])
        samples = make_samples(inference, options, runtime.mesh)
        made = {"sampler": sampler, "steps": options.steps}
    return made | text_report(samples, judge) | {"reference": _reference(args, inference, judge, len(samples), runtime)}


def evaluate_sweep(args: argparse.Namespace, runtime: Any) -> dict[str, Any]:
    """Quality against passes for several samplers; writes OUT.json and OUT.png. Collective."""
    from dlm_scale.evaluation.generative import sweep, text_line, write_sweep

    out = Path(args.out)
    if not out.resolve().parent.is_dir():
        raise UsageError(f"--out={args.out}: its folder does not exist; make it first")
    inference, judge = _load_with_judge(args, runtime)
    samplers = args.sweep.split(",")
    check_samplers(samplers, inference)
    options = _sampling_options(args, inference, samplers[0], 0)
    say = print if runtime.is_first and not args.json else lambda text: None
    reference = _reference(args, inference, judge, options.num_samples, runtime)
    if reference is not None:
        say("held-out text: " + text_line(reference))
    points = list(sweep(inference, judge, samplers, _steps(args), options, say, runtime.mesh))
    document = {"points": points, "reference": reference, "step": inference.step, "weights": inference.weights,
                "seed": args.seed, "length": options.length, "png": str(out.with_suffix(".png")),
                "json": str(out.with_suffix(".json"))}
    if runtime.is_first:
        write_sweep(out, document)
    return document


def check_samplers(names: list[str], inference: Any) -> None:
    """UsageError for a sampler that does not exist, or needs a head that the checkpoint has not."""
    from dlm_scale.sampling.samplers import SAMPLERS, SAMPLERS_OF
    from dlm_scale.sampling.settings import check_head

    known = list(SAMPLERS_OF.get(inference.kind, SAMPLERS))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"sampler {name!r} is none for this checkpoint"
                             + (f"; did you mean {near[0]!r}?" if near else f"; choose of: {', '.join(known)}"))
        if name in SAMPLERS:
            check_head(name, inference)


def _load_with_judge(args: argparse.Namespace, runtime: Any) -> tuple[Any, Any]:
    from dlm_scale.evaluation.judges import Judge

    inference = load(args.checkpoint, args, runtime)
    if inference.tokenizer is None:
        raise UsageError(f"{args.checkpoint} was trained on synthetic tokens: it has no tokenizer, so no text to judge")
    first = partial(from_first, runtime.is_first, 0, None)  # the judge stands on one rank, and all hear what it says
    held = []

    def name() -> str:
        held.append(_judge(args, inference, runtime))
        return held[0].name

    return inference, Judge(first(name), lambda samples: first(lambda: held[0].score(samples)))


def _judge(args: argparse.Namespace, inference: Any, runtime: Any) -> Any:
    from dlm_scale.evaluation.judges import NGRAM, causal_judge, ngram_judge, rows_for_judge

    if args.judge != NGRAM:
        return causal_judge(args.judge, str(runtime.device))
    return ngram_judge(rows_for_judge(args.judge_text, inference), inference.vocabulary.size)


def _sampling_options(args: argparse.Namespace, inference: Any, sampler: str, steps: int) -> Any:
    from dlm_scale.evaluation.generative import SamplingOptions

    length = args.length or inference.seq_len
    if length > inference.seq_len:
        raise UsageError(f"--length={length} is beyond the checkpoint's context of {inference.seq_len} tokens")
    return SamplingOptions(sampler, steps, args.generate or 32, length, args.seed, args.temperature, args.top_p,
                           args.batch_size)


def _reference(args: argparse.Namespace, inference: Any, judge: Any, num_rows: int, runtime: Any) -> dict | None:
    """The same figures of held-out text, None where the checkpoint's validation set is not here."""
    from dlm_scale.data.loader import ValidationData
    from dlm_scale.evaluation.generative import reference_samples, text_report

    prefix = args.data or inference.config.data.validation
    if args.data is None and (prefix is None or not Path(f"{prefix}.bin").is_file()):
        if runtime.is_first:
            print("dlm evaluate: no held-out text to compare with: name one with --data", file=sys.stderr)
        return None
    data = ValidationData(prefix, args.length or inference.seq_len, num_rows)
    return text_report(reference_samples(data, inference.tokenizer, num_rows), judge)


def evaluate_suite(args: argparse.Namespace, runtime: Any) -> dict[str, Any]:
    """The likelihood of each set of the zero-shot suite. Collective."""
    from dlm_scale.evaluation.likelihoods import LikelihoodOptions
    from dlm_scale.evaluation.suite import evaluate_sets

    inference = load(args.checkpoint, args, runtime)
    options = LikelihoodOptions(args.likelihood, args.estimator, args.num_draws, args.batch_size, args.seed, args.order,
                                args.tokens_per_step)
    return evaluate_sets(inference, args.sets, args.source, _max_rows(args, inference.seq_len), options, runtime)


def sweep_text(report: dict[str, Any]) -> str:
    return f"{len(report['points'])} points: {report['png']}, {report['json']}"


def text_text(report: dict[str, Any]) -> str:
    from dlm_scale.evaluation.generative import text_line

    lines = [text_line(report)]
    if report["reference"] is not None:
        lines.append("held-out text: " + text_line(report["reference"]))
    return "\n".join(lines)


def suite_text(report: dict[str, Any]) -> str:
    return "\n".join(f"{name:<12} {likelihood_text(found)}" for name, found in report["sets"].items())


def comparison_text(report: dict[str, Any]) -> str:
    """One or two checkpoints, and their difference."""
    lines = [likelihood_text(report)]
    if "difference" in report:
        found = report["difference"]
        between = "one row has no interval" if found["interval"] is None else (
            "95 % interval {:+.4f} to {:+.4f}".format(*found["interval"]))
        lines += [likelihood_text(report["other"]), f"difference, first minus second: {found['nelbo']:+.4f} nats/token "
                  f"({between}, paired by row)"]
    return "\n".join(lines)


def likelihood_text(report: dict[str, Any]) -> str:
    """One checkpoint's figures. `<=` marks a bound."""
    bounds = {"nelbo": "NELBO", "vlb": "variational bound"}
    sign, name = ("<=", bounds.get(report["likelihood"])) if report["likelihood"] in bounds else (
        "=", f"NLL ({report['likelihood']})")
    width, width_mc = (1.96 * (report[key] or 0.0) for key in ("nelbo_se", "nelbo_se_mc"))
    text = (f"{name} {sign} {report['nelbo']:.4f} nats/token (95 % interval +- {width:.4f}, Monte-Carlo part "
            f"{width_mc:.4f}); perplexity {sign} {report['ppl']:.3f}; {report['tokens']:,} tokens, step "
            f"{report['step']}, {report['weights']} weights")
    if report["bits_per_byte"] is None:
        return text
    return (f"{text}\nbits per byte {sign} {report['bits_per_byte']:.4f}, standard error "
            f"{report['bits_per_byte_se']:.4f}")


MODES = {  # what is computed, and its lines to read
    "likelihood": (evaluate_likelihood, comparison_text),
    "samples": (evaluate_text, text_text),
    "generate": (evaluate_text, text_text),
    "sweep": (evaluate_sweep, sweep_text),
    "suite": (evaluate_suite, suite_text),
}


if __name__ == "__main__":
    launched_main("evaluate")

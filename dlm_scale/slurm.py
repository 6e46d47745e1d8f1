"""`dlm slurm render CONFIG` writes a job script, `dlm slurm status RUN` says how a run stands; `begin` and `end` are
what the scripts in slurm/ ask before and after each attempt.

RUN/slurm/attempts.jsonl has a line for the beginning and one for the end of each attempt; an attempt whose node died
has no end. A chain is one job with its requeues, or all links of one job array.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dlm_scale.errors import UsageError

RECENT = 10  # logged steps whose median rate counts
WORDS = 400  # characters of an error; all of it stands in status.json
NOT_COUNTED = ("left",)  # attempts that end so are not the run's own failure


# --- how an attempt ended, and what follows --------------------------------------------------------------------------


class Verdict(NamedTuple):
    """`action`: finished, halted (by the user), left (to Slurm), stopped, crashed, excluded (these three begin again),
    refused or failed."""

    action: str
    message: str


@dataclass(frozen=True)
class Ended:
    """What is known when an attempt has ended. `status`: status.json, empty where this attempt has not written it."""

    status: dict[str, Any]
    step: int
    exit_code: int = 0
    was_asked: bool = False
    was_terminated: bool = False
    refusal: str = ""
    excluded: str = ""
    fruitless: int = 1
    attempts: int = 3


def judge(ended: Ended) -> Verdict:
    """The exit code of srun is the last thing to believe: it ends the ranks of a graceful stop by signals, too."""
    verdict = _verdict(ended)
    if verdict.action in ("stopped", "crashed", "excluded") and ended.fruitless >= ended.attempts:
        return Verdict("failed", f"{verdict.message}: giving up after {ended.fruitless} attempts in a row without a new "
                                 f"checkpoint (DLM_ATTEMPTS={ended.attempts}); the last one is of step {ended.step}")
    return verdict


def _verdict(ended: Ended) -> Verdict:
    kind, reason = ended.status.get("status"), ended.status.get("reason")
    at = f"at step {ended.status.get('step')}"
    if ended.refusal:
        return Verdict("refused", f"not tried again: {ended.refusal}")
    if kind == "finished":
        return Verdict("finished", f"finished {at}, weights {ended.status.get('weights_hash')}")
    if ended.was_terminated:
        return Verdict("left", f"ended by Slurm {at if kind == 'stopped' else f'after step {ended.step}'}")
    if kind == "stopped" and (reason == "stop_at_step" or reason == "control/stop" and not ended.was_asked):
        return Verdict("halted", f"stopped {at} by {reason}, as it was told: not continued")
    if ended.excluded:
        return Verdict("excluded", f"bad nodes: {ended.excluded}")
    if kind == "stopped" or ended.was_asked:
        return Verdict("stopped", f"stopped {at if kind else 'before training'}; last checkpoint of step {ended.step}")
    why = str(ended.status.get("error") or "")[:WORDS] or f"exit code {ended.exit_code} without a word in status.json"
    return Verdict("crashed", f"crashed ({why}); last checkpoint of step {ended.step}")


def fruitless_attempts(lines: Sequence[dict[str, Any]], step: int) -> int:
    """Attempts in a row, up to the last of these lines, that brought no new checkpoint; `step` is that of the newest."""
    begins = [(line["step"], line["attempt"]) for line in lines if line["event"] == "begin"]
    outcomes = {line["attempt"]: line["outcome"] for line in lines if line["event"] == "end"}
    count, after = 0, step
    for before, attempt in reversed(begins):
        if after > before:
            break
        count, after = count + (outcomes.get(attempt) not in NOT_COUNTED), before
    return count


def newest_step(run: Path) -> int:
    """Of the newest checkpoint; -1 where there is none."""
    from dlm_scale.checkpoint.folders import list_checkpoints

    found = list_checkpoints(run)
    return int(found[-1].name[5:].split(".")[0]) if found else -1


def read_attempts(run: Path, chain: str | None = None) -> list[dict[str, Any]]:
    """The lines of attempts.jsonl, or those of one chain; half a line, left by a node that died, is passed over."""
    path, found = run / "slurm" / "attempts.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and chain in (None, line.get("chain")):
            found.append(line)
    return found


def _append(run: Path, line: dict[str, Any]) -> None:
    path = run / "slurm" / "attempts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell() and not _ends_a_line(path):
            file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _this_attempt() -> dict[str, str]:
    job, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    return {"chain": os.environ.get("SLURM_ARRAY_JOB_ID", job), "attempt": f"{job}.{restart}"}


def begin(args: argparse.Namespace) -> int:
    """Refuse what cannot run before a GPU is asked; print `go|done|failed DEVICE RUN`, and a line that says more."""
    from dlm_scale.train import check

    config, _, _ = check(args.config, args.overrides, args.ranks)
    check_inside_a_node(config.parallel.tensor_parallel_size, args.ranks_per_node)
    run, this = Path(config.train.out).resolve(), _this_attempt()
    lines, step = read_attempts(run, this["chain"]), newest_step(run)
    action, message = _whether_to_begin(lines, step, args.attempts)
    if action == "go":
        _append(run, {"event": "begin", **this, "step": step, "run_attempt": _status(run).get("attempt", 0),
                      "nodes": os.environ.get("SLURM_JOB_NODELIST"), "time": round(time.time())})
    print(f"{action} {config.train.device} {run}\n{message}")
    return 0


def _whether_to_begin(lines: list[dict[str, Any]], step: int, attempts: int) -> tuple[str, str]:
    ended = next((line for line in lines if line.get("outcome") in ("finished", "halted", "refused", "failed")), None)
    if ended:
        good = ended["outcome"] in ("finished", "halted")
        return "done" if good else "failed", f"nothing left to do: attempt {ended['attempt']}: {ended['message']}"
    if (count := fruitless_attempts(lines, step)) >= attempts:
        return "failed", f"giving up after {count} attempts in a row without a new checkpoint (DLM_ATTEMPTS={attempts})"
    begun = sum(line["event"] == "begin" for line in lines)
    return "go", f"attempt {begun + 1}, " + (f"from the checkpoint of step {step}" if step >= 0 else "from scratch")


def end(args: argparse.Namespace) -> int:
    """Record how the attempt ended; print the action and the message."""
    run, this = args.run, _this_attempt()
    lines, step, refusal = read_attempts(run, this["chain"]), newest_step(run), Path(os.environ["DLM_REFUSAL_FILE"])
    before = next(line for line in reversed(lines) if line["event"] == "begin")
    status = _status(run)
    verdict = judge(Ended(
        status if status.get("attempt", 0) > before["run_attempt"] else {}, step, args.exit_code, bool(args.asked),
        bool(args.terminated), refusal.read_text().strip() if refusal.exists() else "", args.excluded,
        fruitless_attempts(lines, step), args.attempts))
    _append(run, {"event": "end", **this, "step": step, "outcome": verdict.action, "message": verdict.message,
                  "exit_code": args.exit_code, "time": round(time.time())})
    print(verdict.action, " ".join(verdict.message.split()))
    return 0


def _status(run: Path) -> dict[str, Any]:
    from dlm_scale.engine.run_folder import read_status

    return read_status(run)


# --- dlm slurm status ------------------------------------------------------------------------------------------------


def describe_run(run: Path, now: float) -> dict[str, Any]:
    """How a run stands, from its folder alone: seconds, tokens a second, None where nothing is known."""
    from dlm_scale.config import config_from_text
    from dlm_scale.engine.run_folder import read_metrics

    if not (run / "config.yaml").exists():
        raise UsageError(f"{run} is no run folder (it has no config.yaml): name one that training has begun")
    train = (config := config_from_text((run / "config.yaml").read_text(), f"{run}/config.yaml")).train
    status, steps = _status(run), [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    lines, checkpoint = read_attempts(run), newest_step(run)
    step = steps[-1]["step"] if steps else max(checkpoint, 0)
    rate = statistics.median(line["tokens_per_second"] for line in steps[-RECENT:]) if steps else None
    tokens_left = (train.num_steps - step) * train.global_batch_size * config.model.seq_len
    begins, ends = ([line for line in lines if line["event"] == event] for event in ("begin", "end"))
    return {
        "status": status.get("status", "not begun"),
        "step": step,
        "num_steps": train.num_steps,
        "tokens_per_second": rate,
        "seconds_a_step": train.global_batch_size * config.model.seq_len / rate if rate else None,
        "seconds_left": tokens_left / rate if rate else None,
        "last_checkpoint": status.get("checkpoint") or (f"step {checkpoint}" if checkpoint >= 0 else None),
        "checkpoint_age_seconds": _age(run, now),
        "attempts": len(begins),
        "requeues": max(0, len(begins) - len({line["chain"] for line in begins})),
        "job": begins[-1]["attempt"] if begins else None,
        "nodes": begins[-1]["nodes"] if begins else None,
        "last_end": ends[-1]["message"] if ends else None,
        "error": status.get("error"),
    }


def _age(run: Path, now: float) -> float | None:
    from dlm_scale.checkpoint.folders import list_checkpoints

    found = list_checkpoints(run)
    return round(now - found[-1].stat().st_mtime) if found else None


def show_status(args: argparse.Namespace) -> int:
    report = describe_run(args.run, time.time())
    if args.json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        if value is not None:
            print(f"{name:<24}{value:.4g}" if isinstance(value, float) else f"{name:<24}{value}")
    return 0


# --- dlm slurm render -----------------------------------------------------------------------------------------------

SCRIPT = """#!/usr/bin/env bash
# {title}
# sbatch [OPTIONS OF SBATCH] slurm/{name}.sh [section.key=value ...]; docs/slurm.md says what to change for a site.
# Nodes as the config means them; hours and rate have not been measured.
{header}
root=${{DLM_ROOT:-${{SLURM_SUBMIT_DIR:-$PWD}}}}
# shellcheck source=slurm/_common.sh
source "$root/slurm/_common.sh" ||
    {{ echo "error: no slurm/_common.sh in $root: submit there, or set DLM_ROOT" >&2; exit 2; }}
train {command} "$@"
"""


def check_inside_a_node(tensor_size: int, ranks_per_node: int) -> None:
    """Raises UsageError where a tensor-parallel group would span two nodes."""
    if ranks_per_node % tensor_size and tensor_size != 1:
        raise UsageError(f"parallel.tensor_parallel_size={tensor_size} does not divide the {ranks_per_node} ranks of a "
                         "node: its sums would cross the network; use a divisor, or other --ntasks-per-node")


def header(args: argparse.Namespace, name: str) -> list[str]:
    """The #SBATCH lines: a chain of links where there are several nodes with GPUs."""
    links = args.links if args.links is not None else (20 if args.nodes > 1 and args.gpus_per_node else 0)
    options = {
        "job-name": name,
        "partition": args.partition,
        "account": args.account,
        "nodes": args.nodes,
        "ntasks-per-node": args.ntasks_per_node or args.gpus_per_node or 1,
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": args.cpus_per_task,
        "mem": args.mem,
        "time": args.time,
        "signal": f"B:USR1@{args.signal_seconds}",
        "array": f"1-{links}%1" if links else None,
        "output": "slurm-%x-%A_%a.log" if links else "slurm-%x-%j.log",
        "open-mode": "append",
    }
    return [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None] + ["#SBATCH --requeue"]


def script_of(args: argparse.Namespace) -> str:
    """The job script of a config. Raises UsageError where the config does not fit the nodes."""
    from dlm_scale.config import load_config, resolve_batch
    from dlm_scale.parallel.mesh import check_layout

    config, ranks = load_config(args.config, args.overrides), args.ntasks_per_node or args.gpus_per_node or 1
    size = config.parallel.tensor_parallel_size
    check_layout(args.nodes * ranks, size)
    check_inside_a_node(size, ranks)
    resolve_batch(config, args.nodes * ranks // size)
    words = [str(args.config), *args.overrides]
    name = args.job_name or Path(args.config).stem
    return SCRIPT.format(title=_title(Path(args.config)), name=name, header="\n".join(header(args, name)),
                         command=shlex.join(words))


def _title(config: Path) -> str:
    """The first sentence of the config's leading comment, or its path."""
    first = config.read_text().splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else str(config)


def render(args: argparse.Namespace) -> int:
    """Print the script, or write it to --out."""
    text = script_of(args)
    if args.out is None:
        print(text, end="")
    elif args.out.exists() and not args.overwrite:
        raise UsageError(f"--out {args.out} exists: name another file, or say --overwrite")
    else:
        args.out.write_text(text)
        args.out.chmod(0o755)
        print(f"written: {args.out}; now: sbatch {args.out}")
    return 0


# --- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="render|status")
    writing = commands.add_parser("render", help="a job script for a config")
    writing.add_argument("config", help="a YAML file")
    writing.add_argument("overrides", nargs="*", help="section.key=value ..., right after the config")
    writing.add_argument("--nodes", type=int, default=1)
    writing.add_argument("--gpus_per_node", type=int, default=8, help="0: none, over gloo")
    writing.add_argument("--ntasks_per_node", type=int, help="ranks a node; default: its GPUs, or 1")
    writing.add_argument("--cpus_per_task", type=int, default=8)
    writing.add_argument("--mem", default="0", help="of a node; 0: all of it")
    writing.add_argument("--partition")
    writing.add_argument("--account")
    writing.add_argument("--time", default="24:00:00", help="limit of a job, or of a link of the chain")
    writing.add_argument("--signal_seconds", type=int, default=600, help="before the limit, for step and checkpoint")
    writing.add_argument("--links", type=int, help="of the chain; 0: none; default: 20 on several nodes with GPUs")
    writing.add_argument("--job_name")
    writing.add_argument("--out", type=Path, help="a file; default: print")
    writing.add_argument("--overwrite", action="store_true")
    writing.set_defaults(act=render)
    showing = commands.add_parser("status", help="how a run stands, from its folder alone")
    showing.add_argument("run", type=Path, metavar="RUN")
    showing.add_argument("--json", action="store_true")
    showing.set_defaults(act=show_status)
    beginning = commands.add_parser("begin")
    for flag in ("--ranks", "--ranks_per_node", "--attempts"):
        beginning.add_argument(flag, type=int, required=True)
    beginning.add_argument("config")
    beginning.add_argument("overrides", nargs=argparse.REMAINDER)
    beginning.set_defaults(act=begin)
    ending = commands.add_parser("end")
    ending.add_argument("run", type=Path)
    for flag in ("--exit_code", "--asked", "--terminated", "--attempts"):
        ending.add_argument(flag, type=int, required=True)
    ending.add_argument("--excluded", default="")
    ending.set_defaults(act=end)


def run(args: argparse.Namespace) -> int:
    return args.act(args)


if __name__ == "__main__":
    from dlm_scale.cli import launched_main

    launched_main("slurm")

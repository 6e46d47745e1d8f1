"""`dlm checkpoint verify|list CKPT`."""
from __future__ import annotations

import argparse
from pathlib import Path

from dlm_scale.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["verify", "list"],
                        help="verify: hash every file against the manifest; list: show step, size and health")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run folder (all its checkpoints), or one"
                        " checkpoint folder")


def run(args: argparse.Namespace) -> int:
    """Exit code. Raises UsageError naming every bad file (verify), or when there is no checkpoint at all."""
    from dlm_scale.checkpoint.folders import inspect_checkpoint, resolve_checkpoints

    problems = {path: inspect_checkpoint(path)[1] for path in resolve_checkpoints(args.checkpoint)}
    return _list(problems) if args.action == "list" else _verify(problems)


def _verify(problems: dict[Path, list[str]]) -> int:
    for path, found in problems.items():
        if not found:
            print(f"good  {path}  ({_num_bytes(path) / 1e6:.1f} MB)")
    bad = [f"{path}: {problem}" for path, found in problems.items() for problem in found]
    if bad:
        raise UsageError("damaged checkpoint files:\n  " + "\n  ".join(bad)
                         + "\nRestore them from a copy; a run resumes from its newest good checkpoint")
    return 0


def _list(problems: dict[Path, list[str]]) -> int:
    newest = max((path for path, found in problems.items() if not found), key=list(problems).index, default=None)
    for path, found in problems.items():
        health = f"bad: {'; '.join(found)}" if found else "good, newest" if path == newest else "good"
        print(f"{path.name}  {_num_bytes(path) / 1e6:10.1f} MB  {health}")
    return 0


def _num_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.iterdir()) if path.is_dir() else 0

"""The `dlm` command. A subcommand's module is imported only when it is called, so that help and refusals are quick."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dlm_scale import __version__
from dlm_scale.errors import UsageError


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives: the names of its `add_arguments(parser)` and `run(args)`, or `main` for main(argv)."""

    summary: str
    module: str
    run: str = "run"
    add_arguments: str = "add_arguments"


COMMANDS = {
    "prepare": Command("turn text into an indexed dataset", "dlm_scale.prepare"),
    "train": Command("train a config (one process; for more: the deepspeed launcher)", "dlm_scale.train", "main"),
    "evaluate": Command("likelihood of a dataset under a checkpoint", "dlm_scale.evaluate"),
    "sample": Command("generate text from a checkpoint", "dlm_scale.sample"),
    "checkpoint": Command("verify or list a checkpoint", "dlm_scale.checkpoint.cli"),
    "data": Command("check, show or import an indexed dataset", "dlm_scale.data.cli", "run_data", "add_data_arguments"),
    "slurm": Command("write a job script; say how a run under Slurm stands", "dlm_scale.slurm"),
    "doctor": Command("what is installed, and which backend each operation takes and why", "dlm_scale.doctor"),
}


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError, takes flags with underscores or dashes, and booleans as `--flag=true`."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str):
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments as a namespace. Raises UsageError, with a did-you-mean for an unknown flag."""
        args, unknown = self.parse_known_args(list(_normalised(arguments, _switches(self))))
        if unknown:
            flags = [flag for action in _actions(self) for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return args


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)


def _switches(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in _actions(parser) if action.nargs == 0 for flag in action.option_strings}


def _normalised(arguments: Sequence[str], switches: set[str]) -> Iterator[str]:
    """Dashes inside flags become underscores; `--switch=true` the bare switch, and `--switch=false` nothing."""
    for position, argument in enumerate(arguments):
        if argument == "--":
            yield from arguments[position:]
            return
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            yield argument
            continue
        flag = "--" + flag[2:].replace("-", "_")
        if not equals or flag not in switches:
            yield flag + equals + value
        elif value.lower() == "true":
            yield flag
        elif value.lower() != "false":
            raise UsageError(f"{flag} is {value!r}: expected true or false")


def run_command(command: Command, arguments: Sequence[str], program: str) -> int:
    """Import a command's module, parse its arguments and run it; returns the exit code."""
    module = importlib.import_module(command.module)
    if command.run == "main":
        return module.main(list(arguments)) or 0
    parser = Parser(prog=program, description=command.summary)
    getattr(module, command.add_arguments)(parser)
    return getattr(module, command.run)(parser.parse(arguments)) or 0


def exit_code(run: Callable[[], int | None], program: str = "dlm") -> int:
    """Run a main: 2 and one message for UsageError, 130 for an interrupt; every other exception propagates."""
    try:
        return run() or 0
    except UsageError as error:
        from dlm_scale.parallel.dist_env import is_first_rank

        if is_first_rank():
            print(f"{program}: error: {error}", file=sys.stderr)
            note_refusal(str(error))
        else:
            time.sleep(1.0)  # a launcher ends the others with the first that ends: let rank 0 speak
        return 2
    except KeyboardInterrupt:
        return 130


def note_refusal(message: str) -> None:
    """Leave the message in the file DLM_REFUSAL_FILE, where a job script looks: launchers lose exit codes."""
    if path := os.environ.get("DLM_REFUSAL_FILE"):
        with suppress(OSError), open(path, "w") as file:
            file.write(message + "\n")


def _help() -> str:
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    last = "dlm COMMAND --help says more. Exit codes: 0 finished, 2 bad usage, config or input."
    return "\n".join(["usage: dlm COMMAND ...", "", *lines, "", last])


def _dispatch(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "--version":
        print(f"dlm_scale {__version__}")
    elif name in COMMANDS:
        return run_command(COMMANDS[name], arguments[1:], f"dlm {name}")
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(f"unknown command {name!r}" + (f"; did you mean {near[0]}?" if near else "; see `dlm --help`"))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `dlm`; returns the exit code."""
    return exit_code(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))


def launched_main(name: str) -> None:
    """`python -m dlm_scale.NAME` under a launcher: `dlm NAME` without the flag that deepspeed adds."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    sys.exit(main([name, *arguments]))


if __name__ == "__main__":
    sys.exit(main())

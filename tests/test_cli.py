"""The `dlm` command: quick help, exit codes, flags in every spelling, and refusals before anything heavy loads."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dlm_scale import cli, doctor
from dlm_scale.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "numpy", "deepspeed", "megatron", "triton", "datasets", "tokenizers", "tiktoken", "pydantic", "rich"}
PROBE = (
    "import json, sys\nfrom dlm_scale.cli import main\n"
    "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
    "print(json.dumps([code, sorted({m.split('.')[0] for m in sys.modules})]))\n"
)


def probe(*arguments: str) -> tuple[int, set[str], subprocess.CompletedProcess]:
    """(exit code, top-level modules loaded, the process) of `dlm ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules), done


def test_help_names_every_command_and_loads_nothing_heavy():
    code, modules, done = probe("--help")
    assert code == 0 and not modules & HEAVY
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.num_stps=3", "did you mean train.num_steps?"),
        ("train.num_steps=many", "expected a valid integer"),
        ("train.global_batch_size=33", "33 / (16 x 1)"),
        ("deepspeed.gradient_cliping=1.0", "did you mean optimizer.gradient_clip"),
        ("data.train=nowhere/train", "nowhere/"),
    ],
)
def test_train_refuses_before_torch_is_loaded(override, said):
    code, modules, done = probe("train", "configs/shakespeare_char_tiny.yaml", override)
    assert code == 2 and not modules & {"torch", "deepspeed", "megatron"}
    assert done.stderr.startswith("dlm: error: ") and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: dlm {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "did you mean train?"),
        (["xyz"], "see `dlm --help`"),
        (["doctor", "--verbose=1"], "unknown argument --verbose=1"),
        (["data", "verify"], "PREFIX"),
        (["data", "verify", "nowhere/at/all"], "nowhere/at/"),
        (["checkpoint", "verify", "nowhere/at/all"], "nowhere/at/all"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(arguments, said, capsys):
    assert code_of(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dlm: error: ") and said in captured.err


def code_of(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dlm_scale 0.")


def test_interrupt_and_other_exceptions():
    def interrupted():
        raise KeyboardInterrupt

    assert cli.exit_code(interrupted) == 130
    assert cli.exit_code(lambda: None) == 0 and cli.exit_code(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        cli.exit_code(lambda: 1 // 0)


def example_parser() -> cli.Parser:
    parser = cli.Parser(prog="dlm example")
    parser.add_argument("path")
    parser.add_argument("--max_new_tokens", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--choice", choices={"a": 1, "b": 2})
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("show").add_argument("--all_rows", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["p", "--max_new_tokens=5", "--json"], (5, True)),
        (["p", "--max-new-tokens", "5", "--json=True"], (5, True)),
        (["--json=false", "--max-new-tokens=5", "p"], (5, False)),
        (["p"], (1, False)),
    ],
)
def test_flags_in_every_spelling(arguments, expected):
    args = example_parser().parse(arguments)
    assert (args.max_new_tokens, args.json) == expected and args.path == "p"


def test_flags_of_subcommands_and_values_with_dashes():
    assert example_parser().parse(["p", "show", "--all-rows=true"]).all_rows is True
    assert example_parser().parse(["p-q_r"]).path == "p-q_r"
    assert example_parser().parse(["--", "--a-b"]).path == "--a-b"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["p", "--max_new_token=5"], "did you mean --max_new_tokens?"),
        (["p", "--max_new_tokens=x"], "invalid int value"),
        (["p", "--json=maybe"], "expected true or false"),
        (["p", "--choice=c"], "invalid choice"),
        ([], "required: path"),
    ],
)
def test_wrong_flags_raise_usage_errors(arguments, said):
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        example_parser().parse(arguments)


def test_a_command_is_imported_parsed_and_run(monkeypatch):
    module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--n", type=int), run=lambda args: args.n)
    monkeypatch.setitem(sys.modules, "example_command", module)
    assert cli.run_command(cli.Command("", "example_command"), ["--n=3"], "dlm example") == 3


def test_doctor_names_packages_devices_and_backends(capsys):
    assert doctor.run(argparse.Namespace()) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"python", "torch", "deepspeed", "triton", "flash-attn", "cpu", "attention", "compiler"} <= set(names)
    assert all(line[:22].strip() and line[22:].strip() for line in lines)


def test_doctor_survives_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "dlm_scale.ops", None)
    report = dict(doctor.report())
    assert report["torch"].startswith("MISSING") and "not needed" in report["flash-attn"]
    assert report["device"].startswith("unknown") and report["operations"].startswith("unknown")


def missing(name: str):
    raise doctor.metadata.PackageNotFoundError(name)

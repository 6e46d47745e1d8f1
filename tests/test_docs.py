"""The documents: their commands run, or exist; their links lead somewhere; their tables agree with the code.

Every block of bash stands under one of two comments:
    <!-- run: tiny -->          executed as it stands, in order, in a sandbox whose commands make training tiny
    <!-- not run: REASON -->    checked only: commands, flags, configs and keys exist, values are valid
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dlm_scale import cli
from dlm_scale.config import config_from_dict, known_keys, load_config
from dlm_scale.config_text import parse_yaml
from dlm_scale.errors import UsageError
from tests.forked import free_port

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8")
             for p in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md",
                       *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = "model|objective|gaussian|diffusion|data|parallel|train|optimizer"
RUN, NOT_RUN = "run: tiny", "not run: "
TINY_STEPS = 3
TINY = ("model.num_layers=1 model.hidden_size=16 model.num_heads=2 model.ffn_size=32 train.global_batch_size=4 "
        f"train.micro_batch_size=2 train.num_steps={TINY_STEPS} train.log_every=1 train.eval_rows=2 train.eval_draws=2")
SHIM = f"""#!/bin/sh
last=
case " $* " in
    *dlm_scale.train*|*" train "*) last="{TINY}" ;;
    *" prepare "*) last="--max_documents=100" ;;
esac
case "$*" in *train.stop_at_step=*) last="$last train.stop_at_step={TINY_STEPS - 1}" ;; esac
exec {{command}} "$@" $last
"""
TEXT = """ROMEO:
To be, or not to be, that is the question.

JULIET:
What's in a name? That which we call a rose
By any other word would smell as sweet.

"""
BLOCK_SECONDS = 200


class Block(NamedTuple):
    """A fenced block, and the comment over it."""

    document: str
    line: int
    directive: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(document: str, text: str) -> list[Block]:
    return [Block(document, text[: m.start(3)].count("\n"), m[1] or "", m[2], m[3]) for m in BLOCK.finditer(text)]


BLOCKS = [block for document, text in DOCUMENTS.items() for block in blocks_of(document, text)]
BASH = [block for block in BLOCKS if block.language == "bash"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command line, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def parser_of(name: str) -> cli.Parser:
    command = cli.COMMANDS[name]
    parser = cli.Parser(prog=f"dlm {name}")
    getattr(importlib.import_module(command.module), command.add_arguments)(parser)
    return parser


def sample_batch_parser() -> cli.Parser:
    from dlm_scale.sample_batch import add_arguments

    parser = cli.Parser(prog="sample_batch.py")
    add_arguments(parser)
    return parser


def options_of(name: str) -> set[str]:
    return {flag for action in cli._actions(parser_of(name)) for flag in action.option_strings}


def check_dlm(name: str, arguments: list[str]) -> None:
    """Raises UsageError where the command, a flag, a config or a key does not exist, or a value is wrong."""
    if name not in cli.COMMANDS:
        raise UsageError(f"there is no dlm {name}")
    if name == "train":
        load_config(ROOT / arguments[0], arguments[1:])
    else:
        parser_of(name).parse(arguments)


def check_command(words: list[str]) -> None:
    program, *rest = words
    if "tools/sample_batch.py" in words:
        sample_batch_parser().parse(words[words.index("tools/sample_batch.py") + 1 :])
    elif program in ("deepspeed", "torchrun"):
        at = rest.index("--module" if program == "deepspeed" else "-m")
        check_dlm(rest[at + 1].removeprefix("dlm_scale."), rest[at + 2 :])
    elif program == "dlm":
        check_dlm(rest[0], rest[1:])
    elif program == "make":
        if not all(f"\n{target}: " in (ROOT / "Makefile").read_text() for target in rest):
            raise UsageError(f"the Makefile lacks one of {rest}")
    elif words[:2] == ["python", "tools/prepare_data.py"]:
        check_dlm("prepare", rest[1:])
    elif program == "sbatch":
        check_sbatch(rest)
    elif words[:2] == ["python", "tools/convert_checkpoint.py"]:
        parser = cli.Parser()
        importlib.import_module("dlm_scale.convert.cli").add_arguments(parser)
        parser.parse(rest[1:])
    elif words[:3] == ["python", "-m", "dlm_scale.lm_eval_model"]:
        pass  # its flags are the harness's
    elif program not in ("source", "curl", "printf"):
        raise UsageError(f"{program} is no command that these documents use")


def check_sbatch(arguments: list[str]) -> None:
    """The script exists; the settings after a training script fit the config that it names."""
    at = next(i for i, argument in enumerate(arguments) if not argument.startswith("--"))
    script = ROOT / arguments[at]
    if not script.is_file():
        raise UsageError(f"there is no {arguments[at]}")
    if trained := re.search(r"^train (.+) \"\$@\"$", script.read_text(), re.MULTILINE):
        load_config(ROOT / shlex.split(trained[1])[0], [*shlex.split(trained[1])[1:], *arguments[at + 1 :]])


@pytest.mark.parametrize("block", BASH, ids=str)
def test_the_commands_of_a_block_exist(block):
    assert block.directive == RUN or len(block.directive) > len(NOT_RUN) + 5 and block.directive.startswith(NOT_RUN)
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize("line", [
    "dlm trian configs/quickstart.yaml",
    "dlm train configs/quickstrat.yaml",
    "dlm train configs/quickstart.yaml train.num_stps=3",
    "torchrun -m dlm_scale.train configs/quickstart.yaml --optimizer.schedule=cosin",
    "deepspeed --num_gpus 2 --module dlm_scale.evaluate runs/x --max_row=3",
    "dlm data verify",
    "make quickstrat",
    "python tools/prepare_data.py text.txt --tokenizer byte --output D",
    "torchrun --nproc_per_node 2 tools/sample_batch.py runs/x --input p.jsonl --output o.jsonl --batchsize=3",
    "rm -rf data",
    "sbatch --nodes=4 slurm/owt_125m.sh",
    "sbatch --nodes=4 slurm/owt_124m.sh optimizer.learning_rat=3e-4",
])  # fmt: skip
def test_the_check_sees_a_wrong_command(line):
    with pytest.raises(UsageError):
        check_command(shlex.split(line))


def test_blocks_are_found_with_their_comments():
    text = "a\n\n<!-- run: tiny -->\n```bash\none \\\n  two   # three\n```\n```yaml\nx: 1\n```\n"
    assert [block[1:] for block in blocks_of("f", text)] == [(4, RUN, "bash", "one \\\n  two   # three\n"),
                                                             (8, "", "yaml", "x: 1\n")]
    assert list(commands("one \\\n  two   # three\n")) == [["one", "two"]]


class Sandbox(NamedTuple):
    """A folder with what a clone has, a text, and the commands in front of which training becomes tiny."""

    folder: Path
    outputs: list[str]

    def run(self, document: str) -> None:
        """Execute the document's blocks in order; their outputs are appended to `outputs`."""
        for block in BLOCKS:
            if block.document == document and block.directive == RUN:
                self.outputs.append(self._run_block(block))

    def _run_block(self, block: Block) -> str:
        environment = os.environ | {"PATH": f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}"}
        shell = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
        command = [*shell, block.text]
        process = subprocess.Popen(command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            output, errors = process.communicate(timeout=BLOCK_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, f"{block}: exit code {process.returncode}\n{output[-3000:]}\n{errors[-3000:]}"
        return output


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Sandbox:
    """The sandbox after the README's commands."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "bin").mkdir()
    for name in ("configs", "docs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tinyshakespeare.txt").write_text(TEXT * 40)
    programs = {"dlm": "dlm_scale.cli", "torchrun": "torch.distributed.run",
                "deepspeed": f"deepspeed.launcher.runner --master_port {free_port()}"}
    for name, module in programs.items():
        (folder / "bin" / name).write_text(SHIM.format(command=f"{shlex.quote(sys.executable)} -m {module}"))
        (folder / "bin" / name).chmod(0o755)
    reader = Sandbox(folder, [])
    reader.run("README.md")
    return reader


@pytest.mark.timeout(2 * BLOCK_SECONDS)
def test_the_readme_runs_and_names_all_that_a_run_leaves(sandbox):
    run = sandbox.folder / "runs" / "shakespeare_char_tiny"
    described = set(re.findall(r"`([\w.]+)[/`]", section("README.md", "A run folder")))
    assert {path.name for path in run.iterdir()} <= described
    assert set(json.loads((run / "status.json").read_text())) <= words_of(section("README.md", "A run folder"))
    written = section("docs/training.md", "What a run writes")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines and set().union(*lines) <= words_of(written)
    report = next(json.loads(line) for line in sandbox.outputs[0].splitlines() if line.startswith('{"nelbo"'))
    assert set(report) <= words_of(written)


@pytest.mark.timeout(2 * BLOCK_SECONDS)
def test_the_guide_to_data_runs(sandbox):
    sandbox.run("docs/data.md")
    said = "".join(sandbox.outputs)
    assert "all good" in said and "entropy_rate: 1.213" in said


@pytest.mark.timeout(2 * BLOCK_SECONDS)
def test_the_guide_to_training_runs(sandbox):
    sandbox.run("docs/training.md")
    status = json.loads((sandbox.folder / "runs" / "mine" / "status.json").read_text())
    assert (status["status"], status["step"], status["attempt"]) == ("finished", TINY_STEPS, 2)
    lines = [json.loads(line) for line in (sandbox.folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, TINY_STEPS + 1))


@pytest.mark.timeout(2 * BLOCK_SECONDS)
def test_the_guide_to_evaluation_runs(sandbox):
    sandbox.run("docs/evaluation.md")
    compared, swept = (json.loads(output.splitlines()[-1]) for output in sandbox.outputs[-2:])
    guide = words_of(DOCUMENTS["docs/evaluation.md"])
    assert set(compared) | set(swept["reference"]) <= guide and len(swept["points"]) == 4
    assert compared["other"]["likelihood"] == "exact" and compared["difference"]["interval"]
    assert (sandbox.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(2 * BLOCK_SECONDS)
def test_the_guide_to_sampling_runs(sandbox):
    sandbox.run("docs/sampling.md")
    pictures, batches, python = sandbox.outputs[-3:]
    assert pictures.startswith("JULIET:\n") and not batches
    samples = [json.loads(line) for line in (sandbox.folder / "samples.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in samples] == [(i, s) for i in ("r1", "r2", 3) for s in range(4)]
    assert (sandbox.folder / "samples.parquet").is_file()
    assert python.startswith("['ROMEO:") and " 'ROMEO:" in python.splitlines()[-1]
    assert (sandbox.folder / "denoising.png").read_bytes().startswith(b"\x89PNG")
    assert "<table>" in (sandbox.folder / "denoising.html").read_text()


@pytest.mark.timeout(2 * BLOCK_SECONDS)
def test_the_guide_to_conversion_runs(sandbox):
    sandbox.run("docs/conversion.md")
    assert "good  again" in sandbox.outputs[-1] and "-> transformer.final_norm.gain" in sandbox.outputs[-1]
    assert (sandbox.folder / "export" / "modeling_dlm_scale.py").is_file() and not (sandbox.folder / "nothing").exists()
    described = set(re.findall(r"`(--\w+)`", DOCUMENTS["docs/conversion.md"]))
    parser = cli.Parser()
    importlib.import_module("dlm_scale.convert.cli").add_arguments(parser)
    assert {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"} <= described


def test_only_documents_that_a_test_runs_ask_to_be_run():
    running = {block.document for block in BASH if block.directive == RUN}
    assert running == {"README.md", "docs/data.md", "docs/training.md", "docs/sampling.md", "docs/evaluation.md",
                       "docs/conversion.md", "docs/from_the_seeds.md"}


def section(document: str, heading: str) -> str:
    """The text under a heading, down to the next one of any level."""
    return re.split(rf"^#+ {re.escape(heading)}$", DOCUMENTS[document], flags=re.MULTILINE)[1].split("\n#")[0]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]\w*", text))


def first_cells(document: str, heading: str) -> list[str]:
    """The names in the first column of the table under a heading."""
    cells = re.findall(r"^\| ([^|]+) \|", section(document, heading), re.MULTILINE)[1:]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def spans(text: str) -> list[str]:
    """Inline code, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document]):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_keys_and_commands_that_are_named_exist(document):
    come = [line for line in DOCUMENTS[document].splitlines() if "to come" in line]
    for span in spans(DOCUMENTS[document]):
        if re.fullmatch(r"(configs|docs|tools|tests|dlm_scale|kernels)/[\w./*-]*", span):
            assert list(ROOT.glob(span.rstrip("/"))), f"{document}: {span}"
        for key in re.findall(rf"\b((?:{SECTIONS})\.(?!py|md|log|bin)[a-z]\w+)", span):
            assert key in known_keys(), f"{document}: {key}"
        if match := re.match(r"dlm ([a-z]+)(.*)", span):
            is_known = match[1] in cli.COMMANDS
            assert is_known or any(span in line for line in come), f"{document}: {span}"
            flags = set(re.findall(r"--\w+", match[2]))
            assert not is_known or flags <= options_of(match[1]), f"{document}: {span}"


def test_every_key_and_every_flag_of_sampling_is_explained():
    assert first_cells("docs/training.md", "Every key") == known_keys_in_documented_order()
    described = set(re.findall(r"`(--?\w+)`", DOCUMENTS["docs/sampling.md"]))
    batch = {flag for action in cli._actions(sample_batch_parser()) for flag in action.option_strings}
    assert (options_of("sample") | batch) - {"-h", "--help"} <= described
    described = set(re.findall(r"`(--?\w+)", DOCUMENTS["docs/evaluation.md"]))
    assert options_of("evaluate") - {"-h", "--help"} <= described


def known_keys_in_documented_order() -> list[str]:
    """Those of the document in its own order, so that a missing or a wrong one shows in the comparison."""
    documented = first_cells("docs/training.md", "Every key")
    known = known_keys()
    return [key for key in documented if key in known] + [key for key in known if key not in documented]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_a_yaml_block_is_a_config(block):
    least = {"model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_len": 8}, "data": {"train": "x"},
             "train": {"global_batch_size": 1, "micro_batch_size": 1, "num_steps": 1, "out": "x"},
             "optimizer": {"learning_rate": 1e-3}}  # fmt: skip
    config_from_dict(least | parse_yaml(block.text, str(block)))


def test_tables_name_what_the_code_has():
    from dlm_scale.data.hub import RECIPES
    from dlm_scale.diffusion.schedule import SCHEDULES
    from dlm_scale.diffusion.weighting import WEIGHTINGS
    from dlm_scale.prepare import OPTIONS
    from dlm_scale.sampling import SAMPLERS

    assert first_cells("docs/data.md", "Recipes") == list(RECIPES)
    rows = dict(re.findall(r"^\| `--(\w+)` \| `(\w+)` \|", section("docs/data.md", "At scale"), re.MULTILINE))
    assert rows == {name: option.variable for name, option in OPTIONS.items() if option.variable}

    assert sorted(first_cells("docs/sampling.md", "The samplers")) == sorted(SAMPLERS)
    assert sorted(first_cells("docs/maths.md", "Schedules")) == sorted(SCHEDULES)
    estimators = first_cells("docs/maths.md", "Three equivalent estimators, and one that is not")
    assert sorted(estimators) == sorted(WEIGHTINGS)


def test_the_design_names_what_the_code_has():
    from dlm_scale.checkpoint.layout import LogicalTensor, Piece
    from dlm_scale.diffusion.corruption import Corrupted
    from dlm_scale.diffusion.rng import Stream
    from dlm_scale.engine.state import TrainState
    from dlm_scale.ops import Blocks, Causal, Full, Segments
    from dlm_scale.parallel.layers import LocalLayers

    def fields(kind) -> list[str]:
        return [field.name for field in dataclasses.fields(kind)]

    design = DOCUMENTS["docs/design.md"]
    assert first_cells("docs/design.md", "1. `Corrupted` (diffusion/corruption.py)") == fields(Corrupted)
    pieces = "5. `LogicalTensor(name, slot, shape, dtype)` and its pieces (checkpoint/layout.py)"
    assert first_cells("docs/design.md", pieces) == fields(Piece)
    for kind in (LogicalTensor, TrainState, Full, Causal, Segments, Blocks):
        assert f"{kind.__name__}({', '.join(fields(kind))})" in design
    layers = {name for name in dir(LocalLayers) if not name.startswith("_")}
    assert set(first_cells("docs/design.md", "Two more values")) == layers
    rows = re.findall(r"^\| ([A-Z_]+) \| (\d+) \|", section("docs/design.md", "Randomness: one counter table"), re.M)
    assert {name: int(number) for name, number in rows} == dict(Stream.__members__)


def test_the_design_names_every_room():
    rooms = " ".join(first_cells("docs/design.md", "Rooms, and who may import whom"))
    for path in (ROOT / "dlm_scale").iterdir():
        if path.is_dir() and path.name != "__pycache__" or path.suffix == ".py" and path.name != "__init__.py":
            assert path.name in rooms, f"{path.name} is missing in docs/design.md"

"""The house rules of docs/design.md, checked over the sources: who may import whom, and what no file may do."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dlm_scale"
BASE = {"errors"}
MAINS = {
    "cli", "prepare", "train", "sample", "sample_batch", "evaluate", "inference", "doctor", "quickstart", "plots", "plan",
    "lm_eval_model", "slurm", "preflight",
}
ALLOWED = {  # room -> the rooms it may import, beside itself
    "__init__": set(),
    "errors": set(),
    "deepspeed_keys": set(),
    "config_text": BASE,
    "config_compare": BASE | {"config"},
    "config_sections": set(),
    "config_checks": {"config_sections", "config"},
    "config": BASE | {"config_text", "config_sections", "config_checks", "deepspeed_keys"},
    "diffusion": set(),
    "kernels": set(),
    "data": BASE | {"diffusion.rng", "diffusion.segments"},
    "ops": BASE | {"kernels"},
    "parallel": BASE,
    "model": BASE | {"ops", "parallel", "diffusion"},
    "sampling": BASE | {"diffusion"},
    "checkpoint": BASE | {"parallel", "model"},
    "hub": BASE | {"model", "ops", "parallel", "sampling"},
    "convert": BASE | {"config", "config_text", "data", "model", "parallel", "checkpoint"},
    "engine": BASE
    | {"config", "config_compare", "diffusion", "data", "kernels", "ops", "parallel", "model", "sampling", "checkpoint"}
    | {"plots"},
    "evaluation": BASE
    | {"config", "diffusion", "data", "ops", "parallel", "model", "sampling", "checkpoint", "plots", "engine"},
}
EXTERNAL = {  # rooms whose outside imports are limited, beside the standard library
    "errors": set(),
    "deepspeed_keys": set(),
    "config_text": {"yaml"},
    "config_sections": {"pydantic", "pydantic_core"},
    "config_checks": set(),
    "config": {"pydantic", "pydantic_core"},
    "diffusion": {"torch", "numpy"},
    "kernels": {"torch", "triton"},
    "cli": set(),
}
DISTRIBUTED = {"megatron", "deepspeed"}
MAY_IMPORT_DISTRIBUTED = {"parallel", "engine"}
MAX_LINES = 500


def product_files() -> list[Path]:
    folders = [PACKAGE, ROOT / "kernels", ROOT / "tools", ROOT / "benchmarks"]
    files = [p for folder in folders if folder.is_dir() for p in sorted(folder.rglob("*.py"))]
    return [p for p in files if PACKAGE / "kernels" not in p.parents]


def module_parts(path: Path) -> list[str]:
    """('engine', 'loop') of dlm_scale/engine/loop.py; the real kernels/ counts as dlm_scale/kernels."""
    base = PACKAGE if PACKAGE in path.parents else ROOT
    return list(path.relative_to(base).with_suffix("").parts)


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(absolute module, line) of every import statement, inside functions too; `from a import b` gives a.b."""
    package = ["dlm_scale", *module_parts(path)[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def is_ours(parts: list[str]) -> bool:
    """Whether dlm_scale.a.b names a module or package, not a name inside one."""
    path = PACKAGE.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def rooms_imported(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted module below dlm_scale, line) of every import of our own."""
    for module, line in imported(path, tree):
        top, *parts = module.split(".")
        if top == "dlm_scale":
            while parts and not is_ours(parts):
                parts.pop()
            yield ".".join(parts) or "__init__", line


def may_import(room: str, target: str) -> bool:
    if room in MAINS or room in ("tools", "benchmarks"):
        return True
    allowed = ALLOWED[room] | {room} | ({"__init__"} if room not in ("diffusion", "kernels") else set())
    return any(target == name or target.startswith(name + ".") for name in allowed)


def violations(path: Path, source: str) -> list[str]:
    """Everything in one file that the rules forbid, as `file:line: what`."""
    tree, room = ast.parse(source), module_parts(path)[0]
    where = path.relative_to(ROOT)
    found = [
        f"{where}:{line}: {room} may not import {target}"
        for target, line in rooms_imported(path, tree)
        if not may_import(room, target)
    ]
    for module, line in imported(path, tree):
        top = module.split(".")[0]
        if top == "dlm_scale" or top in sys.stdlib_module_names:
            continue
        if room in EXTERNAL and top not in EXTERNAL[room]:
            found.append(f"{where}:{line}: {room} may not import {top}")
        if top in DISTRIBUTED and room not in MAY_IMPORT_DISTRIBUTED:
            found.append(f"{where}:{line}: only {sorted(MAY_IMPORT_DISTRIBUTED)} import {top}")
    found += [f"{where}:{line}: {what}" for line, what in unsafe(tree)]
    return found


def top_level(tree: ast.Module) -> ast.Module:
    """The module's statements that run when it is imported."""
    return ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])


def is_heavy(path: Path, tree: ast.Module) -> bool:
    """Whether importing this module imports megatron or deepspeed, which costs seconds."""
    return any(module.split(".")[0] in DISTRIBUTED for module, _ in imported(path, top_level(tree)))


def eager_imports(sources: dict[Path, str]) -> list[str]:
    """Imports of a heavy module from the top of another one: they belong inside functions."""
    trees = {path: ast.parse(source) for path, source in sources.items()}
    heavy = {".".join(module_parts(path)).removesuffix(".__init__") for path, t in trees.items() if is_heavy(path, t)}
    return [
        f"{path.relative_to(ROOT)}:{line}: eager import of {target}"
        for path, tree in trees.items()
        if not is_heavy(path, tree)
        for target, line in rooms_imported(path, top_level(tree))
        if any(target == name or target.startswith(name + ".") for name in heavy)
    ]


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
FORBIDDEN_TRUE = {"shell", "allow_pickle", "trust_remote_code"}


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What could execute a file's content, and `global`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield node.lineno, f"calls {name}"
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_TRUE and getattr(keyword.value, "value", None) is True:
                    yield node.lineno, f"passes {keyword.arg}=True"
        elif isinstance(node, ast.Global):
            yield node.lineno, "uses `global`"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {n}") for n in names if n.split(".")[0] in FORBIDDEN_MODULES)


@pytest.mark.parametrize("path", product_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_keeps_the_house_rules(path):
    source = path.read_text(encoding="utf-8")
    assert violations(path, source) == []
    assert source.count("\n") <= MAX_LINES
    assert not [word for word in ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error") if word in source]


def test_megatron_and_deepspeed_are_loaded_only_when_they_are_needed():
    assert eager_imports({path: path.read_text(encoding="utf-8") for path in product_files()}) == []


def test_the_check_sees_an_eager_import():
    sources = {
        PACKAGE / "parallel" / "mesh.py": "from megatron.core import parallel_state",
        PACKAGE / "train.py": "from dlm_scale.parallel.mesh import x",
        PACKAGE / "sample.py": "def f():\n    from dlm_scale.parallel import mesh",
    }
    assert eager_imports(sources) == ["dlm_scale/train.py:1: eager import of parallel.mesh"]


def test_every_room_has_a_rule():
    rooms = {module_parts(path)[0] for path in product_files() if PACKAGE in path.parents}
    assert rooms <= set(ALLOWED) | MAINS


def test_the_rules_hold_no_circle():
    def reaches(room: str, target: str, seen: frozenset = frozenset()) -> bool:
        nexts = {name.split(".")[0] for name in ALLOWED[room]} - {room} - seen
        return target in nexts or any(reaches(name, target, seen | {room}) for name in nexts if name in ALLOWED)

    assert [room for room in ALLOWED if reaches(room, room)] == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("dlm_scale/diffusion/x.py", "from dlm_scale.config import Config", "diffusion may not import config"),
        ("dlm_scale/diffusion/x.py", "def f():\n    import scipy", "diffusion may not import scipy"),
        ("dlm_scale/diffusion/x.py", "import dlm_scale", "diffusion may not import __init__"),
        ("dlm_scale/data/x.py", "from dlm_scale.diffusion import rng, schedule", "may not import diffusion.schedule"),
        ("dlm_scale/model/x.py", "def f():\n    from ..engine import loop", "model may not import engine"),
        ("dlm_scale/checkpoint/x.py", "def f():\n    import deepspeed", "only ['engine', 'parallel'] import deepspeed"),
        ("kernels/x.py", "from dlm_scale.ops import Full", "kernels may not import ops"),
        ("dlm_scale/data/x.py", "import pickle", "imports pickle"),
        ("dlm_scale/data/x.py", "np.load(f, allow_pickle=True)", "passes allow_pickle=True"),
        ("dlm_scale/data/x.py", "x = torch.load(f)", "calls torch.load"),
    ],
)
def test_the_check_sees_a_breach(file, source, complaint):
    assert any(complaint in line for line in violations(ROOT / file, source))


def test_the_check_passes_what_is_allowed():
    source = "from dlm_scale.diffusion.rng import Stream\nfrom dlm_scale.errors import UsageError\nmodel.eval()\n"
    assert violations(PACKAGE / "data" / "x.py", source) == []


def test_kernels_is_a_link_and_no_package():
    link = PACKAGE / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()

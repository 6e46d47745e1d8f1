"""The classes of hub/ with all modules that they need, as flat files that import one another: what lets an export load
with `trust_remote_code` where this project is not installed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
TASK = "text-diffusion"
ROOTS = {  # module -> its file in an export; the others are named after their modules
    "hub.configuration": "configuration_dlm_scale",
    "hub.modeling": "modeling_dlm_scale",
    "hub.pipeline": "pipeline_dlm_scale",
}
ENTRY_POINTS = {  # of config.json
    "architectures": ["DlmScaleForMaskedLM"],
    "auto_map": {
        "AutoConfig": "configuration_dlm_scale.DlmScaleConfig",
        "AutoModelForMaskedLM": "modeling_dlm_scale.DlmScaleForMaskedLM",
    },
    "custom_pipelines": {
        TASK: {"impl": "pipeline_dlm_scale.TextDiffusionPipeline", "pt": ["AutoModelForMaskedLM"], "type": "text"},
    },
}
IMPORT = re.compile(r"^( *)from (?:dlm_scale\.?|(\.))([\w.]*) import (\w+|\([^)]*\)|[^\n(]+)$", re.MULTILINE)
MODULE_VALUE = "MODULE"  # a bundled file's own module, for those that import it whole


def bundle_files() -> dict[str, bytes]:
    """File name -> content."""
    files: dict[str, bytes] = {}
    waiting = list(ROOTS)
    while waiting:
        module = waiting.pop()
        name = f"{file_of(module)}.py"
        if name not in files:
            text, needed = rewritten(module, _source(module).read_text(encoding="utf-8"))
            files[name] = text.encode()
            waiting += needed
    return dict(sorted(files.items()))


def file_of(module: str) -> str:
    return ROOTS.get(module, "dlm_scale_" + module.replace(".", "_"))


def rewritten(module: str, source: str) -> tuple[str, list[str]]:
    """A module's text with imports of this package made relative and flat; and the modules that it so needs.

    An import inside a function is one of an optional part (sharded layers), which an export does not have.
    """
    needed: list[str] = []

    def replace(match: re.Match[str]) -> str:
        indent, is_relative, target, names = match.groups()
        if is_relative:
            target = ".".join([*module.split(".")[:-1], target])
        if indent:
            return f'{indent}raise ImportError("dlm_scale.{target} is not part of an export: install dlm_scale")'
        if not target:  # from dlm_scale import ops
            needed.append(names)
            return f"from .{file_of(names)} import {MODULE_VALUE} as {names}"
        needed.append(target)
        return f"from .{file_of(target)} import {names}"

    text = IMPORT.sub(replace, source)
    ast.parse(text)
    return f"{text}\n\nimport sys as _sys  # noqa: E402\n\n{MODULE_VALUE} = _sys.modules[__name__]\n", needed


def _source(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")

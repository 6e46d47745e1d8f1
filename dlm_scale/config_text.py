"""Texts to plain values and back: YAML as configs use it, and dotted overrides. Nothing in a text is ever executed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from dlm_scale.errors import UsageError

_SCALARS = (  # YAML 1.2's core schema: `3e-4` is a number; `off`, `no` and dates are text
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9](?:_?[0-9])*", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9](?:_?[0-9])*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2 scalars, without aliases, and without repeated keys."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r:.40} is not a text", problem_mark=key.start_mark)
            if names.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=deep)

    def construct_whole(self, node):
        """An int without YAML 1.1's octal and base-60 readings."""
        return int(node.value.replace("_", ""))

    def construct_number(self, node):
        """A float; one in whole scientific notation (5e8) is an int, as it is written for counts."""
        text = node.value.replace("_", "").lower()
        value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
        return int(value) if "." not in text and value.is_integer() else value


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader`, or a YAML 1.1 reader, would take for something else."""

    def ignore_aliases(self, data):
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text (1.2 scalars). Raises UsageError naming `source` and the place."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{source}{place}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UsageError(f"{source}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UsageError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text that `parse_yaml` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


_OVERRIDE = re.compile(r"(?:--)?([A-Za-z_][\w-]*(?:\.[\w-]+)*)(?:=(.*))?", re.DOTALL)
_LAUNCHER = re.compile(r"--local[-_]rank(=\d+)?")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """{dotted key: value} of `a.b=c`, `--a.b=c` and `--a.b c`; values are YAML. The launcher's --local_rank is skipped.

    Raises UsageError for anything else.
    """
    settings: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if launcher := _LAUNCHER.fullmatch(argument):
            if launcher[1] is None:
                next(rest, None)
            continue
        match = _OVERRIDE.fullmatch(argument)
        if match is None or (match[2] is None and not argument.startswith("--")):
            raise UsageError(f"{argument!r} on the command line is not an override: write section.key=value")
        key, text = match[1].replace("-", "_"), match[2]
        if text is None:
            text = next(rest, "--")
            if text.startswith("--"):
                raise UsageError(f"{argument} on the command line has no value: write {key}=value")
        settings[key] = parse_yaml(text, f"{key} on the command line")
    return settings


def assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings. Raises UsageError where the path leads through something else."""
    *parents, last = key.split(".")
    section = raw
    for depth, name in enumerate(parents):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            owner = ".".join(parents[: depth + 1])
            raise UsageError(f"{key} on the command line: {owner} is not a mapping; set {owner}=... as a whole")
    section[last] = value

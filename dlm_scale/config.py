"""The typed config of a run: YAML, dotted overrides, and errors that name the key, the cause and the remedy.

Its sections stand in config_sections.py, what no single key shows in config_checks.py.

Every quantity has one owner here; DeepSpeed's own section is passed through, less what is owned here. Only the
standard library, pydantic and yaml are imported, so that a wrong config is refused at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dlm_scale.config_checks import Problem, batch_text, cross_problems
from dlm_scale.config_sections import (
    DataConfig,
    DiffusionConfig,
    GaussianConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    Section,
    TrainConfig,
)
from dlm_scale.config_text import assign, dump_yaml, parse_overrides, parse_yaml
from dlm_scale.deepspeed_keys import closest, deepspeed_problems, unknown_key_text
from dlm_scale.errors import UsageError

MAX_SHOWN_PROBLEMS = 5


def _raise_if(problems: list[Problem]) -> None:
    if problems:
        raise PydanticCustomError("problems", "{text}", {"text": "; ".join(map(" ".join, problems)), "all": problems})


def _checked_deepspeed(section: dict[str, Any]) -> dict[str, Any]:
    _raise_if(deepspeed_problems(section))
    zero = section.get("zero_optimization", {})
    return {**section, "zero_optimization": {"stage": 0, **zero}}


class Config(Section):
    """The whole config of a run; `load_config` makes it."""

    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    gaussian: GaussianConfig = Field(default_factory=GaussianConfig)
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: Annotated[dict[str, Any], AfterValidator(_checked_deepspeed)] = Field({}, validate_default=True)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        config = _batch_in_rows(self)
        _raise_if(list(cross_problems(config)))
        config.model._gaussian = config.gaussian if config.objective.kind == "gaussian" else None
        return config


def _batch_in_rows(config: Config) -> Config:
    """train.total_batch_size is another way to say train.global_batch_size: only the latter is left."""
    tokens, length = config.train.total_batch_size, config.model.seq_len
    if tokens is None:
        return config
    if tokens % length:
        near = " or ".join(str(rows * length) for rows in (tokens // length, tokens // length + 1) if rows)
        text = f"= {tokens} tokens are no whole number of rows of model.seq_len = {length}: set {near}"
        _raise_if([("train.total_batch_size", text)])
    rows = {"total_batch_size": None, "global_batch_size": tokens // length}
    return config.model_copy(update={"train": config.train.model_copy(update=rows)})


def resolve_batch(config: Config, data_parallel_size: int) -> int:
    """Micro-batches that each data-parallel rank accumulates for one step.

    Raises UsageError, with the equation and the three nearest valid settings, where it does not divide.
    """
    unit = config.train.micro_batch_size * data_parallel_size
    if config.train.global_batch_size % unit:
        raise UsageError(f"train.global_batch_size {batch_text(config.train, data_parallel_size)}")
    return config.train.global_batch_size // unit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path("configs")
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1)
        raise UsageError(f"config {path} not found" + (f"; did you mean {folder / near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read config {path}: {error}") from None


def _sections(text: str, source: str) -> dict[str, Any]:
    raw = parse_yaml(text, source)
    if not isinstance(raw, dict):
        raise UsageError(f"{source} is no config: expected the sections {', '.join(Config.model_fields)}")
    return raw


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with dotted overrides applied, checked and resolved.

    Raises UsageError with one line for each thing that is wrong (at most five), naming key, source and remedy.
    """
    raw = _sections(_read(Path(path)), str(path))
    settings = parse_overrides(overrides)
    for key, value in settings.items():
        assign(raw, key, value)
    return config_from_dict(raw, str(path), tuple(settings))


def config_from_dict(raw: Mapping[str, Any], source: str = "the config", command_line: Sequence[str] = ()) -> Config:
    """A checked Config of plain values. `command_line` lists the dotted keys to blame on it instead of on `source`."""
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        problems = [problem for item in error.errors() for problem in _problems_of(item, command_line)]
    lines = [f"{key} ({_origin(key, command_line) or source}) {text}" for key, text in problems]
    if len(lines) > MAX_SHOWN_PROBLEMS:
        lines[MAX_SHOWN_PROBLEMS - 1 :] = [f"and {len(lines) - MAX_SHOWN_PROBLEMS + 1} more"]
    raise UsageError("\n".join(lines))


def config_from_text(text: str, source: str, sections: Mapping[str, Any] | None = None) -> Config:
    """The config of a saved config.yaml's text, with other sections in the place of its own."""
    return config_from_dict(_sections(text, source) | dict(sections or {}), source)


def _origin(key: str, command_line: Sequence[str]) -> str | None:
    """`command line` where a key given there sets `key`, or a part of it."""
    for given in command_line:
        if key == given or key.startswith((given + ".", given + "[")) or given.startswith(key + "."):
            return "command line"
    return None


def _problems_of(item: dict[str, Any], command_line: Sequence[str]) -> list[Problem]:
    """What one pydantic error says, in our words."""
    kind, loc = item["type"], item["loc"]
    if kind == "problems":
        return [tuple(problem) for problem in item["ctx"]["all"]]
    if kind == "default_factory_not_called":  # follows from another error
        return []
    key = _dotted(loc)
    if kind == "extra_forbidden":
        typed = next((given for given in command_line if given.startswith(key + ".")), key)
        return [(typed, _unknown_text(loc, typed[len(key) :]))]
    if kind == "missing":
        return [(key, "is missing: it has no default")]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [(key, f"is {item['input']!r:.60}: expected a mapping of keys to values")]
    expected = item["msg"].replace("Input should be", "expected").replace("valid string", "text")
    return [(key, f"is {item['input']!r:.60}: {expected}{_choice_hint(item)}")]


def _choice_hint(item: dict[str, Any]) -> str:
    choices = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
    guess = closest(item["input"], choices) if isinstance(item["input"], str) else None
    return f"; did you mean {guess}?" if guess else ""


def _dotted(loc: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _unknown_text(loc: Sequence[str | int], tail: str) -> str:
    """Suggests a key of the same section, or else another section's of that name. `tail` is what was typed below."""
    *parents, name = loc
    valid, parent = list(_section_at(parents).model_fields), _dotted(parents)
    if guess := closest(str(name), valid):
        hint = _dotted([*parents, guess]) + tail
    else:
        hint = next((key for key in known_keys() if key.endswith(f".{name}")), None)
    return unknown_key_text(str(name), parent, valid, hint)


def _section_at(parents: Sequence[str | int]) -> type[Section]:
    section: Any = Config
    for part in parents:
        annotation = section.model_fields[part].annotation if isinstance(part, str) else section
        section = (get_args(annotation) or (annotation,))[0]
    return section


def known_keys() -> list[str]:
    """Every dotted key of our own sections."""
    sections = {n: f.annotation for n, f in Config.model_fields.items() if n != "deepspeed"}
    return [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]


def dump_config(config: Config) -> str:
    """The resolved config as YAML text; `load_config` reads it back to an equal Config."""
    return dump_yaml(config.model_dump(mode="json"))

"""Packages that only some inputs need."""

from __future__ import annotations

import importlib
from typing import Any

from dlm_scale.errors import UsageError


def import_optional(name: str, needed_by: str) -> Any:
    """The module `name`, imported now. Raises UsageError that says what needs it and how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{needed_by} needs a package that is absent: pip install {name.split('.')[0]}") from error

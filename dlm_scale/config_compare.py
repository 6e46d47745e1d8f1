"""What differs between two configs, and whether a run may be continued with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_scale.config import Config

RESULT_NEUTRAL = (
    "parallel",
    "deepspeed",
    *("data." + key for key in "train validation synthetic_vocab_size prepare".split()),  # compared by content
    *(
        "train." + key
        for key in "micro_batch_size activation_checkpoint_every log_every eval_every eval_rows eval_draws save_every "
        "keep_last keep_every async_save out resume branch_from stop_at_step compile max_bad_steps "
        "hang_timeout_seconds wandb device".split()
    ),
)


def config_difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of everything that differs."""
    before, after = (dict(_flat(config.model_dump(mode="json"))) for config in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def is_result_neutral(key: str) -> bool:
    """Whether a run may be continued with another value of this key and still compute the same model."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in RESULT_NEUTRAL)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

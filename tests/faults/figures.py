"""What a fault campaign reports: how many cases there were, how many ended well, and how each of the others ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """`failures`: one line a failed case. `notes`: further measurements, name -> value."""

    total: int
    failures: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def passed(self) -> int:
        return self.total - len(self.failures)

    def __str__(self) -> str:
        return f"{self.passed}/{self.total}"

    def __add__(self, other: Figure) -> Figure:
        return Figure(self.total + other.total, self.failures + other.failures, self.notes + other.notes)


def figure(outcomes: Iterable[str | None], **notes: object) -> Figure:
    """Of one outcome a case: None where it ended well, else what went wrong."""
    outcomes = list(outcomes)
    return Figure(len(outcomes), tuple(o for o in outcomes if o), tuple((k, str(v)) for k, v in notes.items()))

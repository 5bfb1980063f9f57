"""The limits that `make bench` checks, each with what was measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.tables import print_table


class Goal(NamedTuple):
    """A limit, and what was measured; None: nothing was, since a peer or the compiled build is missing."""

    name: str
    limit: float
    unit: str
    measured: float | None

    @property
    def is_met(self) -> bool:
        """Whether the limit holds."""
        return self.measured is not None and self.measured <= self.limit


def print_goals(goals: Sequence[Goal]) -> None:
    """Print the table as in docs/performance.md."""
    rows = [
        [
            goal.name,
            f"≤ {_figure(goal.limit, goal.unit)}",
            "not measured" if goal.measured is None else _figure(goal.measured, goal.unit),
            "met" if goal.is_met else "**not met**",
        ]
        for goal in goals
    ]
    print_table(["limits", "", "measured", ""], rows)


def _figure(value: float, unit: str) -> str:
    digits = 0 if unit == "bytes" or abs(value) >= 100 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()

"""Text tables that fit the terminal where possible.

A table that is too wide first loses columns that are empty in every row, then free text (names, scopes, errors) is
truncated. Ids, times and numbers are never truncated: a partial one is worse than a line that wraps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

NOTHING: Final = "-"
EMPTY: Final = "none"

_GAP: Final = "  "
_CUT: Final = "…"
_PROSE: Final = frozenset(
    {"name", "scopes", "roles", "detail", "last_error", "changed", "revoke_reason", "suspend_reason", "route"}
)
_PROSE_CHARACTERS_MIN: Final = 8


def lines(
    rows: Sequence[Sequence[str]], columns: Sequence[str], width: int | None, units: Mapping[str, str] | None = None
) -> list[str]:
    """The lines of a table with its heading. `width`: columns of the terminal; None: not a terminal.

    `units`: of columns with numbers, for the heading.
    """
    heading = [_heading(column, (units or {}).get(column)) for column in columns]
    chosen = list(range(len(columns)))
    if width is not None and _width(rows, heading, chosen) > width:
        chosen = [place for place in chosen if not rows or any(row[place] != NOTHING for row in rows)]
    widths = {place: _column_width(rows, heading, place) for place in chosen}
    for place in sorted((one for one in chosen if columns[one] in _PROSE), key=lambda one: -widths[one]):
        over = 0 if width is None else sum(widths.values()) + len(_GAP) * (len(widths) - 1) - width
        if over > 0:
            widths[place] = max(min(widths[place], _PROSE_CHARACTERS_MIN), widths[place] - over)
    return [
        _GAP.join(_cut(line[place], widths[place]).ljust(widths[place]) for place in chosen).rstrip()
        for line in (heading, *rows)
    ]


def _heading(column: str, unit: str | None) -> str:
    name = column.upper().replace("_", " ")
    return f"{name} ({unit})" if unit else name


def _width(rows: Sequence[Sequence[str]], heading: Sequence[str], chosen: Sequence[int]) -> int:
    return sum(_column_width(rows, heading, place) for place in chosen) + len(_GAP) * (len(chosen) - 1)


def _column_width(rows: Sequence[Sequence[str]], heading: Sequence[str], place: int) -> int:
    return max(len(heading[place]), *(len(row[place]) for row in rows), 0)


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else cell[: width - len(_CUT)].rstrip() + _CUT

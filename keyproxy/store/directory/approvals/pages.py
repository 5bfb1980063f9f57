"""Pages of lists that have the newest first, with cursors of time and id."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from keyproxy.store.directory.errors import Invalid
from keyproxy.store.postgres.database import Row
from keyproxy.store.postgres.times import FarTime, Instant, decoded_instant, encoded_instant

#: Beyond every row.
_START: Final = (FarTime("infinity", 2**63 - 1), "")


def position(cursor: str | None) -> tuple[Instant, str]:
    """The time and the id after which a page begins. Raises Invalid."""
    if cursor is None:
        return _START
    count, separator, row_id = cursor.partition("/")
    digits = count.removeprefix("-")
    if not (separator and row_id and digits.isascii() and digits.isdecimal() and abs(int(digits)) < 2**63):
        raise Invalid(f"invalid cursor {cursor!r}")
    return decoded_instant((int(count),)), row_id


def next_cursor(rows: Sequence[Row], limit: int) -> str | None:
    """The cursor of the page after these rows; None if they are the last ones."""
    if not len(rows) == limit > 0:
        return None
    created_at: datetime | FarTime = rows[-1]["created_at"]
    return f"{encoded_instant(created_at)[0]}/{rows[-1]['id']}"

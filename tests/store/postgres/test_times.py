"""Times and dates are compared with PostgreSQL's own arithmetic; JSON may contain numbers of any size."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from keyproxy.store.postgres.connecting import Connector
from keyproxy.store.postgres.json_values import read_json
from keyproxy.store.postgres.times import (
    FIRST_DAY,
    FarTime,
    day_text,
    decoded_day,
    decoded_instant,
    encoded_day,
    encoded_instant,
    time_text,
)


@pytest.mark.parametrize(
    "instant",
    [
        "2000-01-01 00:00:00+00", "1999-12-31 23:59:59.999999+00", "0001-01-01 00:00:00+00",
        "9999-12-31 23:59:59.999999+00", "10000-01-01 00:00:00+00", "0001-12-31 23:59:59.999999+00 BC",
        "4714-11-24 00:00:00+00 BC", "294276-12-31 23:59:59.999999+00", "275760-09-13 00:00:00+00",
        "0401-02-29 12:00:00+00 BC", "12000-02-29 01:02:03+00", "infinity", "-infinity",
    ],
)  # fmt: skip
async def test_time_matches_postgresql_and_round_trips(dsn: str, instant: str) -> None:
    connection = await Connector(dsn).connect(command_seconds=5.0)
    row = await connection.fetchrow(
        "SELECT t.at, (t.at AT TIME ZONE 'UTC')::date AS day, extract(year FROM t.at) AS year,"
        ' to_char(t.at, \'MM-DD"T"HH24:MI:SS"Z"\') AS rest, isfinite(t.at) AS is_finite'
        " FROM (SELECT $1::text::timestamptz AS at) AS t",
        instant,
    )
    assert row is not None
    assert await connection.fetchval("SELECT $1::timestamptz = $2::text::timestamptz", row["at"], instant)
    assert await connection.fetchval("SELECT $1::date = ($2::text::timestamptz)::date", row["day"], instant)
    await connection.close()
    text, day = time_text(row["at"]), day_text(row["day"])
    assert text is not None
    assert day is not None
    if not row["is_finite"]:
        assert text == day == instant
        return
    # PostgreSQL has no year 0: 1 BC is its year -1.
    year = int(row["year"]) + (int(row["year"]) < 0)
    assert text.endswith(row["rest"])
    assert int(text[: text.index("-", 1)]) == year
    assert text.startswith(f"{day}T")


def test_times_within_python_s_range_are_datetimes() -> None:
    assert decoded_instant((0,)) == datetime(2000, 1, 1, tzinfo=UTC)
    assert decoded_day((0,)) == date(2000, 1, 1)
    assert encoded_day(date(1999, 12, 31)) == (-1,)
    assert day_text(date(2026, 1, 2)) == "2026-01-02"
    assert time_text(None) is day_text(None) is None
    assert time_text(datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC), "milliseconds") == "2026-01-02T03:04:05.678Z"
    for encode in (encoded_day, encoded_instant):
        with pytest.raises(TypeError):
            encode("2026-01-01")


def test_days_beyond_python_s_calendar() -> None:
    assert decoded_day((2**31 - 1,)) == FarTime("infinity", 2**31 - 1)
    assert decoded_day((-(2**31),)) == FIRST_DAY
    far = decoded_day((100_000_000,))
    assert encoded_day(far) == (100_000_000,)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-9223372036854775807", -9223372036854775807), ("9223372036854775808", "9223372036854775808"),
        ("1e400", "1e400"), ("1.5", 1.5), ("9" * 5_000, "9" * 5_000),
        ('{"a": [null, true, "x"]}', {"a": [None, True, "x"]}),
    ],
)  # fmt: skip
def test_json_is_read_with_any_numbers(text: str, value: object) -> None:
    assert read_json(text) == value

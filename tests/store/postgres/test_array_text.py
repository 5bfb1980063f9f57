"""PostgreSQL reads an array's text as the values that it was made of."""

from __future__ import annotations

from datetime import date

import pytest

from keyproxy.store.postgres.array_text import array_text
from tests.store.harness import Sql


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        ["a", "b"],
        ["NULL", "null", " a ", "a,b", "{a}", "{", "}"],
        ['"', "\\", '\\"', "\\\\n", 'a"b', "'", "$1"],
        ["a\nb\tc\r", "\x01\x1f\x7f", "é ü 漢 😀", "\u2028"],
        ["\\", "plain", "é\n", "NULL", ","],
    ],
)
async def test_text_arrives_unchanged(sql: Sql, values: list[str]) -> None:
    assert await sql.fetchval("SELECT $1::text::text[]", array_text(values)) == values


@pytest.mark.parametrize("values", [[], [0], [1, -1, 10**12], [2**63 - 1, -(2**63)]])
async def test_integers_arrive_unchanged(sql: Sql, values: list[int]) -> None:
    assert await sql.fetchval("SELECT $1::text::int8[]", array_text(values)) == values


async def test_booleans_and_dates_arrive_unchanged(sql: Sql) -> None:
    assert await sql.fetchval("SELECT $1::text::bool[]", array_text([True, False])) == [True, False]
    days = [date(2026, 1, 31), date(1999, 12, 1)]
    assert await sql.fetchval("SELECT $1::text::date[]", array_text(days)) == days

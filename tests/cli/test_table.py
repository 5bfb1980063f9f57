"""Tables fit a terminal where that loses little, and never truncate values that must be copied."""

from __future__ import annotations

import pytest

from keyproxy.cli import table
from keyproxy.cli.output import print_result

COLUMNS = ("id", "name", "plan", "expires_at")
ROWS = [
    ["key_1", "a name that somebody wrote at length", "-", "2026-01-31T12:00:00Z"],
    ["key_22", "short", "-", "2026-01-31T12:00:00Z"],
]


def test_output_that_is_not_a_terminal_is_not_truncated() -> None:
    shown = table.lines(ROWS, COLUMNS, None)
    assert shown[0] == "ID      NAME                                  PLAN  EXPIRES AT"
    assert shown[1] == "key_1   a name that somebody wrote at length  -     2026-01-31T12:00:00Z"
    assert table.lines(ROWS, COLUMNS, 72) == shown


@pytest.mark.parametrize("width", [71, 66, 60, 50, 40])
def test_a_terminal_gets_lines_that_fit(width: int) -> None:
    shown = table.lines(ROWS, COLUMNS, width)
    assert max(map(len, shown)) <= width
    assert "PLAN" not in shown[0], "an empty column is dropped first"
    assert shown[1].endswith("2026-01-31T12:00:00Z")
    assert ("…" in shown[1]) is (width < 66)


@pytest.mark.parametrize("width", [1, 30])
def test_ids_and_times_are_never_cut(width: int) -> None:
    shown = table.lines(ROWS, COLUMNS, width)
    assert shown[1].split() == ["key_1", "a", "name…", "2026-01-31T12:00:00Z"]
    assert shown[2].split() == ["key_22", "short", "2026-01-31T12:00:00Z"]


@pytest.mark.parametrize("width", [None, 10, 100])
def test_an_empty_table_is_its_heading(width: int | None) -> None:
    assert table.lines([], ("id", "user"), width) == ["ID  USER"]


def test_control_sequences_are_escaped_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "key_1", "name": "a\r\nb\x1b[2J\u202e\u00fc", "scopes": ["x\ty"]}
    print_result([row], as_json=False, columns=("id", "name", "scopes"))
    print_result(row, as_json=False, columns=())
    out = capsys.readouterr().out
    assert out.count("\n") == 2 + 3
    assert out.count("a\\r\\nb\\x1b[2J\\u202e\u00fc") == 2
    assert "x\\ty" in out

"""Every case of docs/tools.md does what the page shows: its configuration, commands, requests and responses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.conftest import Configure
from tests.acceptance.shown_cases import cases, play

CASES = dict(cases("tools.md"))


@pytest.mark.parametrize("heading", CASES)
async def test_case_of_the_tools_page_does_what_the_page_shows(
    configure: Configure, dsn: str, tmp_path: Path, heading: str
) -> None:
    await play(CASES[heading], configure(dsn), tmp_path / "shell")


def test_tools_page_has_a_case_for_each_kind_of_approval_a_provider_and_a_suspension() -> None:
    assert len(CASES) == 4
    shown = "".join(case.configuration for case in CASES.values())
    for word in ('approval = "consent"', 'approval = "human"', 'approval = "admin"', "[[providers]]", "[anomalies]"):
        assert word in shown, word

"""Run a command of manage.py as its process would run it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from django.core.management import ManagementUtility


class Done(NamedTuple):
    """The exit status of a command, and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """The JSON on stdout."""
        return json.loads(self.stdout)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Done:
    """Run `manage.py ARGUMENTS`."""
    capsys.readouterr()
    status = 0
    try:
        ManagementUtility(["manage.py", *arguments]).execute()
    except SystemExit as end:
        status = int(end.code or 0)
    return Done(status, *capsys.readouterr())

"""Which interpreters run the tests of the client, and what happens to rows without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from client.tests import environments, pythons


def interpreter(path: Path, version: str, status: int = 0) -> str:
    """A program that responds like an interpreter of this version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\nexit {status}\n", encoding="ascii")
    path.chmod(0o755)
    return str(path)


def test_interpreters_are_found_in_path_then_of_pyenv_the_newest_release_first(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path)}
    assert pythons.find("3.98", environment) is None
    interpreter(tmp_path / "pyenv/versions/3.98.9/bin/python3.98", "3.98")
    newest = interpreter(tmp_path / "pyenv/versions/3.98.10/bin/python3.98", "3.98")
    assert pythons.find("3.98", environment) == newest
    # A shim of pyenv without a version behind it fails.
    interpreter(tmp_path / "bin/python3.98", "", status=127)
    assert pythons.find("3.98", environment) == newest
    in_path = interpreter(tmp_path / "bin/python3.98", "3.98")
    assert pythons.find("3.98", environment) == in_path
    assert pythons.find("3.99", environment) is None


@pytest.mark.parametrize("separator", [" ", ",", ":"])
def test_named_interpreters_replace_the_search_and_named_versions_select_from_it(
    tmp_path: Path, separator: str
) -> None:
    named = interpreter(tmp_path / "mine", "3.98")
    found = interpreter(tmp_path / "bin/python3.99", "3.99")
    interpreter(tmp_path / "bin/python3.98", "3.98")
    environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path)}
    assert pythons.find("3.98", environment | {pythons.VARIABLE: named}) == named
    assert pythons.find("3.99", environment | {pythons.VARIABLE: named}) is None
    assert pythons.find("3.99", environment | {pythons.VARIABLE: f"{named}{separator}3.99"}) == found


def test_interpreter_that_runs_the_tests_is_found_under_any_name() -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    found = pythons.find(version, {"PATH": "", "PYENV_ROOT": "/nonexistent"})
    assert found is not None
    assert os.path.realpath(found) == os.path.realpath(sys.executable)


@pytest.mark.parametrize(("strict", "status"), [("", 0), ("0", 0), ("1", 1)])
def test_row_without_its_python_is_skipped_with_a_line_and_fails_if_that_is_strict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strict: str, status: int
) -> None:
    monkeypatch.setenv("CLIENT_STRICT", strict)
    monkeypatch.setenv(pythons.VARIABLE, "/nonexistent/python")
    assert environments.main(["djnew"]) == status
    assert capsys.readouterr().out == (
        "client djnew-3.13: skipped, no python3.13\nclient djnew-3.12: skipped, no python3.12\n"
    )


def test_unknown_row_is_an_error() -> None:
    with pytest.raises(SystemExit, match="there is no row dj99"):
        environments.main(["dj99"])

"""Which interpreters run the tests of the client, and what happens to rows without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.tests import environments, pythons
from client.tests.installation import Installation, NotInstalledError


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


def test_row_links_to_wheels_that_fit_its_python_and_has_their_commands(tmp_path: Path) -> None:
    """Without pip: all pinned wheels are there."""
    tag = f"cp3{sys.version_info.minor}"
    unpacked = tmp_path / "home" / "unpacked"
    for wheel, content in {
        "Pure.Name-1.0-py3-none-any": "def main(): print('pure')",
        "built-2.0-cp399-cp399-linux": "value = 'of another Python'",
        f"built-2.0-{tag}-{tag}-linux": "value = 'of this Python'",
        "stable-3-cp399-abi3-linux": "value = 'of a later Python'",
        "stable-3-cp32-abi3-linux": "value = 'of this and later ones'",
    }.items():
        name = wheel.partition("-")[0].partition(".")[0].lower()
        information = unpacked / wheel / f"{name}.dist-info"
        information.mkdir(parents=True)
        (unpacked / wheel / f"{name}.py").write_text(content, encoding="ascii")
        (information / "entry_points.txt").write_text(
            f"[console_scripts]\nrun-{name} = {name}:main\n", encoding="ascii"
        )
    pins = tmp_path / "client" / "requirements" / "env.txt"
    pins.parent.mkdir(parents=True)
    pins.write_text("# All of it.\nbuilt==2.0\npure-name==1.0\nstable==3\n", encoding="ascii")
    made = Installation(tmp_path / "client", tmp_path / "home").ensure("env-3", "env", sys.executable)
    script = "import built, stable; print(built.value, stable.value, sep=', ')"
    done = subprocess.run([made, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "of this Python, of this and later ones\n"
    done = subprocess.run([Path(made).parent / "run-pure"], capture_output=True, text=True, check=True)
    assert done.stdout == "pure\n"


def test_row_that_cannot_be_installed_fails_with_a_line_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(_: Installation, row: str, *rest: str) -> str:
        if row == "core-3.13":
            raise NotInstalledError("pip download failed: no network")
        return "true"

    monkeypatch.setattr(Installation, "ensure", ensure)
    monkeypatch.setattr(pythons, "find", lambda *_: sys.executable)
    assert environments.main(["core"]) == 1
    failed, *passed = sorted(capsys.readouterr().out.splitlines(), reverse=True)
    assert failed == "client core-3.13: failed, its packages cannot be installed: pip download failed: no network"
    assert [line.partition(":")[0] for line in passed] == ["client core-3.12", "client core-3.11"]

"""Finds the interpreters of the rows: in PATH, of pyenv, or those that CLIENT_PYTHONS names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

#: Instead of the search: paths of interpreters, or versions such as 3.12, separated by spaces, commas or colons.
VARIABLE = "CLIENT_PYTHONS"

_VERSION = re.compile(r"3\.\d+")
_PRINT_VERSION = "import sys, venv, ssl; print('%d.%d' % sys.version_info[:2])"


def find(version: str, environment: Mapping[str, str]) -> str | None:
    """A working interpreter of this version, such as "3.12". None if there is none."""
    named = [name for name in re.split(r"[\s,:]+", environment.get(VARIABLE, "")) if name]
    if named and version not in named:
        candidates: Iterator[str] = (name for name in named if not _VERSION.fullmatch(name))
    else:
        candidates = _installed(version, environment)
    return next((path for path in candidates if version_of(path) == version), None)


def version_of(python: str) -> str:
    """The version of an interpreter; empty if it does not work, like a shim of pyenv without a version behind it."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", _PRINT_VERSION], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _installed(version: str, environment: Mapping[str, str]) -> Iterator[str]:
    in_path = shutil.which(f"python{version}", path=environment.get("PATH", ""))
    if in_path:
        yield in_path
    root = Path(environment.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for home in sorted((root / "versions").glob(f"{version}.*"), key=_release, reverse=True):
        yield str(home / "bin" / f"python{version}")
    # The interpreter below the virtual environment that runs this, under whatever name it is installed.
    yield os.path.realpath(sys.executable)


def _release(home: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", home.name))

"""Installs the pinned packages of rows into `.venv-client/`, fast enough for each run of CI.

The pins are complete, so nothing is resolved. Each wheel is looked up on the index once: most are the same for all rows.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

#: Other wheels depend on the version of Python.
_PURE_WHEEL = "none-any.whl"

_QUIET = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")


class Installation:
    """The environments of the rows. Rows may be installed at the same time."""

    def __init__(self, client: Path, home: Path) -> None:
        """`client`: the folder of keyproxy-client; `home`: the folder for environments and wheels."""
        self._client = client
        self._home = home
        self._wheels = home / "wheels"
        self._downloading = threading.Lock()

    def ensure(self, row: str, environment: str, interpreter: str) -> str:
        """The interpreter of the row's environment, which is made if its pins or its Python have changed."""
        pins = self._client / "requirements" / f"{environment}.txt"
        home = self._home / row
        python, stamp = home / "bin" / "python", home / "ready"
        state = hashlib.sha256(f"{interpreter}\n{self._client}\n".encode() + pins.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text(encoding="ascii") == state and python.exists():
            return str(python)
        shutil.rmtree(home, ignore_errors=True)
        # pip of this environment installs into the other one.
        _run([interpreter, "-m", "venv", "--without-pip", str(home)])
        with self._downloading:
            self._download(python, pins)
        # Modules are compiled when they are first imported; most never are.
        _pip(python, "install", "--no-compile", "--no-index", "--find-links", str(self._wheels), "-r", str(pins))
        (packages,) = home.glob("lib/python*/site-packages")
        (packages / "keyproxy_client.pth").write_text(f"{self._client}\n", encoding="utf-8")
        stamp.write_text(state, encoding="ascii")
        return str(python)

    def _download(self, python: Path, pins: Path) -> None:
        """Download the wheels that are not there; those for one version of Python again, as pip decides which fit."""
        self._wheels.mkdir(parents=True, exist_ok=True)
        there = {_pin(wheel) for wheel in self._wheels.glob(f"*{_PURE_WHEEL}")}
        lines = pins.read_text(encoding="utf-8").splitlines()
        missing = [line for line in lines if line and not line.startswith("#") and _normal(line) not in there]
        if missing:
            _pip(python, "download", "--dest", str(self._wheels), *missing)


def _pin(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return _normal(f"{name}=={version}")


def _normal(pin: str) -> str:
    return re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() + "==" + pin.partition("==")[2]


def _pip(python: Path, command: str, *arguments: str) -> None:
    _run([sys.executable, "-m", "pip", "--python", str(python), command, *_QUIET, *arguments])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")

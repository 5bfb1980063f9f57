"""Installs the pinned packages of rows into `.venv-client/`, fast enough for each run of CI.

The pins are complete, so nothing is resolved. pip downloads each wheel once; most are the same for all rows. A wheel is
unpacked once, and the environments link to its contents, so that modules are also compiled once for each Python.
"""

from __future__ import annotations

import configparser
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path

_SCRIPT = """\
#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


class NotInstalledError(Exception):
    """An environment cannot be made: why, in one line."""


class Installation:
    """The environments of the rows. Rows may be installed at the same time."""

    def __init__(self, client: Path, home: Path) -> None:
        """`client`: the folder of keyproxy-client; `home`: the folder for environments and wheels."""
        self._client = client
        self._home = home
        self._wheels = home / "unpacked"
        self._downloading = threading.Lock()

    def ensure(self, row: str, environment: str, interpreter: str) -> str:
        """The interpreter of the row's environment, which is made if its pins or its Python have changed."""
        pins = self._client / "requirements" / f"{environment}.txt"
        home = self._home / row
        python, stamp = home / "bin" / "python", home / "ready"
        state = hashlib.sha256(f"linked\n{interpreter}\n{self._client}\n".encode() + pins.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text(encoding="ascii") == state and python.exists():
            return str(python)
        shutil.rmtree(home, ignore_errors=True)
        _run("venv", [interpreter, "-m", "venv", "--without-pip", "--symlinks", str(home)])
        (packages,) = home.glob("lib/python*/site-packages")
        with self._downloading:
            unpacked = self._unpacked(python, packages.parent.name, pins)
        for wheel in unpacked:
            _link(wheel, packages, python)
        (packages / "keyproxy_client.pth").write_text(f"{self._client}\n", encoding="utf-8")
        stamp.write_text(state, encoding="ascii")
        return str(python)

    def _unpacked(self, python: Path, version: str, pins: Path) -> list[Path]:
        """The folders with the contents of the wheels. What is not there is downloaded."""
        self._wheels.mkdir(parents=True, exist_ok=True)
        lines = [line for line in pins.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
        there = self._fitting(version)
        if missing := [line for line in lines if _normal(line) not in there]:
            self._download(python, missing)
            there = self._fitting(version)
        return [there[_normal(line)] for line in lines]

    def _fitting(self, version: str) -> dict[str, Path]:
        """Unpacked wheels for this Python, such as "python3.12", by pin. All are of this machine's platform."""
        minor = int(version.rpartition(".")[2])
        found = {}
        for folder in self._wheels.iterdir():
            name, release, *_, tag, abi, platform = folder.name.split("-")
            built_for = re.fullmatch(r"cp3(\d+)", tag)
            is_stable = abi == "abi3" and built_for is not None and int(built_for[1]) <= minor
            if platform == "any" or tag == f"cp3{minor}" or is_stable:
                found[_normal(f"{name}=={release}")] = folder
        return found

    def _download(self, python: Path, pins: Iterable[str]) -> None:
        """Download and unpack wheels, which pip chooses for this interpreter."""
        with tempfile.TemporaryDirectory(dir=self._home, prefix="download-") as directory:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--no-input"]
            # pip of this environment downloads for the other one.
            pip = [sys.executable, "-m", "pip", "--python", str(python)]
            _run("pip download", [*pip, "download", *options, "--dest", directory, *pins])
            for wheel in Path(directory).glob("*.whl"):
                partial = Path(directory) / wheel.stem
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(partial)
                # A run that is killed leaves no incomplete folder.
                partial.rename(self._wheels / wheel.stem)


def _link(wheel: Path, packages: Path, python: Path) -> None:
    """Make the contents of an unpacked wheel importable, and its commands programs."""
    for entry in wheel.iterdir():
        if entry.suffix == ".data":
            raise NotInstalledError(f"{wheel.name} has files outside its packages")
        (packages / entry.name).symlink_to(entry)
    for declared in wheel.glob("*.dist-info/entry_points.txt"):
        points = configparser.ConfigParser(delimiters="=")
        points.read(declared, encoding="utf-8")
        for name, target in points.items("console_scripts") if points.has_section("console_scripts") else ():
            module, _, function = target.partition("[")[0].strip().partition(":")
            script = python.parent / name
            script.write_text(_SCRIPT.format(python=python, module=module, function=function), encoding="utf-8")
            script.chmod(0o755)


def _normal(pin: str) -> str:
    return re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() + "==" + pin.partition("==")[2]


def _run(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        # pip first reports why the index does not respond, and last the package that is then missing.
        why = "; ".join(dict.fromkeys([*lines[:1], *lines[-1:]])) or f"status {done.returncode}"
        raise NotInstalledError(f"{name} failed: {why}")

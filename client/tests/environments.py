"""Runs the tests of keyproxy-client in environments of their own: `python -m client.tests.environments [ROW...]`.

A row is an environment, a set of pinned packages, with one version of Python, such as dj52-3.13. Arguments after `--` are
pytest's. A row whose Python is not installed is skipped; with CLIENT_STRICT=1 that is a failure. CLIENT_PYTHONS replaces
the search for interpreters: see pythons.py. Rows run in CLIENT_JOBS processes, 2 by default.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.tests import pythons
from client.tests.deploying import Deployer, deployer
from client.tests.installation import Installation, NotInstalledError
from client.tests.support.deployment import clean_environment

CLIENT = Path(__file__).parents[1]
_NO_TESTS = 5


@dataclass(frozen=True)
class Row:
    """Tests of a folder with the packages of an environment, by one Python. Names of environments sort by age."""

    environment: str
    python: str
    tests: str
    is_deployed: bool = True

    @property
    def name(self) -> str:
        """As it is selected and reported."""
        return f"{self.environment}-{self.python}"


ROWS = (
    Row("dj52", "3.11", "django"),
    Row("djnew", "3.13", "django"),
    Row("dj52", "3.13", "django"),
    Row("djnew", "3.12", "django"),
    Row("asgi", "3.13", "asgi"),
    Row("asgi", "3.11", "asgi"),
    Row("core", "3.13", "core", is_deployed=False),
    Row("core", "3.12", "core", is_deployed=False),
    Row("core", "3.11", "core", is_deployed=False),
)


@dataclass(frozen=True)
class Run:
    """How rows are run. `once`, `newest`: names of the rows that also run the tests that are marked with these."""

    installation: Installation
    deployer: Deployer | None
    arguments: Sequence[str]
    once: frozenset[str]
    newest: frozenset[str]
    is_alone: bool

    def row(self, row: Row, interpreter: str) -> bool:
        """Install and test one row, and print the outcome. Whether it passed."""
        begun = time.monotonic()
        try:
            python = self.installation.ensure(row.name, row.environment, interpreter)
        except NotInstalledError as error:
            print(f"client {row.name}: failed, its packages cannot be installed: {error}", flush=True)
            return False
        installed = time.monotonic()
        with contextlib.ExitStack() as stack:
            variables = {}
            if row.is_deployed and self.deployer is not None:
                variables = stack.enter_context(self.deployer.deployed(row.name))
            marks = {"once": self.once, "newest": self.newest}
            left_out = " and ".join(f"not {mark}" for mark, rows in marks.items() if row.name not in rows)
            status, output, cpu_seconds = _measured(
                [python, "-m", "pytest", "--quiet", f"tests/{row.tests}", "-m", left_out, *self.arguments],
                clean_environment() | {"KEYPROXY_CLIENT_ROW": row.name} | variables,
                # Alone in the terminal, a row reports while it runs.
                is_shown=self.is_alone,
            )
        # A selection by arguments may leave nothing of a row.
        has_passed = status == 0 or (status == _NO_TESTS and bool(self.arguments))
        lines = [] if has_passed else output.splitlines()
        outcome = output.rpartition("\n")[2].strip("= ") if has_passed and output else f"status {status}"
        seconds = f"{cpu_seconds:.1f} s of CPU; installed in {installed - begun:.1f} s"
        print("\n".join([*lines, f"client {row.name}: {outcome} ({seconds})"]), flush=True)
        return has_passed


def _measured(command: Sequence[str], environment: Mapping[str, str], *, is_shown: bool) -> tuple[int, str, float]:
    """Status, output and CPU seconds of a command and of the processes that it has waited for."""
    piped = None if is_shown else subprocess.PIPE
    with subprocess.Popen(
        command, cwd=CLIENT, env=environment, stdout=piped, stderr=piped and subprocess.STDOUT, text=True
    ) as process:
        output = "" if process.stdout is None else process.stdout.read().strip()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, output, usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str]) -> int:
    """Run the named rows, or all. 1 if tests fail or, with CLIENT_STRICT=1, if a Python is missing."""
    names, _, for_pytest = _split(arguments)
    known = {row.name for row in ROWS} | {row.environment for row in ROWS}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"there is no row {unknown[0]}; rows are {' '.join(row.name for row in ROWS)}")
    selected = [row for row in ROWS if not names or row.name in names or row.environment in names]
    found = {row: pythons.find(row.python, os.environ) for row in selected}
    skipped = [row for row in selected if found[row] is None]
    for row in skipped:
        print(f"client {row.name}: skipped, no python{row.python}", flush=True)
    present = {row: python for row, python in found.items() if python is not None}
    is_strict = os.environ.get("CLIENT_STRICT") == "1"
    passed = _run(present, for_pytest)
    return 1 if not passed or (is_strict and skipped) else 0


def _run(present: dict[Row, str], arguments: Sequence[str]) -> bool:
    by_age = sorted(present, key=lambda row: (row.environment, int(row.python.partition(".")[2])))
    with contextlib.ExitStack() as stack:
        needs_server = any(row.is_deployed for row in present)
        run = Run(
            installation=Installation(CLIENT, CLIENT.parent / ".venv-client"),
            deployer=stack.enter_context(deployer()) if needs_server else None,
            arguments=arguments,
            once=frozenset({row.environment: row.name for row in by_age}.values()),
            newest=frozenset({row.tests: row.name for row in by_age}.values()),
            is_alone=len(present) == 1,
        )
        jobs = int(os.environ.get("CLIENT_JOBS") or 2)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return all([*pool.map(lambda pair: run.row(*pair), present.items())])


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], str, Sequence[str]]:
    if "--" not in arguments:
        return arguments, "", ()
    end = arguments.index("--")
    return arguments[:end], "--", arguments[end + 1 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

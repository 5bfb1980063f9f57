"""Run tests on the distribution's PostgreSQL, with JIT: `python -m tests.distribution [pytest's arguments]`.

The embedded server is built without LLVM. Those of Debian, Ubuntu and RDS have it, and compile every query that the
planner estimates as expensive. The server runs on a free port as a user other than root, requires a password, and ends
with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import asyncpg

from keyproxy.store.embedded import launcher
from tests import server
from tests.rawhttp import free_port

_START_SECONDS = 60.0

#: Like the embedded server of the tests, except for JIT, which keeps the distribution's default: on, above a cost.
_SETTINGS = {
    "jit": "on", "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300",
    "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
}  # fmt: skip


def binaries() -> Path:
    """The newest PostgreSQL of the distribution, or the one of KEYPROXY_TEST_PG_BIN. Exits if there is none."""
    named = os.environ.get("KEYPROXY_TEST_PG_BIN")
    found = [Path(named)] if named else list(Path("/usr/lib/postgresql").glob("*/bin"))
    usable = [path for path in found if os.access(path / "initdb", os.X_OK) and os.access(path / "postgres", os.X_OK)]
    if not usable:
        sys.exit("there is no PostgreSQL of the distribution: apt-get install postgresql, or set KEYPROXY_TEST_PG_BIN")
    return max(usable, key=lambda path: int(path.parent.name) if path.parent.name.isdecimal() else 0)


@contextlib.contextmanager
def serving(programs: Path) -> Iterator[str]:
    """A server while the context lasts; its DSN."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory, contextlib.ExitStack() as stack:
        home, password = Path(directory), secrets.token_hex(16)
        secret = home / "password"
        secret.write_text(password, encoding="ascii")
        probe = [sys.executable, "-I", "-S", launcher.__file__, "--probe"]
        if subprocess.run(probe, timeout=20, check=False).returncode == launcher.NOBODY:
            for path in (home, secret):
                os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)
        _run(
            programs / "initdb",
            "--pgdata",
            str(home / "data"),
            "--username",
            server.ROLE,
            "--encoding",
            "UTF8",
            "--no-locale",
            "--auth",
            "scram-sha-256",
            "--pwfile",
            str(secret),
        )
        port = free_port()
        dsn = f"postgresql://{server.ROLE}:{password}@127.0.0.1:{port}/postgres"
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        log = stack.enter_context((home / "log").open("wb"))
        process = subprocess.Popen(
            _launched(programs / "postgres", "-D", str(home / "data"), "-p", str(port), *settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
        )
        stack.callback(_stop, process)
        if not asyncio.run(_has_jit(dsn, process, home / "log")):
            sys.exit(f"{programs} is built without JIT: install its LLVM package, or another PostgreSQL")
        yield dsn


def main(arguments: Sequence[str]) -> int:
    """Run pytest on a server. Its status."""
    with serving(binaries()) as dsn:
        environment = {**os.environ, server.VARIABLE: dsn}
        return subprocess.call([sys.executable, "-m", "pytest", *arguments], env=environment)


def _launched(program: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), str(program), *arguments]


def _run(program: Path, *arguments: str) -> None:
    done = subprocess.run(
        _launched(program, *arguments), capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    if done.returncode:
        sys.exit(f"{program.name} failed: {done.stderr.strip()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(30)


async def _has_jit(dsn: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            connection = await asyncpg.connect(dsn)
            break
        except (OSError, asyncpg.PostgresError):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"PostgreSQL did not start: {log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(0.05)
    try:
        return bool(await connection.fetchval("SELECT pg_jit_available()"))
    finally:
        await connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

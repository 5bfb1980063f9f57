"""The keyproxy that the tests of a row run against: its addresses, and further proxies of it. Only the standard library.

The driver (environments.py) starts it and names it in KEYPROXY_CLIENT_DEPLOYMENT.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

VARIABLE = "KEYPROXY_CLIENT_DEPLOYMENT"
TENANTS = ("acme", "globex")
SCOPES = ("jobs:read", "jobs:write")

#: Tables of keyproxy's configuration; a list is an array of tables.
Tables = Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Deployment:
    """One keyproxy: proxied port, admin API, database, broker; all for one row.

    `dsn`: as a superuser. `app_dsn`: as the role `app`, which is granted `keyproxy_app`. `origin`: of the proxied port;
    `ops_url`: of its ops listener. `admin_token_file`: of a token with all scopes. `broker_url`: of Valkey. `upstream`:
    the echo server behind `origin`. `home`: a directory for files of the row. `python`: has
    keyproxy. `keyproxy`: a program that runs its commands, except those that serve, without a start of the interpreter.
    `programs`: directories of PostgreSQL's programs.

    The echo server responds with the request as JSON: `method`, `target`, `headers` (pairs in their order, names as they
    came), `body`. The query selects another response: `status=503&header=Retry-After:1&body={"code":"overloaded"}`.
    """

    dsn: str
    app_dsn: str
    origin: str
    ops_url: str
    admin_url: str
    admin_token_file: Path
    broker_url: str
    upstream: str
    home: Path
    python: str
    keyproxy: Path
    config: Path
    programs: list[str]

    @classmethod
    def named(cls) -> Deployment | None:
        """The one that the environment names, if it names one."""
        path = os.environ.get(VARIABLE)
        if not path:
            return None
        fields: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**fields | {name: Path(fields[name]) for name in _PATHS})

    def service_key_file(self, tenant: str = "acme", *, test: bool = False) -> Path:
        """The file with a key of `u_service_<tenant>` that acts for all users of its tenant, with SCOPES."""
        return self.home / f"{tenant}-{'test' if test else 'live'}.key"

    @property
    def service_key_pattern(self) -> str:
        """The path of the live keys, with `{tenant}`."""
        return str(self.home / "{tenant}-live.key")

    @property
    def service_test_key_pattern(self) -> str:
        """The path of the test keys, with `{tenant}`."""
        return str(self.home / "{tenant}-test.key")

    def dsn_of(self, database: str) -> str:
        """The DSN of the superuser for another database of the server."""
        return urlsplit(self.dsn)._replace(path=f"/{database}").geturl()

    @property
    def jwks_url(self) -> str:
        """The public keys of the assertions."""
        return f"{self.ops_url}/jwks.json"

    def cli(self, *arguments: str, stdin: str = "") -> Any:
        """Run a command of keyproxy that must succeed; returns its JSON."""
        done = subprocess.run(
            [self.keyproxy, *arguments, "--json", "--config", str(self.config)],
            env=clean_environment(),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @contextlib.contextmanager
    def proxying(self, upstream: str, tables: Tables | None = None) -> Iterator[str]:
        """Another proxy of the same database before this upstream, `http://host:port` or `unix:/path`; its origin."""
        with tempfile.TemporaryDirectory(prefix="proxy-", dir=self.home) as home:
            extra = {**(tables or {}), "upstream": {"url": upstream}}
            with serving(self.python, self.dsn, Path(home), extra) as (origin, _):
                yield origin


_PATHS = frozenset({"admin_token_file", "home", "keyproxy", "config"})


def clean_environment() -> dict[str, str]:
    """The environment without keyproxy's configuration, and with the bytecode cache."""
    dropped = ("KEYPROXY_", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "DJANGO_", "PYTEST_")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def toml(tables: Tables) -> str:
    """A configuration file."""
    lines = []
    for table, content in tables.items():
        is_array = isinstance(content, Sequence)
        for row in content if isinstance(content, Sequence) else [content]:
            lines.append(f"[[{table}]]" if is_array else f"[{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in row.items()]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def serving(python: str, dsn: str, home: Path, tables: Tables) -> Iterator[tuple[str, str]]:
    """`keyproxy serve` until the context ends; the origins of the proxied port and of the ops listener."""
    port, ops_port = free_port(), free_port()
    standard: dict[str, Any] = {
        "listen": {"address": f"127.0.0.1:{port}"},
        "ops": {"address": f"127.0.0.1:{ops_port}"},
        "store": {"dsn": dsn},
        "access": {"assertion": True},
    }
    config = home / "keyproxy.toml"
    config.write_text(toml({**standard, **tables}), encoding="utf-8")
    ops = f"http://127.0.0.1:{ops_port}"
    with running([python, "-m", "keyproxy", "serve", "--config", str(config)], f"{ops}/readyz", home / "serve.log"):
        yield f"http://127.0.0.1:{port}", ops


@contextlib.contextmanager
def running(command: Sequence[str], live_url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process from the moment when this URL responds with 200 until the context ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _responds(live_url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(
                        f"{command} did not start: {log.read_text(encoding='utf-8', errors='replace')}"
                    )
                time.sleep(0.02)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False

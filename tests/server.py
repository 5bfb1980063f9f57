"""The PostgreSQL server for tests: an embedded one, or an existing one, `make test-postgres DSN=…`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import parse_qs, quote, urlsplit

#: The DSN of an existing server.
VARIABLE: Final = "KEYPROXY_TEST_POSTGRES"

#: Tests compare what the database records about the current role.
ROLE: Final = "keyproxy"

#: Of an embedded server: tests do not need their data to survive a power cut.
FAST_SETTINGS: Final = {
    "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300",
    "max_wal_size": "256MB",
}  # fmt: skip

#: A database in memory is copied several times faster than one on a disk. The servers of a few parallel runs fit in this.
_MEMORY: Final = Path("/dev/shm")
_MEMORY_BYTES_MIN: Final = 4 * 2**30


class Server(Protocol):
    """A server on which tests create databases."""

    def dsn(self, database: str) -> str:
        """How to connect to one of its databases, as a superuser."""
        ...


class GivenServer:
    """A server that is managed externally."""

    def __init__(self, dsn: str) -> None:
        """Raises ValueError if tests cannot use this DSN."""
        self._parts = urlsplit(dsn)
        if self._parts.scheme not in ("postgresql", "postgres") or self._parts.username != ROLE:
            raise ValueError(
                f"{VARIABLE} (or DSN=…) has to be postgresql://{ROLE}:…@host:port/, with {ROLE} a superuser of a server"
                " that holds nothing else"
            )

    def dsn(self, database: str) -> str:
        return self._parts._replace(path=f"/{database}").geturl()


def given() -> GivenServer | None:
    """The server configured by the environment. Raises ValueError."""
    dsn = os.environ.get(VARIABLE)
    return GivenServer(dsn) if dsn else None


def home() -> Path:
    """Where the directory of an embedded server is made: in memory if there is plenty.

    Containers often allow shared memory of a few megabytes only.
    """
    has_memory = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return _MEMORY if has_memory and shutil.disk_usage(_MEMORY).free >= _MEMORY_BYTES_MIN else Path("/tmp")


def password_of(dsn: str) -> str:
    """Empty if there is none."""
    return urlsplit(dsn).password or ""


def address_of(dsn: str) -> str | tuple[str, int]:
    """Where the server listens: the path of a socket, or host and port."""
    parts, parameters = urlsplit(dsn), parse_qs(urlsplit(dsn).query)
    host = parameters.get("host", [parts.hostname or "localhost"])[0]
    port = int(parameters.get("port", [str(parts.port or 5432)])[0])
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)


def as_role(dsn: str, role: str) -> str:
    """The DSN for another role. If the server requires passwords, the role needs the same one: see `may_log_in`."""
    parts = urlsplit(dsn)
    password = f":{parts.password}" if parts.password else ""
    place = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{quote(role, safe='')}{password}@{place}").geturl()


def may_log_in(dsn: str, role: str) -> str:
    """The statement that gives a role the password of this DSN; harmless on a server that requires none."""
    password = password_of(dsn).replace("'", "''")
    return f"ALTER ROLE \"{role}\" LOGIN PASSWORD '{password}'" if password else f'ALTER ROLE "{role}" LOGIN'

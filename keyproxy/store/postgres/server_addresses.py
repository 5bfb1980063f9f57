"""The servers, user and database that a DSN names, completed from the environment and a service file like libpq."""

from __future__ import annotations

import configparser
import getpass
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from keyproxy.config import dsn as dsns
from keyproxy.config.dsn import Dsn
from keyproxy.store.postgres.failures import first_line

#: libpq's default addresses of a local server, if nothing else is configured.
_LOCAL: Final = ("/run/postgresql", "/var/run/postgresql", "/tmp", "localhost")  # noqa: S108 - sockets are looked for there


class ServerAddresses(NamedTuple):
    """What a DSN leads to. `hosts` are tried in this order; a path is the directory of a socket."""

    dsn: Dsn
    hosts: list[tuple[str, int]]
    user: str | None
    database: str | None

    @property
    def where(self) -> str:
        """The servers and the database, for messages; never a password."""
        return f"{','.join(map(_shown, self.hosts))}, database {self.database!r}"


def resolve(dsn: str) -> ServerAddresses:
    """Complete a DSN. Raises InvalidDsnError."""
    parsed = dsns.parse(dsn)
    service = parsed.parameters.get("service")
    parsed = parsed if service is None else _with_service(dsn, parsed, service)
    return ServerAddresses(parsed, list(_hosts(parsed)), _user(parsed), _database(parsed))


def _hosts(dsn: Dsn) -> Iterator[tuple[str, int]]:
    port = os.environ.get("PGPORT", "")
    usual = int(port) if port.isdecimal() else dsns.PORT
    named = [(host, own) for host, own in dsn.hosts if host]
    if not named:
        configured = os.environ.get("PGHOST", "")
        named = list(dsns.from_keywords({"host": configured}).hosts) or [(host, None) for host in _LOCAL]
        usual = next((own for _, own in dsn.hosts if own is not None), usual)
    for host, own in named:
        yield host, usual if own is None else own


def _shown(host: tuple[str, int]) -> str:
    name, port = host
    if name.startswith("/"):
        return f"{name}/.s.PGSQL.{port}"
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _user(dsn: Dsn) -> str | None:
    """The user name. Raises InvalidDsnError if neither the DSN nor the system has one."""
    try:
        return dsn.user or os.environ.get("PGUSER") or getpass.getuser()
    except (KeyError, OSError) as error:
        raise dsns.InvalidDsnError("contains no user name, and the user of this process has no name") from error


def _database(dsn: Dsn) -> str | None:
    return dsn.database or os.environ.get("PGDATABASE") or _user(dsn)


def _with_service(dsn: str, parsed: Dsn, service: str) -> Dsn:
    """Add the parameters of a service file to a DSN. Raises InvalidDsnError."""
    named = parsed.parameters.get("servicefile") or os.environ.get("PGSERVICEFILE")
    try:
        path = Path(named) if named else Path.home() / ".pg_service.conf"
        file = configparser.ConfigParser(interpolation=None)
        file.read_string(path.read_text(encoding="utf-8"))
        section = dict(file[service])
    except (OSError, RuntimeError, UnicodeDecodeError, configparser.Error) as error:
        raise dsns.InvalidDsnError(
            f"has service={service}, but the service file cannot be read: {first_line(error)}"
        ) from error
    except KeyError as error:
        raise dsns.InvalidDsnError(f"has service={service}, which is not in {path}") from error
    return dsns.parse(dsn, beneath=section)

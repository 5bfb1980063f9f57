"""Opens connections to the primary of a database. Server addresses and connection settings are handled here alone.

Hosts are tried one after the other, from the one that worked last, each within its own time, and names are resolved for
every connection. A server that is a standby, or read-only by its configuration, is not used: another server may be ahead
of it.

Settings of a role, a database or the server (`default_transaction_isolation = serializable`, a short
`statement_timeout`, another `search_path`) must not change what our statements mean, so a connection is opened with
its own settings. A pooler may refuse or forget these; then each transaction sets them itself: see `is_pinned`.
"""

from __future__ import annotations

import asyncio
import configparser
import getpass
import os
import secrets
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from keyproxy.config import dsn as dsns
from keyproxy.config.dsn import Dsn
from keyproxy.store.postgres import connection_tls, times
from keyproxy.store.postgres.connection_tls import TlsParameterError
from keyproxy.store.postgres.failures import NO_ANSWER, POOLER_SIGNS, NotPrimaryError, StoreUnavailable, first_line

#: How long a connection may take, in all, unless `connect_timeout` allows each host more.
CONNECT_SECONDS: Final = 2.0
_HOST_SECONDS_MIN: Final = 0.7
_HOST_SECONDS_MAX: Final = 60.0

#: libpq's default addresses of a local server, if nothing else is configured.
_LOCAL: Final = ("/run/postgresql", "/var/run/postgresql", "/tmp", "localhost")  # noqa: S108 - sockets are looked for there

#: The settings that our statements need in any transaction.
NEEDED: Final = {
    "default_transaction_isolation": "read committed",
    "search_path": "pg_catalog",
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "row_security": "on",
}

#: If the client disappears, the server cancels the statement by itself, a little later than the client would.
_STATEMENT_GRACE_SECONDS: Final = 1.0

#: A pooler refuses settings that it does not know; a server refuses those of newer versions.
_SETTINGS_REFUSED: Final = (
    asyncpg.ProtocolViolationError,
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidParameterValueError,
    asyncpg.FeatureNotSupportedError,
)
_PINNED: Final = (
    "SELECT current_setting('default_transaction_isolation') = 'read committed'"
    " AND current_setting('search_path') = 'pg_catalog'"
)

#: TCP keepalive parameters by libpq's names: idle seconds, seconds between probes, lost probes until a peer is dead.
_KEEPALIVES: Final = (
    ("keepalives_idle", getattr(socket, "TCP_KEEPIDLE", None)),
    ("keepalives_interval", getattr(socket, "TCP_KEEPINTVL", None)),
    ("keepalives_count", getattr(socket, "TCP_KEEPCNT", None)),
    ("tcp_user_timeout", getattr(socket, "TCP_USER_TIMEOUT", None)),
)


class Connection(asyncpg.Connection):
    """Gives prepared statements globally unique names, as asyncpg's FAQ advises for poolers.

    `is_pinned`: its settings are ours, and the server reports when it becomes read-only. Otherwise each transaction
    handles both.
    """

    def __init__(self, protocol: Any, transport: Any, *more: Any) -> None:
        super().__init__(protocol, transport, *more)
        self.wire = transport
        self.is_pinned = False

    def _get_unique_id(self, prefix: str) -> str:
        return f"keyproxy_{prefix}_{secrets.token_hex(8)}"


def limits(command_seconds: float) -> dict[str, str]:
    """The time limits of a connection, as settings of the server; 0: none. A DSN may set others."""
    seconds = command_seconds + _STATEMENT_GRACE_SECONDS if command_seconds else 0
    return {
        "statement_timeout": str(round(seconds * 1_000)),
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": "60000",
        "idle_session_timeout": "0",
    }


def standing(connection: Any) -> str:
    """Why the server is read-only, as last reported; empty if it is writable or does not report."""
    reported = connection.get_settings()
    if getattr(reported, "in_hot_standby", "off") == "on":
        return "this server is a standby, not the primary"
    if getattr(reported, "default_transaction_read_only", "off") == "on":
        return "this server is read-only (default_transaction_read_only = on)"
    return ""


class Target:
    """See the module. `where` names the servers and the database, for messages; never a password."""

    def __init__(self, dsn: str) -> None:
        self.where = "the store"
        self._dsn: Dsn | None = None
        self._wrong = ""
        try:
            parsed = dsns.parse(dsn)
            service = parsed.parameters.get("service")
            parsed = parsed if service is None else _with_service(dsn, parsed, service)
            self._hosts = list(_hosts(parsed))
            self._user, self._database = _user(parsed), _database(parsed)
        except dsns.InvalidDsnError as error:
            self._wrong = f"store.dsn {error}"
            return
        self._dsn = parsed
        self.where = f"{','.join(map(_shown, self._hosts))}, database {self._database!r}"
        self._first = 0
        #: For each host, the encryption that worked last: False: as `sslmode` prefers, True: the other one.
        self._takes_other: dict[tuple[str, int], bool] = {}
        self._refuses_settings = False

    @property
    def seconds(self) -> float:
        """How long connecting may take in all."""
        if self._dsn is None:
            return CONNECT_SECONDS
        return max(CONNECT_SECONDS, len(self._hosts) * self._host_seconds(self._dsn))

    async def connect(
        self, *, command_seconds: float, caches_statements: bool = True, is_read_only_enough: bool = False
    ) -> Connection:  # fmt: skip
        """A connection to the primary. Raises NotPrimaryError, StoreUnavailable, or what asyncpg raises.

        `command_seconds`: the timeout of one statement; 0: none. `is_read_only_enough`: accept any server.
        """
        dsn = self._dsn
        if dsn is None:
            raise StoreUnavailable(self._wrong)
        arguments: dict[str, Any] = {"command_timeout": command_seconds or None}
        if not caches_statements:
            arguments["statement_cache_size"] = 0
        failure: Exception | None = None
        count = len(self._hosts)
        for place in [(self._first + ahead) % count for ahead in range(count)]:
            # Set before the attempt, so that after a cancellation the next one begins with another host.
            self._first = (place + 1) % count
            host = self._hosts[place]
            connection: Connection | None = None
            try:
                async with asyncio.timeout(self._host_seconds(dsn)):
                    connection = await self._connect_to(host, dsn, arguments)
            except NO_ANSWER as error:
                if connection is not None:
                    # The timeout expired at the moment the connection was established.
                    connection.terminate()
                failure = error
                if isinstance(error, asyncpg.TooManyConnectionsError):
                    self._first = place
                continue
            except TlsParameterError as error:
                raise StoreUnavailable(f"store.dsn: {error}") from error
            why = "" if is_read_only_enough else standing(connection)
            if not why:
                self._first = place
                return connection
            connection.terminate()
            failure = NotPrimaryError(why)
        assert failure is not None  # noqa: S101 - for the type checker: there is a host
        raise failure

    # -- one host

    async def _connect_to(self, host: tuple[str, int], dsn: Dsn, arguments: Mapping[str, Any]) -> Connection:
        if not self._refuses_settings:
            settings = {**limits(arguments["command_timeout"] or 0), **dsn.settings, **NEEDED}
            try:
                connection = await self._encrypted(host, dsn, {**arguments, "server_settings": _named(dsn, settings)})
            except _SETTINGS_REFUSED:
                self._refuses_settings = True
            else:
                await self._pin(connection)
                return connection
        return await self._encrypted(host, dsn, {**arguments, "server_settings": _named(dsn, dsn.settings)})

    async def _pin(self, connection: Connection) -> None:
        """Find out whether our settings were accepted and whether the server reports that it is read-only."""
        reported = connection.get_settings()
        if not hasattr(reported, "in_hot_standby") or not hasattr(reported, "default_transaction_read_only"):
            return
        has_answered = False
        try:
            connection.is_pinned = await connection.fetchval(_PINNED) is True
            has_answered = True
        except POOLER_SIGNS:
            # A pooler that accepted the settings, but runs statements on other connections than it prepared them on.
            has_answered = True
        finally:
            if not has_answered:
                connection.terminate()

    async def _encrypted(self, host: tuple[str, int], dsn: Dsn, arguments: Mapping[str, Any]) -> Connection:
        """Connect by `sslmode`; with `prefer` and `allow`, the other way if the server requires it."""
        ways = [False] if host[0].startswith("/") else list(connection_tls.attempts(dsn.parameters))
        if len(ways) > 1 and self._takes_other.get(host):
            ways.reverse()
        for place, way in enumerate(ways):
            try:
                connection = await self._connect_once(host, dsn, way, arguments)
            except (OSError, asyncpg.InvalidAuthorizationSpecificationError) as error:
                is_last = place == len(ways) - 1
                if is_last or not _is_about_encryption(error):
                    raise
                self._takes_other[host] = not self._takes_other.get(host, False)
            else:
                return connection
        raise AssertionError("the last way is final")

    async def _connect_once(
        self, host: tuple[str, int], dsn: Dsn, way: ssl.SSLContext | bool, arguments: Mapping[str, Any]
    ) -> Connection:
        parameters = dsn.parameters
        where: dict[str, Any] = {"host": host[0], "port": host[1], "user": self._user, "database": self._database}
        more: dict[str, Any] = {name: parameters.get(name) for name in ("passfile", "krbsrvname", "gsslib")}
        connection: Connection = await asyncpg.connect(
            **where, **more, password=dsn.password, ssl=way, connection_class=Connection,
            # Otherwise PGTARGETSESSIONATTRS would apply.
            target_session_attrs=SessionAttribute.any,
            direct_tls=True if parameters.get("sslnegotiation") == "direct" else None, **arguments,
        )  # fmt: skip
        if not host[0].startswith("/"):
            _keep_alive(connection.wire, parameters)
        # Needs no round trip, since these are built-in types.
        for name, encoder, decoder in (
            ("timestamptz", times.encoded_instant, times.decoded_instant),
            ("date", times.encoded_day, times.decoded_day),
        ):
            await connection.set_type_codec(
                name, schema="pg_catalog", encoder=encoder, decoder=decoder, format="tuple"
            )  # fmt: skip
        return connection

    def _host_seconds(self, dsn: Dsn) -> float:
        asked = int(dsn.parameters.get("connect_timeout", "0"))
        if asked > 0:
            return min(float(max(asked, 2)), _HOST_SECONDS_MAX)
        return max(_HOST_SECONDS_MIN, CONNECT_SECONDS / len(self._hosts))


def _is_about_encryption(error: Exception) -> bool:
    # asyncpg raises a plain ConnectionError where a server refuses TLS.
    return (
        type(error) is ConnectionError
        or isinstance(error, ssl.SSLError)
        # Exactly this class: a wrong password raises a subclass.
        or type(error) is asyncpg.InvalidAuthorizationSpecificationError
    )


def _named(dsn: Dsn, settings: Mapping[str, str]) -> dict[str, str]:
    parameters = dsn.parameters
    name = parameters.get("application_name") or os.environ.get("PGAPPNAME")
    named = {"application_name": name or parameters.get("fallback_application_name") or "keyproxy"}
    options = {"options": parameters["options"]} if "options" in parameters else {}
    return {**options, **named, **settings}


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


def _keep_alive(transport: Any, parameters: Mapping[str, str]) -> None:
    """Enable TCP keepalives, so that the kernel detects a dead peer, as libpq does."""
    sock = transport.get_extra_info("socket")
    if sock is None or parameters.get("keepalives", "1") == "0":
        return
    own = socket.socket(fileno=os.dup(sock.fileno()))
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, option in _KEEPALIVES:
            value = int(parameters.get(name, "0"))
            if value > 0 and option is not None:
                own.setsockopt(socket.IPPROTO_TCP, option, value)
    finally:
        own.close()


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

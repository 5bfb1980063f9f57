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
import os
import secrets
import ssl
from collections.abc import Mapping
from typing import Any, Final

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from keyproxy.config import dsn as dsns
from keyproxy.config.dsn import Dsn
from keyproxy.store.postgres import connection_tls, server_addresses, tcp_keepalive, times
from keyproxy.store.postgres.connection_tls import TlsParameterError
from keyproxy.store.postgres.failures import NO_RESPONSE, POOLER_SIGNS, NotPrimaryError, StoreUnavailable
from keyproxy.store.postgres.server_addresses import ServerAddresses

#: How long a connection may take, in all, unless `connect_timeout` allows each host more.
CONNECT_SECONDS: Final = 2.0
_HOST_SECONDS_MIN: Final = 0.7
_HOST_SECONDS_MAX: Final = 60.0

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


class Connection(asyncpg.Connection):
    """Gives prepared statements globally unique names, as asyncpg's FAQ advises for poolers.

    `is_pinned`: its settings are ours, and the server reports when it becomes read-only. Otherwise each transaction
    handles both.
    """

    def __init__(self, protocol: Any, transport: Any, *more: Any) -> None:
        super().__init__(protocol, transport, *more)
        self.wire = transport
        self.is_pinned = False

    def get_reset_query(self) -> str:
        """The statement with which a pool takes a connection back: none, which saves a round trip after each of ours.

        Our settings and locks end with their transaction, and the pool ends a transaction that was left open.
        """
        return ""

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


class Connector:
    """Opens connections to one database. `where` names the servers and the database, for messages; never a password."""

    def __init__(self, dsn: str) -> None:
        self.where = "the store"
        self._addresses: ServerAddresses | None = None
        self._wrong = ""
        try:
            self._addresses = server_addresses.resolve(dsn)
        except dsns.InvalidDsnError as error:
            self._wrong = f"store.dsn {error}"
            return
        self.where = self._addresses.where
        self._first = 0
        #: For each host, the encryption that worked last: False: as `sslmode` prefers, True: the other one.
        self._takes_other: dict[tuple[str, int], bool] = {}
        self._refuses_settings = False

    @property
    def seconds(self) -> float:
        """How long connecting may take in all."""
        if self._addresses is None:
            return CONNECT_SECONDS
        return max(CONNECT_SECONDS, len(self._addresses.hosts) * _host_seconds(self._addresses))

    async def connect(
        self, *, command_seconds: float, caches_statements: bool = True, is_read_only_enough: bool = False
    ) -> Connection:
        """A connection to the primary. Raises NotPrimaryError, StoreUnavailable, or what asyncpg raises.

        `command_seconds`: the timeout of one statement; 0: none. `is_read_only_enough`: accept any server.
        """
        addresses = self._addresses
        if addresses is None:
            raise StoreUnavailable(self._wrong)
        arguments: dict[str, Any] = {"command_timeout": command_seconds or None}
        if not caches_statements:
            arguments["statement_cache_size"] = 0
        failure: Exception | None = None
        count = len(addresses.hosts)
        for place in [(self._first + ahead) % count for ahead in range(count)]:
            # Set before the attempt, so that after a cancellation the next one begins with another host.
            self._first = (place + 1) % count
            host = addresses.hosts[place]
            connection: Connection | None = None
            try:
                async with asyncio.timeout(_host_seconds(addresses)):
                    connection = await self._connect_to(host, addresses, arguments)
            except NO_RESPONSE as error:
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

    async def _connect_to(
        self, host: tuple[str, int], addresses: ServerAddresses, arguments: Mapping[str, Any]
    ) -> Connection:
        dsn = addresses.dsn
        if not self._refuses_settings:
            settings = {**limits(arguments["command_timeout"] or 0), **dsn.settings, **NEEDED}
            try:
                connection = await self._encrypted(
                    host, addresses, {**arguments, "server_settings": _named(dsn, settings)}
                )
            except _SETTINGS_REFUSED:
                self._refuses_settings = True
            else:
                await self._pin(connection)
                return connection
        return await self._encrypted(host, addresses, {**arguments, "server_settings": _named(dsn, dsn.settings)})

    async def _pin(self, connection: Connection) -> None:
        """Find out whether our settings were accepted and whether the server reports that it is read-only."""
        reported = connection.get_settings()
        if not hasattr(reported, "in_hot_standby") or not hasattr(reported, "default_transaction_read_only"):
            return
        has_responded = False
        try:
            connection.is_pinned = await connection.fetchval(_PINNED) is True
            has_responded = True
        except POOLER_SIGNS:
            # A pooler that accepted the settings, but runs statements on other connections than it prepared them on.
            has_responded = True
        finally:
            if not has_responded:
                connection.terminate()

    async def _encrypted(
        self, host: tuple[str, int], addresses: ServerAddresses, arguments: Mapping[str, Any]
    ) -> Connection:
        """Connect by `sslmode`; with `prefer` and `allow`, the other way if the server requires it."""
        ways = [False] if host[0].startswith("/") else list(connection_tls.attempts(addresses.dsn.parameters))
        if len(ways) > 1 and self._takes_other.get(host):
            ways.reverse()
        for place, way in enumerate(ways):
            try:
                connection = await self._connect_once(host, addresses, way, arguments)
            except (OSError, asyncpg.InvalidAuthorizationSpecificationError) as error:
                is_last = place == len(ways) - 1
                if is_last or not _is_about_encryption(error):
                    raise
                self._takes_other[host] = not self._takes_other.get(host, False)
            else:
                return connection
        raise AssertionError("the last way is final")

    async def _connect_once(
        self,
        host: tuple[str, int],
        addresses: ServerAddresses,
        way: ssl.SSLContext | bool,
        arguments: Mapping[str, Any],
    ) -> Connection:
        dsn, parameters = addresses.dsn, addresses.dsn.parameters
        where: dict[str, Any] = {
            "host": host[0],
            "port": host[1],
            "user": addresses.user,
            "database": addresses.database,
        }
        more: dict[str, Any] = {name: parameters.get(name) for name in ("passfile", "krbsrvname", "gsslib")}
        connection: Connection = await asyncpg.connect(
            **where,
            **more,
            password=dsn.password,
            ssl=way,
            connection_class=Connection,
            # Otherwise PGTARGETSESSIONATTRS would apply.
            target_session_attrs=SessionAttribute.any,
            direct_tls=True if parameters.get("sslnegotiation") == "direct" else None,
            **arguments,
        )
        if not host[0].startswith("/"):
            tcp_keepalive.enable(connection.wire, parameters)
        # Needs no round trip, since these are built-in types.
        for name, encoder, decoder in (
            ("timestamptz", times.encoded_instant, times.decoded_instant),
            ("date", times.encoded_day, times.decoded_day),
        ):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=encoder, decoder=decoder, format="tuple")
        return connection


def _host_seconds(addresses: ServerAddresses) -> float:
    configured = int(addresses.dsn.parameters.get("connect_timeout", "0"))
    if configured > 0:
        return min(float(max(configured, 2)), _HOST_SECONDS_MAX)
    return max(_HOST_SECONDS_MIN, CONNECT_SECONDS / len(addresses.hosts))


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

"""Parse a PostgreSQL connection URI. Every parameter of libpq is applied, ignored because it has no effect, or rejected.

A security parameter that cannot be applied (`channel_binding=require`) is rejected: a connection with less protection
than configured is worse than none. The names are those of libpq; any other name is a server setting, as in
`?work_mem=16MB`. Passwords are never part of an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

PORT: Final = 5432

#: Parameters that are applied, see `Dsn.parameters`.
_HONOURED: Final = frozenset({
    "host", "hostaddr", "port", "dbname", "user", "password", "passfile", "service", "servicefile", "connect_timeout",
    "application_name", "fallback_application_name", "options", "keepalives", "keepalives_idle", "keepalives_interval",
    "keepalives_count", "tcp_user_timeout", "sslmode", "sslnegotiation", "sslcert", "sslkey", "sslpassword",
    "sslrootcert", "sslcrl", "ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs",
    "krbsrvname", "gsslib",
})  # fmt: skip

#: Parameters without effect here, whatever their value: they request the default behaviour, or are only a preference.
_IGNORED: Final = frozenset({
    "client_encoding", "sslcompression", "sslkeylogfile", "gssdelegation", "load_balance_hosts", "max_protocol_version",
})  # fmt: skip

#: Parameters that have no effect with these values and cannot be applied with any other.
_ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    "channel_binding": ("disable", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "sslcertmode": ("allow", "disable"),
    "sslsni": ("1",),
    "replication": ("false", "off", "no", "0"),
    "min_protocol_version": ("3.0",),
    "require_auth": ("",),
    "requirepeer": ("",),
    "sslcrldir": ("",),
    "scram_client_key": ("",),
    "scram_server_key": ("",),
    "oauth_issuer": ("",),
    "oauth_client_id": ("",),
    "oauth_client_secret": ("",),
    "oauth_scope": ("",),
}

#: Alternatives to rejected parameters.
_INSTEAD: Final = {
    "channel_binding": "; remove it, and use sslmode=verify-full so that the server has to prove its identity",
    "gssencmode": "; use sslmode for encryption",
    "sslcertmode": "; set sslcert and sslkey where a client certificate is needed",
    "sslcrldir": "; use sslcrl",
}

_WHOLE: Final = frozenset({
    "connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
})  # fmt: skip
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": ("any", "read-write", "primary", "standby", "prefer-standby", "read-only"),
    "gsslib": ("gssapi", "sspi"),
}
_NOT_WRITABLE: Final = ("standby", "prefer-standby", "read-only")
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_HOST = re.compile(r"\[([^\]]+)\](?::([0-9]*))?|([^:]*)(?::([0-9]*))?")


class InvalidDsnError(ValueError):
    """A connection URI that cannot be used. The text names the parameter and contains no secret."""


@dataclass(frozen=True, slots=True)
class Dsn:
    """A parsed connection URI.

    `hosts`: names, addresses or directories of sockets, each with a port; empty if the URI names none.
    `parameters`: the libpq parameters that are applied. `settings`: other names after the `?`, for the server.
    """

    hosts: tuple[tuple[str, int | None], ...] = ()
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    settings: Mapping[str, str] = field(default_factory=dict)


def parse(uri: str, beneath: Mapping[str, str] | None = None) -> Dsn:
    """Parse a URI. Raises InvalidDsnError. `beneath`: keywords that apply unless the URI overrides them."""
    try:
        parts = urlsplit(uri)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise InvalidDsnError("is not a connection URI") from error
    if parts.scheme not in ("postgresql", "postgres"):
        raise InvalidDsnError("must begin with postgresql://")
    credentials, at, location = parts.netloc.partition("@")
    if not at:
        credentials, location = "", parts.netloc
    user, _, password = credentials.partition(":")
    given = {name: value for name, value in query if value or name in _ONLY}
    if "database" in given:
        given.setdefault("dbname", given.pop("database"))
    if location:
        # Hosts in the authority override those in the query, along with their ports.
        given = {name: value for name, value in given.items() if name not in ("host", "port")}
    in_front = {"host": location, "user": user, "password": password, "dbname": parts.path[1:]}
    given |= {name: unquote(value) for name, value in in_front.items() if value}
    return from_keywords({**(beneath or {}), **given})


def from_keywords(given: Mapping[str, str]) -> Dsn:
    """Make a Dsn from libpq's keywords and values, as in a service file. Raises InvalidDsnError."""
    parameters: dict[str, str] = {}
    settings: dict[str, str] = {}
    for name, value in given.items():
        if name == "requiressl":
            if value == "1":
                parameters.setdefault("sslmode", "require")
        elif _is_applied(name, value):
            parameters[name] = value
        elif name not in _IGNORED and name not in _ONLY:
            if not _SETTING.fullmatch(name):
                raise InvalidDsnError(f"has the unknown parameter {name!r}")
            settings[name] = value
    _check_together(parameters)
    return Dsn(
        hosts=_hosts(parameters),
        user=parameters.pop("user", None),
        password=parameters.pop("password", None),
        database=parameters.pop("dbname", None),
        parameters=parameters,
        settings=settings,
    )


def _is_applied(name: str, value: str) -> bool:
    """Whether a parameter of libpq is applied. Raises InvalidDsnError for one that is not supported."""
    allowed = _ONLY.get(name)
    if allowed is not None and value not in allowed:
        shown = name if name in ("require_auth", "requirepeer") or allowed == ("",) else f"{name}={value}"
        raise InvalidDsnError(f"has the parameter {shown}, which is not supported{_INSTEAD.get(name, '')}")
    if name in _WHOLE and not re.fullmatch(r"-?[0-9]{1,9}", value):
        raise InvalidDsnError(f"has the parameter {name}, which must be a whole number")
    choices = _CHOICES.get(name)
    if choices is not None and value not in choices:
        raise InvalidDsnError(f"has the parameter {name}, which must be one of {', '.join(choices)}")
    return name in _HONOURED


def _check_together(parameters: Mapping[str, str]) -> None:
    wanted = parameters.get("target_session_attrs")
    if wanted in _NOT_WRITABLE:
        raise InvalidDsnError(f"has target_session_attrs={wanted}, but keyproxy needs the primary, because it writes")
    mode = parameters.get("sslmode")
    if parameters.get("sslrootcert") == "system" and mode not in (None, "verify-full"):
        raise InvalidDsnError(f"has sslrootcert=system, which needs sslmode=verify-full, not {mode}")
    if parameters.get("sslnegotiation") == "direct" and mode not in ("require", "verify-ca", "verify-full"):
        raise InvalidDsnError("has sslnegotiation=direct, which needs sslmode=require, verify-ca or verify-full")
    if "hostaddr" in parameters and mode == "verify-full":
        raise InvalidDsnError("has hostaddr, which cannot be combined with sslmode=verify-full: set only host")


def _hosts(parameters: dict[str, str]) -> tuple[tuple[str, int | None], ...]:
    names, ports = parameters.pop("host", ""), parameters.pop("port", "")
    addresses = parameters.pop("hostaddr", "")
    if not (names or addresses):
        return (("", _port(ports)),) if ports else ()
    hosts = [_host(name) for name in (names or addresses).split(",")]
    if ports:
        given = ports.split(",")
        if len(given) not in (1, len(hosts)):
            raise InvalidDsnError(f"has {len(given)} ports for {len(hosts)} hosts")
        numbers = [_port(one) for one in given] * (len(hosts) if len(given) == 1 else 1)
        hosts = [(name, number if own is None else own) for (name, own), number in zip(hosts, numbers, strict=True)]
    if addresses:
        if addresses.count(",") + 1 != len(hosts):
            raise InvalidDsnError("has a different number of hostaddr values than of hosts")
        hosts = [(address, port) for address, (_, port) in zip(addresses.split(","), hosts, strict=True)]
    return tuple(hosts)


def _host(text: str) -> tuple[str, int | None]:
    if text.startswith("/") or (text.count(":") > 1 and not text.startswith("[")):
        # A directory of sockets, or an IPv6 address in the parameter host, where it has no brackets.
        return text, None
    match = _HOST.fullmatch(text)
    if match is None:
        raise InvalidDsnError("has an invalid host: write name, name:port, [ipv6]:port or /directory")
    return match[1] or match[3] or "", _port(match[2] or match[4] or "")


def _port(text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) <= 65_535:
        raise InvalidDsnError("has an invalid port")
    return int(text)

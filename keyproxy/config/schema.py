"""The configuration as values: every table and key of config.example.toml, its type, default and bounds.

`loader` reads the file and the environment into these types. A key is declared once, with its default, its check, and
whether it is a secret. A name ends with its unit, the same as in the metrics.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from keyproxy.ai.models import Model
from keyproxy.config import addresses, dsn, token_settings
from keyproxy.config.token_settings import Money, Tokens
from keyproxy.http import error_responses, webhook_signature
from keyproxy.http.headers import TrustRule
from keyproxy.http.routes import InvalidPatternError, RouteTable
from keyproxy.model import Route

#: Returns the fault of a value, or None.
Check = Callable[[Any], str | None]


def _setting(default: Any, check: Check | None = None, *, secret: bool = False) -> Any:
    metadata = {"check": check, "secret": secret}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _within(low: float, high: float = 1e12) -> Check:
    def wrong(value: Any) -> str | None:
        if low <= value <= high:
            return None
        if high < 1e12:
            return f"must be at least {low:g} and at most {high:g}"
        return f"must be at least {low:g}" if value < low else f"is too large: at most {high:.0f}"

    return wrong


def _one_of(*choices: object) -> Check:
    return lambda value: None if value in choices else "must be " + " or ".join(repr(one) for one in choices)


def _not_yet(default: object) -> Check:
    return lambda value: None if value == default else f"this version supports only {default!r}"


def _optional_upstream_url(value: str) -> str | None:
    return None if value == "" else addresses.wrong_with_upstream(value)


def _dsn(value: str) -> str | None:
    if value == "embedded":
        return None
    if not value.startswith(("postgresql://", "postgres://")):
        return "must be 'embedded' or 'postgresql://…'"
    try:
        dsn.parse(value)
    except dsn.InvalidDsnError as error:
        return str(error)
    return None


#: Header names with another meaning to this proxy, which the prefix must not cover.
_TAKEN_NAMES: Final = ("x-forwarded-", "x-api-key", "x-request-id", "x-real-ip")


def _header_prefix(value: str) -> str | None:
    if not re.fullmatch(r"X-[A-Za-z0-9-]{1,40}-", value):
        return "must look like 'X-Name-'"
    taken = [name for name in _TAKEN_NAMES if name.startswith(value.lower()) or value.lower().startswith(name)]
    return f"would cover {taken[0]}" if taken else None


def _key_prefix(value: str) -> str | None:
    return None if re.fullmatch(r"[a-z][a-z0-9]{0,15}", value) else "must be 1 to 16 of a-z and 0-9"


#: The options allowed in the query of a Redis URL.
_REDIS_OPTIONS: Final = frozenset(
    {"db", "username", "password", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
)


def _ledger_backend(value: str) -> str | None:
    if value == "postgres":
        return None
    wanted = "must be 'postgres', 'redis://host[:port][/db]', 'rediss://…' or 'unix:///path[?db=N]'"
    try:
        parts = urlsplit(value)
        has_address = parts.path.startswith("/") if parts.scheme == "unix" else bool(parts.hostname and parts.port != 0)
    except ValueError:
        return wanted
    if parts.scheme not in ("redis", "rediss", "unix") or not has_address or parts.fragment:
        return wanted
    if parts.scheme != "unix" and not re.fullmatch(r"/?[0-9]*", parts.path):
        return "must have a database number after the host, or nothing"
    unknown = {name.partition("=")[0] for name in parts.query.split("&")} - _REDIS_OPTIONS - {""}
    return f"has unknown options; known options: {', '.join(sorted(_REDIS_OPTIONS))}" if unknown else None


def _webhook_url(value: str) -> str | None:
    return None if value == "" else webhook_signature.what_is_wrong_with(value)


def _webhook_secret(value: str) -> str | None:
    try:
        webhook_signature.key_of(value) if value else None
    except webhook_signature.InvalidSecretError as error:
        return str(error)
    return None


def _thresholds(value: list[int]) -> str | None:
    if not 1 <= len(value) <= 10 or len(set(value)) < len(value) or not all(1 <= days <= 365 for days in value):
        return "must be 1 to 10 different numbers of days, each from 1 to 365"
    return None


#: The access log without successes.
REFUSALS: Final = "refusals"


def _access(value: bool | str | float) -> str | None:
    if isinstance(value, bool) or value == REFUSALS or (isinstance(value, float) and 0.0 < value <= 1.0):
        return None
    return f"must be true, false, {REFUSALS!r}, or the fraction of successes to log, above 0 and at most 1"


def _networks(value: list[str]) -> str | None:
    try:
        TrustRule(value)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Listen:
    """The proxied port."""

    address: str = _setting("127.0.0.1:8080", addresses.wrong_with_listener)
    socket_mode: str = _setting("0600", addresses.wrong_with_mode)
    workers: int = _setting(1, _within(0, 256))
    tls_certificate_file: str = _setting("")
    tls_key_file: str = _setting("")
    tls_client_ca_file: str = _setting("")
    connections_max: int = _setting(10_000, _within(1))
    header_timeout_seconds: float = _setting(10.0, _within(0.05))
    body_idle_timeout_seconds: float = _setting(30.0, _within(0.05))
    keepalive_timeout_seconds: float = _setting(75.0, _within(0.05))
    header_bytes_max: int = _setting(32_768, _within(1024, 1 << 20))
    body_bytes_max: int = _setting(104_857_600, _within(0))
    linger_seconds: float = _setting(0.0, _within(0, 3_600))
    drain_seconds: float = _setting(30.0, _within(0))
    trusted_proxies: list[str] = _setting([], _networks)


@dataclass(frozen=True, slots=True)
class Ops:
    """The ops listener: /livez /readyz /metrics."""

    address: str = _setting("127.0.0.1:9090", addresses.wrong_with_listener)
    socket_mode: str = _setting("0600", addresses.wrong_with_mode)


@dataclass(frozen=True, slots=True)
class Admin:
    """The control plane."""

    address: str = _setting("127.0.0.1:8081", addresses.wrong_with_listener)
    socket_mode: str = _setting("0600", addresses.wrong_with_mode)
    token_file: str = _setting("")
    tls_certificate_file: str = _setting("")
    tls_key_file: str = _setting("")
    connections_max: int = _setting(256, _within(1))


@dataclass(frozen=True, slots=True)
class Upstream:
    """The compute server."""

    url: str = _setting("http://127.0.0.1:9000", addresses.wrong_with_upstream)
    test_url: str = _setting("", _optional_upstream_url)
    tls_ca_file: str = _setting("")
    connections_max: int = _setting(256, _within(1))
    connections_per_user_max: int = _setting(0, _within(0))
    connect_timeout_seconds: float = _setting(2.0, _within(0.01))
    first_byte_timeout_seconds: float = _setting(60.0, _within(0.05))
    idle_timeout_seconds: float = _setting(300.0, _within(0.05))


@dataclass(frozen=True, slots=True)
class Store:
    """PostgreSQL."""

    dsn: str = _setting("embedded", _dsn, secret=True)
    embedded_dir: str = _setting("")
    pool_size_max: int = _setting(4, _within(1, 1000))
    statement_timeout_seconds: float = _setting(2.0, _within(0.05))


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of identities from the store."""

    fresh_seconds: float = _setting(30.0, _within(0.1))
    stale_seconds: float = _setting(600.0, _within(0.1))
    unknown_seconds: float = _setting(5.0, _within(0.1))
    entries_max: int = _setting(100_000, _within(1))
    unknown_entries_max: int = _setting(100_000, _within(1))


@dataclass(frozen=True, slots=True)
class IdentityHeaders:
    """The headers that the upstream trusts."""

    header_prefix: str = _setting("X-Keyproxy-", _header_prefix)


@dataclass(frozen=True, slots=True)
class Keys:
    """The format and lifetime of keys."""

    prefix: str = _setting("kp", _key_prefix)
    age_days_max: int = _setting(90, _within(0, 36_500))
    accept_foreign: bool = _setting(True)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger, which accounts for the windows of limits."""

    backend: str = _setting("postgres", _ledger_backend, secret=True)
    lease_seconds: float = _setting(10.0, _within(0.5))
    settle_seconds: float = _setting(0.5, _within(0.05))
    unreachable: str = _setting("refuse", _one_of("refuse", "allow"))


@dataclass(frozen=True, slots=True)
class Usage:
    """The retention of usage data."""

    #: Events are kept by the day they were written, sums by the day they cover.
    event_days: int = _setting(7, _within(0, 3_650))
    days: int = _setting(400, _within(1, 36_500))


@dataclass(frozen=True, slots=True)
class Reminders:
    """Webhook reminders about keys that expire soon. Without a URL none are sent."""

    webhook_url: str = _setting("", _webhook_url)
    webhook_secret: str = _setting("", _webhook_secret, secret=True)
    before_days: list[int] = _setting([14, 3, 1], _thresholds)


@dataclass(frozen=True, slots=True)
class Errors:
    """Statuses that the operator may choose."""

    invalid_key_status: int = _setting(401, _one_of(401, 403))
    spent_status: int = _setting(429, _one_of(429, 402))


@dataclass(frozen=True, slots=True)
class Log:
    """Log levels and the access log."""

    level: str = _setting("info", _one_of("debug", "info", "warning", "error"))
    #: The requests to log: all, none, refusals and failures, or these and a fraction of the others.
    access: bool | str | float = _setting(True, _access)

    @property
    def success_share(self) -> float:
        """The fraction of successes in the access log, if it is enabled."""
        return float(self.access) if isinstance(self.access, float) else float(self.access != REFUSALS)


def _route_match(value: str) -> str | None:
    try:
        RouteTable([(value, Route(value))])
    except InvalidPatternError as error:
        return str(error)
    return None


def _route_scopes(value: list[str]) -> str | None:
    bad = [scope for scope in value if not is_scope(scope)]
    return f"{bad[0]!r} is not a valid scope" if bad else None


@dataclass(frozen=True, slots=True)
class RouteRow:
    """One row of the route table, as configured."""

    match: str = _setting("", _route_match)
    scopes: list[str] = _setting([], _route_scopes)
    error_shape: str = _setting("problem", _one_of(*error_responses.ERROR_SHAPES))
    tokens: str = _setting("none", _one_of(*token_settings.TOKEN_DIALECTS))
    name: str = _setting("", token_settings.route_name_fault)
    model: str = _setting("", token_settings.model_fault)
    cap: str = _setting("", _one_of(*token_settings.CAPS))
    cap_field: str = _setting("", token_settings.cap_field_fault)
    idempotency: str = _setting("once", _one_of(*token_settings.IDEMPOTENCY))


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration."""

    listen: Listen = field(default_factory=Listen)
    ops: Ops = field(default_factory=Ops)
    admin: Admin = field(default_factory=Admin)
    upstream: Upstream = field(default_factory=Upstream)
    store: Store = field(default_factory=Store)
    cache: Cache = field(default_factory=Cache)
    identity: IdentityHeaders = field(default_factory=IdentityHeaders)
    keys: Keys = field(default_factory=Keys)
    ledger: Ledger = field(default_factory=Ledger)
    usage: Usage = field(default_factory=Usage)
    reminders: Reminders = field(default_factory=Reminders)
    errors: Errors = field(default_factory=Errors)
    log: Log = field(default_factory=Log)
    tokens: Tokens = field(default_factory=Tokens)
    money: Money = field(default_factory=Money)
    models: tuple[Model, ...] = ()
    routes: tuple[RouteRow, ...] = ()

    def listeners(self) -> dict[str, str]:
        """The address of each listener, by configuration key."""
        return {
            "listen.address": self.listen.address, "ops.address": self.ops.address, "admin.address": self.admin.address,
        }  # fmt: skip

    def upstream_urls(self) -> dict[str, str]:
        """The configured upstreams, by configuration key."""
        urls = {"upstream.url": self.upstream.url, "upstream.test_url": self.upstream.test_url}
        return {key: url for key, url in urls.items() if url}

    def route_table(self) -> RouteTable:
        """The compiled route table. Raises InvalidPatternError."""
        return RouteTable(
            [
                (row.match, Route(row.name or row.match, frozenset(row.scopes), row.error_shape, row.tokens))
                for row in self.routes
            ]
        )


#: Every table of the configuration, by its name in the file.
TABLES: Final[dict[str, type[Any]]] = {
    table.name: table.default_factory  # type: ignore[misc]
    for table in dataclasses.fields(Settings)
    if table.name not in ("models", "routes")
}

_SCOPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")


def is_scope(text: str) -> bool:
    """Whether this is a valid scope, such as `jobs:write`; no wildcards, no spaces."""
    return _SCOPE.fullmatch(text) is not None


def cross_checks(settings: Settings) -> list[str]:
    """The contradictions between keys that are valid individually."""
    wrong = []
    if settings.cache.stale_seconds < settings.cache.fresh_seconds:
        wrong.append("cache.stale_seconds: must not be less than cache.fresh_seconds")
    wrong += addresses.conflicts(settings.listeners(), settings.upstream_urls())
    if settings.listen.address.startswith("unix:") and settings.listen.workers != 1:
        wrong.append("listen.workers: must be 1 with a unix socket: only a port can be shared by several processes")
    if settings.listen.tls_key_file and not settings.listen.tls_certificate_file:
        wrong.append("listen.tls_key_file: is set without listen.tls_certificate_file")
    if settings.admin.tls_key_file and not settings.admin.tls_certificate_file:
        wrong.append("admin.tls_key_file: is set without admin.tls_certificate_file")
    if settings.listen.tls_client_ca_file and not settings.listen.tls_certificate_file:
        wrong.append("listen.tls_client_ca_file: is set without listen.tls_certificate_file: mutual TLS needs TLS")
    if settings.reminders.webhook_url and not settings.reminders.webhook_secret:
        wrong.append(
            "reminders.webhook_secret: is required with reminders.webhook_url; generate one with"
            " `echo whsec_$(openssl rand -base64 32)`"
        )
    wrong += token_settings.conflicts(
        settings.tokens, [(row.match, row.tokens, row.model, row.cap, row.cap_field) for row in settings.routes]
    )
    matches = [row.match for row in settings.routes]
    wrong += [
        f"routes: {match!r} is configured twice; the first one always wins"
        for match in {match for match in matches if matches.count(match) > 1}
    ]
    return wrong

"""The configuration as values: every table and key of config.example.toml, its type, default and bounds.

`loader` reads the file and the environment into these types. A key is declared once, with its default, its check, and
whether it is a secret. A name ends with its unit, the same as in the metrics.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final

from keyproxy.ai import prompts
from keyproxy.ai.categories import Category
from keyproxy.ai.models import Model
from keyproxy.ai.tools.tool import MCP
from keyproxy.config import (
    addresses,
    bind_settings,
    categories,
    delegation_settings,
    route_access,
    route_serves,
    token_settings,
    value_checks,
)
from keyproxy.config.categories import CategoryKeys
from keyproxy.config.delegation_settings import AccessSettings
from keyproxy.config.oauth import oauth_checks
from keyproxy.config.oauth.oauth_settings import KnownClientRow, OAuthLogin, OAuthSettings
from keyproxy.config.token_settings import Money, Tokens
from keyproxy.config.tools import tool_contradictions
from keyproxy.config.tools.anomaly_settings import AnomalySettings
from keyproxy.config.tools.provider_settings import ProviderRow, SecretSettings
from keyproxy.config.tools.tool_settings import ApprovalSettings, McpSettings, ToolRow
from keyproxy.config.value_checks import one_of, within
from keyproxy.config.value_types import OneOrMany, setting
from keyproxy.http import error_responses
from keyproxy.http.routes import RouteTable
from keyproxy.model import AGENT_TOKENS, Route

_REQUIRED: Final = "required"
_OPTIONAL: Final = "optional"


@dataclass(frozen=True, slots=True)
class Listen:
    """The proxied port."""

    address: str = setting("127.0.0.1:8080", addresses.listener_problem)
    socket_mode: str = setting("0600", addresses.mode_problem)
    workers: int = setting(1, within(0, 256))
    tls_certificate_file: str = setting("")
    tls_key_file: str = setting("")
    tls_client_ca_file: str = setting("")
    #: Empty: "optional" if a tool demands a certificate itself, else "required".
    tls_client_certificate: str = setting("", one_of("", _REQUIRED, _OPTIONAL))
    connections_max: int = setting(10_000, within(1))
    header_timeout_seconds: float = setting(10.0, within(0.05))
    body_idle_timeout_seconds: float = setting(30.0, within(0.05))
    keepalive_timeout_seconds: float = setting(75.0, within(0.05))
    header_bytes_max: int = setting(32_768, within(1024, 1 << 20))
    body_bytes_max: int = setting(104_857_600, within(0))
    linger_seconds: float = setting(0.0, within(0, 3_600))
    drain_seconds: float = setting(30.0, within(0))
    trusted_proxies: list[str] = setting([], value_checks.trusted_networks)


@dataclass(frozen=True, slots=True)
class Ops:
    """The ops listener: /livez /readyz /metrics."""

    address: str = setting("127.0.0.1:9090", addresses.listener_problem)
    socket_mode: str = setting("0600", addresses.mode_problem)


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """The control plane."""

    address: str = setting("127.0.0.1:8081", addresses.listener_problem)
    socket_mode: str = setting("0600", addresses.mode_problem)
    token_file: str = setting("")
    tls_certificate_file: str = setting("")
    tls_key_file: str = setting("")
    connections_max: int = setting(256, within(1))


@dataclass(frozen=True, slots=True)
class Upstream:
    """The compute server."""

    url: str = setting("http://127.0.0.1:9000", addresses.upstream_problem)
    test_url: str = setting("", value_checks.optional_upstream_url)
    tls_ca_file: str = setting("")
    connections_max: int = setting(256, within(1))
    connections_per_user_max: int = setting(0, within(0))
    connect_timeout_seconds: float = setting(2.0, within(0.01))
    first_byte_timeout_seconds: float = setting(60.0, within(0.05))
    idle_timeout_seconds: float = setting(300.0, within(0.05))


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The connection to PostgreSQL."""

    dsn: str = setting("embedded", value_checks.store_dsn, secret=True)
    embedded_dir: str = setting("")
    pool_size_max: int = setting(4, within(1, 1000))
    statement_timeout_seconds: float = setting(2.0, within(0.05))


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of identities from the store."""

    fresh_seconds: float = setting(30.0, within(0.1))
    stale_seconds: float = setting(600.0, within(0.1))
    unknown_seconds: float = setting(5.0, within(0.1))
    entries_max: int = setting(100_000, within(1))
    unknown_entries_max: int = setting(100_000, within(1))
    acting_entries_max: int = setting(100_000, within(1))


@dataclass(frozen=True, slots=True)
class IdentityHeaders:
    """The headers that the upstream trusts."""

    header_prefix: str = setting("X-Keyproxy-", value_checks.header_prefix)
    #: Whether headers that override method or target go upstream.
    forward_overrides: bool = setting(False)


@dataclass(frozen=True, slots=True)
class KeySettings:
    """The format and lifetime of keys."""

    prefix: str = setting("kp", value_checks.key_prefix)
    age_days_max: int = setting(90, within(0, 36_500))
    accept_foreign: bool = setting(True)


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """The ledger, which accounts for the windows of limits."""

    backend: str = setting("postgres", value_checks.ledger_backend, secret=True)
    lease_seconds: float = setting(10.0, within(0.5))
    settle_seconds: float = setting(0.5, within(0.05))
    unreachable: str = setting("refuse", one_of("refuse", "allow"))


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """How limits count requests."""

    idempotency_repeats_max: int = setting(3, within(0, 1_000))


@dataclass(frozen=True, slots=True)
class Usage:
    """The retention of usage data."""

    #: Events are kept by the day they were written, sums by the day they cover.
    event_days: int = setting(7, within(0, 3_650))
    days: int = setting(400, within(1, 36_500))


@dataclass(frozen=True, slots=True)
class ReminderSettings:
    """Webhook reminders about keys that expire soon. Without a URL none are sent."""

    webhook_url: str = setting("", value_checks.webhook_url)
    webhook_secret: str = setting("", value_checks.webhook_secret, secret=True)
    before_days: list[int] = setting([14, 3, 1], value_checks.days_before)


@dataclass(frozen=True, slots=True)
class AlertSettings:
    """Webhook alerts about limits that are nearly spent. Without a URL none are sent."""

    #: Of limit and credits; 100 is also reached by the first refusal.
    percentages: list[int] = setting([80, 100], value_checks.percentages)
    webhook_url: str = setting("", value_checks.webhook_url)
    webhook_secret: str = setting("", value_checks.webhook_secret, secret=True)


@dataclass(frozen=True, slots=True)
class Errors:
    """Statuses that the operator may choose."""

    invalid_key_status: int = setting(401, one_of(401, 403))
    spent_status: int = setting(429, one_of(429, 402))


@dataclass(frozen=True, slots=True)
class Log:
    """Log levels and the access log."""

    level: str = setting("info", one_of("debug", "info", "warning", "error"))
    #: The requests to log: all, none, refusals and failures, or these and a fraction of the others.
    access: bool | str | float = setting(True, value_checks.access_log)
    #: How much of a client's address is recorded; `network`: its /24 or /48.
    client_address: str = setting("full", one_of("full", "network", "none"))

    @property
    def success_share(self) -> float:
        """The fraction of successes in the access log, if it is enabled."""
        return float(self.access) if isinstance(self.access, float) else float(self.access != value_checks.REFUSALS)


@dataclass(frozen=True, slots=True)
class RouteRow:
    """One row of the route table, as configured."""

    match: str = setting("", value_checks.route_match)
    scopes: list[str] = setting([], value_checks.route_scopes)
    #: Empty: "mcp" with that protocol, else "problem".
    error_shape: str = setting("", one_of("", *error_responses.ERROR_SHAPES))
    tokens: str = setting("none", one_of(*token_settings.TOKEN_DIALECTS))
    name: str = setting("", token_settings.route_name_fault)
    model: str = setting("", token_settings.model_fault)
    cap: str = setting("", one_of(*token_settings.CAPS))
    cap_field: str = setting("", token_settings.cap_field_fault)
    idempotency: str = setting("once", one_of(*token_settings.IDEMPOTENCY))
    binds: list[dict[str, str]] = setting([], bind_settings.binds_fault)
    prompt: str = setting("", one_of("", *prompts.SHAPES))
    category: OneOrMany = setting([], categories.category_fault)
    unregistered: str = setting("", categories.unregistered_fault)
    access: str = setting(route_access.KEY, one_of(route_access.KEY, route_access.PUBLIC))
    encoded_slash: str = setting(route_access.REFUSE, one_of(route_access.REFUSE, route_access.FORWARD))
    serves: str = setting("", one_of("", AGENT_TOKENS))
    tool: str = setting("", value_checks.optional_tool_name)
    protocol: str = setting("", one_of("", MCP))
    filter_tools_list: bool = setting(False)
    provider: str = setting("", value_checks.optional_tool_name)


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration."""

    listen: Listen = field(default_factory=Listen)
    ops: Ops = field(default_factory=Ops)
    admin: AdminSettings = field(default_factory=AdminSettings)
    upstream: Upstream = field(default_factory=Upstream)
    store: StoreSettings = field(default_factory=StoreSettings)
    cache: Cache = field(default_factory=Cache)
    identity: IdentityHeaders = field(default_factory=IdentityHeaders)
    keys: KeySettings = field(default_factory=KeySettings)
    access: AccessSettings = field(default_factory=AccessSettings)
    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    usage: Usage = field(default_factory=Usage)
    reminders: ReminderSettings = field(default_factory=ReminderSettings)
    alerts: AlertSettings = field(default_factory=AlertSettings)
    errors: Errors = field(default_factory=Errors)
    log: Log = field(default_factory=Log)
    tokens: Tokens = field(default_factory=Tokens)
    money: Money = field(default_factory=Money)
    mcp: McpSettings = field(default_factory=McpSettings)
    approvals: ApprovalSettings = field(default_factory=ApprovalSettings)
    secrets: SecretSettings = field(default_factory=SecretSettings)
    anomalies: AnomalySettings = field(default_factory=AnomalySettings)
    oauth: OAuthSettings = field(default_factory=OAuthSettings)
    oauth_login: OAuthLogin = field(default_factory=OAuthLogin)
    models: tuple[Model, ...] = ()
    categories: tuple[Category, ...] = ()
    tools: tuple[ToolRow, ...] = ()
    providers: tuple[ProviderRow, ...] = ()
    #: Empty: those of the package.
    oauth_known_clients: tuple[KnownClientRow, ...] = ()
    routes: tuple[RouteRow, ...] = ()

    def listeners(self) -> dict[str, str]:
        """The address of each listener, by configuration key."""
        found = {
            "listen.address": self.listen.address,
            "ops.address": self.ops.address,
            "admin.address": self.admin.address,
        }
        if self.oauth.is_configured:
            found["oauth.address"] = self.oauth.address
            found["oauth.ops_address"] = self.oauth.ops_address
            if self.oauth.mtls_address:
                found["oauth.mtls_address"] = self.oauth.mtls_address
        return found

    @property
    def requires_client_certificates(self) -> bool:
        """Whether every connection to the proxied port needs a certificate, if those of clients are verified."""
        stated = self.listen.tls_client_certificate
        return stated == _REQUIRED or not (stated or any(tool.client_certificate for tool in self.tools))

    def upstream_urls(self) -> dict[str, str]:
        """The configured upstreams, by configuration key."""
        urls = {"upstream.url": self.upstream.url, "upstream.test_url": self.upstream.test_url}
        return {key: url for key, url in urls.items() if url}

    def route_table(self) -> RouteTable:
        """The compiled route table. Raises InvalidPatternError."""
        scopes = {tool.name: frozenset(tool.scopes) for tool in self.tools}
        return RouteTable(
            [
                (
                    row.match,
                    Route(
                        row.name or row.match, frozenset(row.scopes), _error_shape(row), row.tokens,
                        deduplicates=row.idempotency == token_settings.ONCE and not row.serves,
                        is_public=row.access == route_access.PUBLIC,
                        forwards_encoded_slash=row.encoded_slash == route_access.FORWARD,
                        serves=row.serves,
                        tool=row.tool, protocol=row.protocol, provider=row.provider,
                        filters_tools_list=row.filter_tools_list,
                        tool_scopes=scopes.get(row.tool, frozenset()),
                    ),
                )
                for row in self.routes
            ]
        )  # fmt: skip


#: Every table of the configuration, by its name in the file.
TABLES: Final[dict[str, type[Any]]] = {
    table.name.replace("_", "."): table.default_factory  # type: ignore[misc]
    for table in dataclasses.fields(Settings)
    if table.name not in ("models", "categories", "tools", "providers", "routes", "oauth_known_clients")
}


def attribute(table: str) -> str:
    """The attribute of Settings for a table, which may stand within another one, as in `[oauth.login]`."""
    return table.replace(".", "_")


def _error_shape(row: RouteRow) -> str:
    return row.error_shape or (MCP if row.protocol == MCP else "problem")


def cross_checks(settings: Settings) -> list[str]:
    """The contradictions between keys that are valid individually."""
    wrong = []
    if settings.cache.stale_seconds < settings.cache.fresh_seconds:
        wrong.append("cache.stale_seconds: must not be less than cache.fresh_seconds")
    wrong += delegation_settings.conflicts(settings.access)
    wrong += addresses.conflicts(settings.listeners(), settings.upstream_urls())
    if settings.listen.address.startswith("unix:") and settings.listen.workers != 1:
        wrong.append("listen.workers: must be 1 with a unix socket: only a port can be shared by several processes")
    if settings.listen.tls_key_file and not settings.listen.tls_certificate_file:
        wrong.append("listen.tls_key_file: is set without listen.tls_certificate_file")
    if settings.admin.tls_key_file and not settings.admin.tls_certificate_file:
        wrong.append("admin.tls_key_file: is set without admin.tls_certificate_file")
    if settings.listen.tls_client_ca_file and not settings.listen.tls_certificate_file:
        wrong.append("listen.tls_client_ca_file: is set without listen.tls_certificate_file: mutual TLS needs TLS")
    if settings.listen.tls_client_certificate and not settings.listen.tls_client_ca_file:
        wrong.append(
            "listen.tls_client_certificate: is set without listen.tls_client_ca_file, which verifies certificates"
        )
    wrong += [
        f"{table}.webhook_secret: is required with {table}.webhook_url; generate one with"
        " `echo whsec_$(openssl rand -base64 32)`"
        for table, webhook in (
            ("reminders", settings.reminders),
            ("alerts", settings.alerts),
            ("approvals", settings.approvals),
            ("anomalies", settings.anomalies),
        )
        if webhook.webhook_url and not webhook.webhook_secret
    ]
    wrong += token_settings.conflicts(
        settings.tokens, [(row.match, row.tokens, row.model, row.cap, row.cap_field) for row in settings.routes]
    )
    wrong += [
        f"routes[{number}].{fault}"
        for number, row in enumerate(settings.routes, start=1)
        for fault in (
            *bind_settings.place_faults(
                row.match, bind_settings.read_binds(row.binds), settings.identity.header_prefix
            ),
            *bind_settings.header_faults(row.model, row.category, settings.identity.header_prefix),
        )
    ]
    wrong += categories.conflicts(
        settings.categories,
        [CategoryKeys(row.prompt, row.category, row.unregistered) for row in settings.routes],
    )
    wrong += route_access.contradictions(settings.routes)
    wrong += route_serves.contradictions(settings.routes)
    wrong += tool_contradictions.contradictions(settings)
    wrong += oauth_checks.contradictions(settings)
    matches = [row.match for row in settings.routes]
    wrong += [
        f"routes: {match!r} is configured twice; the first one always wins"
        for match in {match for match in matches if matches.count(match) > 1}
    ]
    return wrong

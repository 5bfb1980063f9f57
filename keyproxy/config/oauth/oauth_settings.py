"""The table `[oauth]`, the table `[oauth.login]` in it, and the programs that are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keyproxy.config import addresses, value_checks
from keyproxy.config.value_checks import one_of, within
from keyproxy.config.value_types import setting

#: Which clients may register: any, only those with the redirect URIs of a known client, or none.
OPEN: Final = "open"
LISTED: Final = "listed"
OFF: Final = "off"

#: The languages of the pages. The names are those of BCP 47.
LANGUAGES: Final = ("en", "ko", "ja")

LOGIN_BY_KEY: Final = "key"
LOGIN_BY_OIDC: Final = "oidc"
LINK: Final = "link"
CREATE: Final = "create"


def _optional_listener(value: str) -> str | None:
    return addresses.listener_problem(value) if value else None


@dataclass(frozen=True, slots=True)
class OAuthSettings:
    """The authorization server. Without `resource` there is none, and proxies accept no OAuth tokens."""

    address: str = setting("127.0.0.1:8082", addresses.listener_problem)
    socket_mode: str = setting("0600", addresses.mode_problem)
    ops_address: str = setting("127.0.0.1:9091", addresses.listener_problem)
    tls_certificate_file: str = setting("")
    tls_key_file: str = setting("")
    connections_max: int = setting(256, within(1))
    trusted_proxies: list[str] = setting([], value_checks.trusted_networks)
    mtls_address: str = setting("", _optional_listener)
    mtls_client_ca_file: str = setting("")
    issuer: str = setting("")
    resource: str = setting("")
    test_resource: str = setting("")
    scopes: list[str] = setting([], value_checks.offered_scopes)
    secret_file: str = setting("")
    secret_previous_file: str = setting("")
    access_token_seconds: int = setting(900, within(60, 86_400))
    refresh_idle_days: int = setting(30, within(1, 3_650))
    session_days: int = setting(90, within(1, 3_650))
    grant_days: int = setting(90, within(1, 3_650))
    refresh_grace_seconds: int = setting(60, within(0, 600))
    registration: str = setting(OPEN, one_of(OPEN, LISTED, OFF))
    redirect_hosts: list[str] = setting([])
    documents: str = setting(OPEN, one_of(OPEN, OFF))
    document_hosts: list[str] = setting([])
    document_networks: list[str] = setting([])
    document_ca_file: str = setting("")
    language: str = setting("en", one_of(*LANGUAGES))

    @property
    def is_configured(self) -> bool:
        """Whether proxies accept OAuth tokens."""
        return bool(self.resource)


@dataclass(frozen=True, slots=True)
class OAuthLogin:
    """How users sign in before they consent."""

    kind: str = setting(LOGIN_BY_KEY, one_of(LOGIN_BY_KEY, LOGIN_BY_OIDC))
    issuer: str = setting("")
    client_id: str = setting("")
    client_secret_file: str = setting("")
    ca_file: str = setting("")
    scopes: list[str] = setting(["openid"])
    subject_claims: list[str] = setting(["sub"])
    tenant_claim: str = setting("")
    #: The tenant of each value of that claim.
    tenants: dict[str, str] = setting({})
    provision: str = setting(LINK, one_of(LINK, CREATE))


@dataclass(frozen=True, slots=True)
class KnownClientRow:
    """One row of `oauth.known_clients`, as configured. `{}` in a redirect URI stands for one path segment."""

    name: str = setting("")
    redirect_uris: list[str] = setting([])
    client_ids: list[str] = setting([])

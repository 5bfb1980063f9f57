"""What an OpenID provider publishes about itself. OpenID Connect Discovery 1.0, RFC 8414, RFC 9207."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from keyproxy.signing.key_sets import ALGORITHMS

_SELECT_ACCOUNT: Final = "select_account"
_LOGIN: Final = "login"


class ProviderUnavailable(Exception):
    """The provider does not respond, or not with what the protocol requires. The text is for the operator."""


@dataclass(frozen=True, slots=True)
class ProviderMetadata:
    """The endpoints of a provider. `takes_basic`: the client authenticates by HTTP Basic, else in the form.

    `sends_issuer`: its responses have `iss`, RFC 9207. `account_prompt`: the `prompt` for which it asks for an account.
    """

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    takes_basic: bool
    sends_issuer: bool
    account_prompt: str

    @classmethod
    def parse(cls, text: bytes, issuer: str) -> ProviderMetadata:
        """Raises ProviderUnavailable for a document of another issuer, or of a provider that cannot be used."""
        document = _document(text)
        if document.get("issuer") != issuer:
            raise ProviderUnavailable("the discovery document is that of another issuer than oauth.login.issuer")
        algorithms = document.get("id_token_signing_alg_values_supported", ["RS256"])
        if not isinstance(algorithms, list) or not any(name in ALGORITHMS for name in algorithms):
            raise ProviderUnavailable(f"the provider signs id_tokens with none of {', '.join(ALGORITHMS)}")
        challenges = document.get("code_challenge_methods_supported")
        # Some providers support PKCE without publishing it.
        if isinstance(challenges, list) and "S256" not in challenges:
            raise ProviderUnavailable("the provider does not support PKCE with S256")
        methods = document.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        return cls(
            authorization_endpoint=_endpoint(document, "authorization_endpoint", issuer),
            token_endpoint=_endpoint(document, "token_endpoint", issuer),
            jwks_uri=_endpoint(document, "jwks_uri", issuer),
            takes_basic=not isinstance(methods, list) or "client_secret_basic" in methods,
            sends_issuer=document.get("authorization_response_iss_parameter_supported") is True,
            account_prompt=_account_prompt(document),
        )


def discovery_url(issuer: str) -> str:
    """Where the provider publishes its metadata."""
    return f"{issuer.removesuffix('/')}/.well-known/openid-configuration"


def _document(text: bytes) -> Mapping[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise ProviderUnavailable("the discovery document is not a JSON object")
    return document


def _endpoint(document: Mapping[str, Any], name: str, issuer: str) -> str:
    """The URL of an endpoint: https, unless the issuer itself is http on this machine."""
    url = document.get(name)
    if not isinstance(url, str):
        raise ProviderUnavailable(f"the discovery document has no {name}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ProviderUnavailable(f"{name} of the discovery document is not a URL") from None
    allowed = ("https", "http") if issuer.startswith("http:") else ("https",)
    if parts.scheme not in allowed or not parts.hostname or parts.fragment or parts.username is not None:
        raise ProviderUnavailable(f"{name} of the discovery document is not an https URL")
    return url


def _account_prompt(document: Mapping[str, Any]) -> str:
    """Google refuses `login`, and other providers do not support `select_account` but publish so."""
    supported = document.get("prompt_values_supported")
    if not isinstance(supported, list) or _SELECT_ACCOUNT in supported:
        return _SELECT_ACCOUNT
    return _LOGIN

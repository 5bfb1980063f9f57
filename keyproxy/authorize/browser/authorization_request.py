"""An authorization request, judged: the parameters of RFC 6749 section 4.1.1, RFC 7636, RFC 8707 and RFC 9207. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode

from keyproxy.authorize.browser.tickets import Content
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth import pkce, scopes
from keyproxy.oauth.oauth_error import OAuthError

#: Parameters of a response. A redirect URI with one of them would lead to a response with two of a name.
_OF_RESPONSES: Final = frozenset({"code", "state", "iss", "error", "error_description", "error_uri"})

#: Values of `prompt` (OpenID Connect) for users who want to sign in with another account.
_OTHER_ACCOUNT: Final = frozenset({"login", "select_account"})


@dataclass(frozen=True, slots=True)
class AuthorizationRequest:
    """A request without errors. `client_id`: as presented. `challenge`: the base64url text of 32 bytes.

    `prompt`: `login` if the user wants to use another account, else empty.
    """

    client_id: str
    redirect_uri: str
    state: str | None
    challenge: str
    resource: str
    is_test: bool
    scopes: tuple[str, ...]
    prompt: str = ""

    def content(self, language: str, client_name: str) -> Content:
        """The content of its tickets."""
        return {
            "client_name": client_name,
            "client_id": self.client_id,
            "redirect_uri": self.redirect_uri,
            "state": self.state,
            "challenge": self.challenge,
            "resource": self.resource,
            "is_test": self.is_test,
            "scopes": list(self.scopes),
            "prompt": self.prompt,
            "language": language,
        }

    @classmethod
    def of(cls, content: Content) -> AuthorizationRequest:
        """The request of a ticket."""
        return cls(
            client_id=content["client_id"],
            redirect_uri=content["redirect_uri"],
            state=content["state"],
            challenge=content["challenge"],
            resource=content["resource"],
            is_test=content["is_test"],
            scopes=tuple(content["scopes"]),
            prompt=content["prompt"],
        )

    def query(self, language: str) -> str:
        """The query of the same request, for a link that begins it again with another account."""
        parameters = {
            "response_type": "code",
            "client_id": self.client_id,
            "redirect_uri": self.redirect_uri,
            "code_challenge": self.challenge,
            "code_challenge_method": pkce.METHOD,
            "resource": self.resource,
            "prompt": "login",
            "ui_locales": language,
        }
        if self.scopes:
            parameters["scope"] = " ".join(self.scopes)
        if self.state is not None:
            parameters["state"] = self.state
        return urlencode(parameters, quote_via=quote)


def judge(
    parameters: Mapping[str, str], client_id: str, redirect_uri: str, settings: OAuthSettings
) -> AuthorizationRequest:
    """Judge a request whose client and redirect URI are good. Raises OAuthError, for the client."""
    response_type = parameters.get("response_type")
    if response_type is None:
        raise OAuthError("invalid_request", "response_type is missing")
    if response_type != "code":
        raise OAuthError("unsupported_response_type", "response_type must be code")
    challenge = _challenge(parameters)
    resource = _resource(parameters.get("resource"), settings)
    return AuthorizationRequest(
        client_id=client_id,
        redirect_uri=redirect_uri,
        state=parameters.get("state"),
        challenge=challenge,
        resource=resource,
        is_test=resource == settings.test_resource,
        scopes=_scopes(parameters.get("scope"), settings.scopes),
        prompt="login" if not _OTHER_ACCOUNT.isdisjoint(parameters.get("prompt", "").split()) else "",
    )


def has_response_parameters(redirect_uri: str) -> bool:
    """Whether the query of a redirect URI has a parameter that responses add."""
    # Not urlsplit, which fails for URIs such as https://[ that are judged only afterwards.
    query = redirect_uri.partition("?")[2]
    return bool(query) and any(name in _OF_RESPONSES for name, _ in parse_qsl(query, keep_blank_values=True))


def response_location(redirect_uri: str, state: str | None, issuer: str, values: Mapping[str, str]) -> str:
    """The redirect URI with the parameters of a response: `values`, the state, and exactly one `iss` (RFC 9207)."""
    parameters = dict(values)
    if state is not None:
        parameters["state"] = state
    parameters["iss"] = issuer
    separator = "&" if "?" in redirect_uri else "?"
    return f"{redirect_uri}{separator}{urlencode(parameters, quote_via=quote, safe='')}"


def _challenge(parameters: Mapping[str, str]) -> str:
    text = parameters.get("code_challenge")
    if text is None:
        raise OAuthError("invalid_request", "PKCE is required: code_challenge is missing")
    if parameters.get("code_challenge_method") != pkce.METHOD:
        raise OAuthError("invalid_request", "code_challenge_method must be S256")
    if pkce.challenge_of(text) is None:
        raise OAuthError("invalid_request", "code_challenge must be the base64url text of a SHA-256, 43 characters")
    return text


def _resource(presented: str | None, settings: OAuthSettings) -> str:
    if presented is None:
        return settings.resource
    resource = presented.removesuffix("/")
    if resource == settings.resource or (settings.test_resource and resource == settings.test_resource):
        return resource
    raise OAuthError("invalid_target", "resource is not one of this server")


def _scopes(text: str | None, offered: Sequence[str]) -> tuple[str, ...]:
    return scopes.granted(scopes.parse(text), offered)

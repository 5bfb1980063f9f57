"""Judges the rows behind a token request: pure, no change. Each check raises OAuthError."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth.client import Client
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.oauth.token_values import AccessTokenState, CodeExchange, RefreshExchange
from keyproxy.store.postgres.database import Row


def invalid_grant(description: str, detail: str) -> OAuthError:
    """The error for a code, a refresh token or a grant that does not work."""
    return OAuthError("invalid_grant", description, detail=detail)


def resources(rules: OAuthSettings) -> list[str]:
    """The resources that tokens are valid for."""
    return [one for one in (rules.resource, rules.test_resource) if one]


def wanted_resource(presented: str | None, rules: OAuthSettings) -> str | None:
    """The resource that a request names, one final `/` forgiven. None: it names none."""
    if presented is None:
        return None
    for known in resources(rules):
        if presented in (known, f"{known}/"):
            return known
    raise OAuthError("invalid_target", "The resource is not served here.", detail="unknown resource")


def is_replay(code: Row, shown: CodeExchange) -> bool:
    """Whether a redeemed code is presented with the right verifier. A wrong one is no evidence of a stolen code."""
    return bool(code["is_redeemed"]) and hmac.compare_digest(code["challenge"], shown.challenge)


def check_code(code: Row, client: Client, shown: CodeExchange, rules: OAuthSettings) -> None:
    """Check a code. A request with wrong values leaves it as it is."""
    if (code["client_row"], code["presented_as"]) != (client.row_id, client.presented_as):
        raise invalid_grant("The code was issued to another client.", "another client id")
    if not hmac.compare_digest(code["challenge"], shown.challenge):
        raise invalid_grant("'code_verifier' does not match the challenge.", "wrong verifier")
    # OAuth 2.1 has no redirect_uri at the token endpoint; OAuth 2.0 clients send the one of the authorization request.
    if shown.redirect_uri is not None and shown.redirect_uri != code["redirect_uri"]:
        raise invalid_grant("'redirect_uri' is not that of the authorization request.", "another redirect_uri")
    if code["is_expired"]:
        raise invalid_grant("The code has expired.", "expired code")
    check_account(code)
    check_resource(code, shown.resource, rules)


def check_refresh(token: Row, client: Client) -> None:
    """Check whose refresh token it is, and whether it or its session has expired."""
    # The row decides, which the client has been authenticated as: ids that were presented may mean another row today.
    if token["client_row"] != client.row_id:
        raise invalid_grant("The refresh token was issued to another client.", "another client id")
    if token["is_expired"]:
        raise invalid_grant("The refresh token has expired.", "expired refresh token")


def check_refresh_request(token: Row, shown: RefreshExchange, rules: OAuthSettings) -> None:
    """Check what a refresh asks for."""
    check_account(token)
    check_resource(token, shown.resource, rules)


def check_account(row: Row) -> None:
    """Check that the user may have tokens now."""
    if row["is_disabled"]:
        raise invalid_grant("The account is disabled.", "the user, the tenant or the key of the login does not work")


def check_resource(row: Row, presented: str | None, rules: OAuthSettings) -> None:
    """Check that the grant is for a resource that is served, and for the one that the request names."""
    wanted = wanted_resource(presented, rules)
    if row["resource"] not in resources(rules):
        raise invalid_grant("The grant is for a resource that is not served any more.", "another resource")
    if wanted is not None and wanted != row["resource"]:
        raise OAuthError("invalid_target", "The grant is for another resource.", detail="another resource")


def granted_scopes(row: Row, requested: frozenset[str] | None) -> tuple[str, ...]:
    """The scopes of a token: of the session, the grant and the request those that all have."""
    return _common(row["session_scopes"], row["grant_scopes"], requested)


def service_scopes(row: Row, requested: frozenset[str] | None) -> tuple[str, ...]:
    """The scopes of a token of a service grant."""
    return _common(row["grant_scopes"], row["grant_scopes"], requested)


def no_service_grant(*, has_one: bool) -> OAuthError:
    """The error for a client without a grant to itself for the resource."""
    if has_one:
        return OAuthError("invalid_target", "The client has no grant for this resource.", detail="another resource")
    return OAuthError("unauthorized_client", "The client has no grant to itself.", detail="no service grant")


def access_token_state(row: Row) -> AccessTokenState:
    """An access token as introspection shows it."""
    return AccessTokenState(
        scopes=tuple(sorted(row["scopes"])),
        client_id=row["presented_as"],
        user_id=row["user_id"],
        resource=row["resource"],
        issued_at=row["issued_at"],
        expires_at=row["expires_at"],
        bound_to=row["bound_to"],
    )


def _common(held: Iterable[str], granted: Iterable[str], requested: frozenset[str] | None) -> tuple[str, ...]:
    bounds = frozenset(held)
    common = bounds.intersection(granted)
    if requested is not None:
        common &= requested
    if not common and (bounds or requested):
        raise OAuthError("invalid_scope", "None of the scopes is granted.", detail="no scope is left")
    return tuple(sorted(common))

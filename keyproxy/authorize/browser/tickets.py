"""Tickets: the state of a login, carried by the browser instead of the server.

    <base64url of JSON>.<base64url of HMAC-SHA-256>

A ticket is readable, so that it holds no secrets, and bound to a cookie of the browser: a ticket that reaches another
browser, through a link or a referrer, is refused there. It serves one purpose, so that a ticket of a login cannot replace
the consent that follows it.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from keyproxy.authorize.endpoint import PageError
from keyproxy.config.oauth.oauth_settings import OAuthSettings

#: What a ticket holds: values that JSON can express.
Content: TypeAlias = dict[str, Any]

TICKET_SECONDS: Final = 600
USER_PAGE_SECONDS: Final = 900

#: A request holds at most 64 KiB; a state of a few KiB, a client id of 2,000 bytes and a redirect URI fit.
TICKET_CHARACTERS_MAX: Final = 32_768

_SECRET_BYTES_MIN: Final = 32


class SecretFileError(Exception):
    """A file of `oauth` does not hold a secret. The text is the reason."""


class Purpose(enum.Enum):
    """What a ticket is for."""

    LOGIN = "login"  # to sign in
    CONSENT = "consent"  # a user has signed in, and decides about an authorization
    USER_PAGE = "user_page"  # a user has signed in, and sees the connections


class Tickets:
    """Seals tickets, and opens them for the browser that they are bound to."""

    def __init__(self, secrets: Sequence[bytes], now: Callable[[], float]) -> None:
        """`secrets`: the current one, and the previous one during a rotation. `now`: Unix time."""
        self._secrets = tuple(secrets)
        self._now = now

    def seal(
        self, content: Mapping[str, Any], cookie: str, *, purpose: Purpose, seconds: float = TICKET_SECONDS
    ) -> str:
        """Return a ticket that is bound to this cookie; to the first one, if it is several that are joined with dots."""
        bound = _digest(cookie.partition(".")[0])
        payload = {"for": purpose.value, "until": self._now() + seconds, "cookie": bound, "is": content}
        body = _text(orjson.dumps(payload))
        return f"{body}.{_seal(self._secrets[0], body)}"

    def open(self, ticket: str, cookie: str | None, *, purpose: Purpose) -> Content:
        """Return the content. `cookie`: those of the browser, joined with dots.

        Raises PageError: 403 without the cookie, 400 for an altered or expired ticket.
        """
        if cookie is None:
            raise PageError(403, "cookie_missing", detail="the request has no cookie of a login")
        self._secret_of(ticket)
        payload = orjson.loads(_bytes(ticket.partition(".")[0]))
        if payload["for"] != purpose.value:
            raise PageError(400, "ticket_invalid", detail=f"the ticket is for {payload['for']}, not {purpose.value}")
        if self._now() >= payload["until"]:
            is_user_page = purpose is Purpose.USER_PAGE
            raise PageError(400, "user_page_expired" if is_user_page else "ticket_expired")
        if not any(hmac.compare_digest(payload["cookie"], _digest(one)) for one in cookie.split(".")):
            raise PageError(403, "cookie_foreign", detail="the ticket is bound to the cookie of another browser")
        content: Content = payload["is"]
        return content

    def derived(self, ticket: str, name: str) -> str:
        """43 base64url characters that only this server can derive from a ticket, such as a nonce or a code verifier.

        They stay the same during a rotation. Raises PageError for an altered ticket.
        """
        return _seal(self._secret_of(ticket), f"{name}:{ticket}")

    def _secret_of(self, ticket: str) -> bytes:
        body, _, seal = ticket.partition(".")
        if len(ticket) <= TICKET_CHARACTERS_MAX and ticket.isascii():
            for secret in self._secrets:
                if hmac.compare_digest(_seal(secret, body), seal):
                    return secret
        raise PageError(400, "ticket_invalid", detail="the ticket is altered, or its secret has been replaced")


def secrets_of(settings: OAuthSettings) -> tuple[bytes, ...]:
    """Read the secret that seals tickets, and the previous one if it is configured. Raises SecretFileError."""
    files = [("oauth.secret_file", settings.secret_file)]
    if settings.secret_previous_file:
        files.append(("oauth.secret_previous_file", settings.secret_previous_file))
    return tuple(_secret(name, path) for name, path in files)


def _secret(name: str, path: str) -> bytes:
    try:
        secret = Path(path).read_bytes()
    except OSError as error:
        raise SecretFileError(f"{name}: cannot be read: {path}: {error.strerror or error}") from error
    if len(secret) < _SECRET_BYTES_MIN:
        raise SecretFileError(
            f"{name}: a secret must have {_SECRET_BYTES_MIN} bytes or more, for example the output of"
            f" `openssl rand -hex 32`"
        )
    return secret


def _seal(secret: bytes, text: str) -> str:
    return _text(hmac.digest(secret, text.encode("ascii"), "sha256"))


def _digest(cookie: str) -> str:
    return _text(hashlib.sha256(cookie.encode("ascii")).digest())


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

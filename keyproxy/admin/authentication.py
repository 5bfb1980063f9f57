"""Bearer token authentication. Each request looks its token up by digest, so a revocation applies to the next request.

The token of `admin.token_file` is compared in constant time and has every permission. Other tokens are looked up by the
hash of the presented value, whose timing reveals nothing about stored hashes. Failures are counted per peer; a valid
token is accepted regardless of earlier failures.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Final

from keyproxy.admin.problems import Problem, Refused
from keyproxy.admin.scopes import Scope
from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.auth.throttle import Throttle
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.directory.directory import Entity

_TOKEN_CHARACTERS_MIN: Final = 32
_TOKEN_CHARACTERS_MAX: Final = 512

_STATES: Final = {
    "expired": Problem.TOKEN_EXPIRED,
    "revoked": Problem.TOKEN_REVOKED,
    "disabled": Problem.ACCOUNT_DISABLED,
}

#: The token of admin.token_file, as the audit log and `/v1/token` show it.
_FILE_TOKEN: Final[Entity] = {
    "id": "file",
    "name": "admin.token_file",
    "state": "active",
    "hint": "",
    "scopes": [Scope.ADMIN_WRITE.value],
    "tenant": None,
    "created_at": None,
    "expires_at": None,
    "revoked_at": None,
    "last_used_at": None,
}


class TokenFileError(Exception):
    """The file does not contain a valid token. The text is the reason."""


def file_digest(path: str) -> bytes | None:
    """Return the SHA-256 of the token in a file; None if no file is configured. Raises TokenFileError."""
    if not path:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"admin.token_file: cannot be read: {error}") from error
    if not (text.isascii() and text.isprintable() and " " not in text):
        raise TokenFileError("admin.token_file: not a token: expected one line of visible ASCII characters")
    if not _TOKEN_CHARACTERS_MIN <= len(text) <= _TOKEN_CHARACTERS_MAX:
        raise TokenFileError(
            f"admin.token_file: a token must have {_TOKEN_CHARACTERS_MIN} to {_TOKEN_CHARACTERS_MAX} characters,"
            f" for example the output of `openssl rand -hex 32`"
        )
    return bytes(SecretKey(text.encode("ascii")).digest())


class Access:
    """Authenticates requests to the admin API."""

    def __init__(
        self, tokens: AdminTokens, key_format: KeyFormat, throttle: Throttle, *, file_digest: bytes | None
    ) -> None:
        self._tokens = tokens
        self._format = key_format
        self._throttle = throttle
        self._file_digest = file_digest

    async def token(self, authorization: list[str], peer: str, now_mono: float) -> Entity:
        """Authenticate the values of Authorization and return the token. Raises Refused or StoreUnavailable."""
        try:
            return await self._token(authorization)
        except Refused as refused:
            wait_seconds = self._throttle.count(peer, now_mono)
            if wait_seconds:
                raise Refused(Problem.TOO_MANY_FAILURES, retry_after_seconds=wait_seconds) from refused
            raise

    async def _token(self, authorization: list[str]) -> Entity:
        if not authorization:
            raise Refused(Problem.TOKEN_MISSING)
        if len(authorization) > 1:
            raise Refused(Problem.TOKEN_INVALID, "The request has several Authorization headers.")
        scheme, _, shown = authorization[0].partition(" ")
        if scheme.lower() != "bearer":
            raise Refused(Problem.TOKEN_MISSING)
        plaintext = shown.strip().encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(plaintext).digest()
        if self._file_digest is not None and hmac.compare_digest(digest, self._file_digest):
            return _FILE_TOKEN
        if not self._format.may_be_admin_token(plaintext):
            raise Refused(Problem.TOKEN_INVALID)
        token = await self._tokens.presented(digest)
        if token is None:
            raise Refused(Problem.TOKEN_INVALID)
        if token["state"] in _STATES:
            raise Refused(_STATES[token["state"]])
        return token

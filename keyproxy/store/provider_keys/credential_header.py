"""The header in which a provider expects its secret, and the rules for what a secret may contain."""

from __future__ import annotations

import itertools
import re
from typing import Final

from keyproxy.http.headers import FieldNames, Kind, canonical
from keyproxy.ports.tools import UpstreamCredential

SECRET_BYTES_MAX: Final = 8_192
SECRET_RULE: Final = "a secret is one line of 1 to 8,192 visible ASCII characters"  # noqa: S105 - a sentence

_PLACEHOLDER: Final = "{secret}"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECRET: Final = re.compile(rb"[!-~](?:[ -~]*[!-~])?")

#: A shorter secret has no hint, which would reveal too much of it.
_HINTED_BYTES_MIN: Final = 16
_HINT_BYTES: Final = 4

_numbers = itertools.count(1)


def read_secret(content: bytes) -> bytes:
    """The secret in the content of a file. Raises ValueError, which quotes nothing of it."""
    secret = content.strip(b" \t\r\n")
    if len(secret) > SECRET_BYTES_MAX or not _SECRET.fullmatch(secret):
        raise ValueError(SECRET_RULE)
    return secret


def hint(secret: bytes) -> str:
    """The last four characters, by which people distinguish secrets; empty for a short secret."""
    return secret[-_HINT_BYTES:].decode("ascii") if len(secret) >= _HINTED_BYTES_MIN else ""


class CredentialHeader:
    """Builds the header lines of one provider's credentials."""

    __slots__ = ("_after", "_before", "_name", "_provider", "_replaces")

    def __init__(self, provider: str, name: str, value_format: str) -> None:
        """`value_format` contains `{secret}` once. Raises ValueError, which starts with the key at fault."""
        before, found, after = value_format.partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in after:
            raise ValueError(f"format: must have exactly one {_PLACEHOLDER}")
        if not _NAME.fullmatch(name):
            raise ValueError("header: must be a name of letters, digits, `.`, `_` and `-`")
        if not (value_format.isascii() and value_format.isprintable()) or value_format != value_format.strip():
            raise ValueError("format: must have only visible ASCII characters and single spaces between them")
        self._provider = provider
        self._name = name
        self._before, self._after = before, after
        # A client's credential is never forwarded, in any spelling.
        is_credential = FieldNames().kind(name.encode("ascii")) is Kind.CREDENTIAL
        self._replaces = b"" if is_credential else canonical(name.encode("ascii"))

    def credential(self, secret: bytes) -> UpstreamCredential:
        """A credential with a number of its own. The secret has passed `read_secret`."""
        value = b"%b%b%b" % (self._before.encode("ascii"), secret, self._after.encode("ascii"))
        line = b"%b: %b\r\n" % (self._name.encode("ascii"), value)
        return UpstreamCredential(self._provider, next(_numbers), line, self._replaces)

    def fields(self, secret: bytes) -> dict[str, str]:
        """The header of a request that is not proxied, such as a check of the secret."""
        return {self._name: f"{self._before}{secret.decode('ascii')}{self._after}"}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CredentialHeader) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def _parts(self) -> tuple[str, ...]:
        return self._provider, self._name, self._before, self._after

"""The subject of an id_token and its tenant, from the claims that the operator has configured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from keyproxy.auth.base62 import base62
from keyproxy.config.oauth.oauth_settings import CREATE, OAuthLogin

#: Between the values of several claims. A value with this character would make two subjects equal.
_SEPARATOR: Final = "|"

_CHARACTERS_MAX: Final = 255
_USER_ID_DIGITS: Final = 22


class ClaimsFault(Exception):
    """Claims that name no subject. The text is the reason, and names the claim."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A subject that has signed in. `tenant_id`: the tenant of the configured claim, None without one.

    `may_be_created`: a user is created for it if it is not linked.
    """

    issuer: str
    subject: str = field(repr=False)
    tenant_id: str | None = None
    may_be_created: bool = False

    @property
    def created_user_id(self) -> str:
        """The id of the user that is created for it: `usr_` and 22 base62 digits of SHA-256 of issuer and subject."""
        digest = hashlib.sha256(f"{self.issuer}\0{self.subject}".encode()).digest()
        return "usr_" + base62(int.from_bytes(digest, "big"), _USER_ID_DIGITS).decode("ascii")

    @classmethod
    def of(cls, claims: Mapping[str, Any], login: OAuthLogin) -> Subject:
        """The subject of verified claims. Raises ClaimsFault."""
        values = [_text(claims, name) for name in login.subject_claims]
        if len(values) > 1 and any(_SEPARATOR in value for value in values):
            raise ClaimsFault(f"a claim of oauth.login.subject_claims contains {_SEPARATOR}")
        return cls(login.issuer, _SEPARATOR.join(values), _tenant(claims, login), login.provision == CREATE)


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _CHARACTERS_MAX or not value.isprintable():
        raise ClaimsFault(f"the claim {name} is missing, or is not a text of 1 to {_CHARACTERS_MAX} characters")
    return value


def _tenant(claims: Mapping[str, Any], login: OAuthLogin) -> str | None:
    """The tenant that the operator has mapped the value of the claim to; only a string is a value."""
    value = claims.get(login.tenant_claim) if login.tenant_claim else None
    return login.tenants.get(value) if isinstance(value, str) else None

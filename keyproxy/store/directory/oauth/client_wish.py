"""A client that an operator registers: its fields, and the rules that they obey."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from keyproxy.auth.names import is_scope
from keyproxy.oauth import client_ids, redirect_uris
from keyproxy.oauth.client import (
    CLIENT_ID_BYTES_MAX,
    NAME_CHARACTERS_MAX,
    REDIRECT_URIS_MAX,
    AuthMethod,
    Client,
    ClientKind,
)
from keyproxy.store.directory.errors import Invalid

#: The start of the ids of rows.
ROW_PREFIX: Final = "cli_"

_SCOPES_MAX: Final = 64

JWKS_BYTES_MAX: Final = 65_536
_KEYS_MAX: Final = 16

#: The members of a JSON Web Key that are secret: RFC 7518, section 6.
_SECRET_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_KEY_TYPES: Final = frozenset({"RSA", "EC", "OKP"})


@dataclass(frozen=True, slots=True)
class OAuthClientWish:
    """The properties of a registered client.

    `user`: the owner of the tokens that it gets by client_credentials, with `scopes`; None: it gets none that way.
    `is_test`: these tokens are for `oauth.test_resource`. `redirect_uris`: where browsers return; without any it cannot
    ask users.
    """

    client_id: str
    auth_method: AuthMethod
    name: str = ""
    user: str | None = None
    scopes: Sequence[str] = ()
    is_test: bool = False
    redirect_uris: Sequence[str] = ()
    jwks: object = None
    tls_subject: str | None = None

    def check(self, known_schemes: Collection[str]) -> None:
        """Raises Invalid. `known_schemes`: URI schemes without a dot that known clients use."""
        if not client_ids.may_be_registered(self.client_id) or self.client_id.startswith(ROW_PREFIX):
            raise Invalid(
                f"a client id has 1 to {CLIENT_ID_BYTES_MAX} printable ASCII characters, and does not start with kpc1_,"
                " https:, listed: or cli_"
            )
        if len(self.name) > NAME_CHARACTERS_MAX or not self.name.isprintable():
            raise Invalid(f"a name has at most {NAME_CHARACTERS_MAX} characters, all of them printable")
        self._check_use(known_schemes)
        self._check_credential()

    def client(self, secret_digest: bytes | None) -> Client:
        """The client. `secret_digest`: SHA-256 of its secret, if it has one."""
        return Client(
            self.client_id,
            self.client_id,
            ClientKind.REGISTERED,
            self.name or self.client_id[:NAME_CHARACTERS_MAX],
            tuple(self.redirect_uris),
            self.auth_method,
            secret_digest,
            None if self.jwks is None else json.dumps(self.jwks),
            tls_subject=self.tls_subject,
        )

    def _check_use(self, known_schemes: Collection[str]) -> None:
        if self.user is None and not self.redirect_uris:
            raise Invalid("a client needs a user, for client_credentials, or a redirect URI, for users who consent")
        if self.user is None and (self.scopes or self.is_test):
            raise Invalid("scopes and test mode are those of client_credentials: name the user")
        if len(self.scopes) > _SCOPES_MAX:
            raise Invalid(f"a client has at most {_SCOPES_MAX} scopes")
        for scope in self.scopes:
            if not is_scope(scope):
                raise Invalid(f"{scope!r} is not a scope: use a word such as jobs:write, without wildcards")
        if len(self.redirect_uris) > REDIRECT_URIS_MAX:
            raise Invalid(f"a client has at most {REDIRECT_URIS_MAX} redirect URIs")
        for uri in self.redirect_uris:
            if fault := redirect_uris.fault(uri, known_schemes):
                raise Invalid(f"the redirect URI {uri[:100]!r} {fault}")

    def _check_credential(self) -> None:
        if self.auth_method is AuthMethod.NONE and self.user is not None:
            raise Invalid("a client that gets tokens for a user by itself must authenticate")
        if (self.jwks is not None) != (self.auth_method is AuthMethod.PRIVATE_KEY_JWT):
            raise Invalid("private_key_jwt, and no other method, requires a JSON Web Key Set")
        if (self.tls_subject is not None) != (self.auth_method is AuthMethod.TLS_CLIENT_AUTH):
            raise Invalid("authentication by TLS, and no other method, requires a subject")
        if self.jwks is not None:
            _check_jwks(self.jwks)
        if self.tls_subject is not None:
            _check_tls_subject(self.tls_subject)


def _check_tls_subject(tls_subject: str) -> None:
    # The libraries for signatures take longer to load than a command runs; so below.
    from keyproxy.signing.certificates import subject_fault

    if fault := subject_fault(tls_subject):
        raise Invalid(f"the TLS subject {fault}")


def _check_jwks(jwks: object) -> None:
    keys = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(jwks, dict) or not isinstance(keys, list) or not 1 <= len(keys) <= _KEYS_MAX:
        raise Invalid(f'a JSON Web Key Set is an object with "keys", a list of 1 to {_KEYS_MAX} keys')
    if len(json.dumps(jwks)) > JWKS_BYTES_MAX:
        raise Invalid(f"a JSON Web Key Set has at most {JWKS_BYTES_MAX} bytes")
    for key in keys:
        # Never quoted: it may be a private key by mistake.
        if not isinstance(key, dict) or key.get("kty") not in _KEY_TYPES:
            raise Invalid(f"a key of the set is not a public key of the type {', '.join(sorted(_KEY_TYPES))}")
        if not _SECRET_MEMBERS.isdisjoint(key):
            raise Invalid("a key of the set is a private key: store its public half only")
    from keyproxy.signing.key_sets import ALGORITHMS, KeySet

    if not len(KeySet(jwks)):
        raise Invalid(f"no key of the set can verify {', '.join(ALGORITHMS)}: RSA keys need 2048 bits or more")

"""OAuth clients: programs that ask for tokens. A client is judged by the id that it presents, and has no owner."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from typing import Final

#: Characters of a presented client id at most.
CLIENT_ID_BYTES_MAX: Final = 2_000
NAME_CHARACTERS_MAX: Final = 200
REDIRECT_URIS_MAX: Final = 10

_ROW_ID_DIGITS: Final = 32


class ClientKind(enum.Enum):
    """How the metadata of a client are known."""

    VALUE = "value"  # its id encodes them
    DOCUMENT = "document"  # its id is the URL of a document with them
    LISTED = "listed"  # the configuration has them
    REGISTERED = "registered"  # an operator has entered them


class AuthMethod(enum.Enum):
    """How a client authenticates itself at the token endpoint. The values are those of `oauth_clients`."""

    NONE = "none"
    CLIENT_SECRET = "client_secret"  # noqa: S105 - no secret; Basic or in the form
    PRIVATE_KEY_JWT = "private_key_jwt"
    TLS_CLIENT_AUTH = "tls_client_auth"


@dataclass(frozen=True, slots=True)
class Client:
    """A client as its id and the configuration describe it.

    `client_id`: the id that identifies it in `oauth_clients`, which is the presented one, or `listed:<name>`.
    `presented_as`: the id that the client has presented. `redirect_uris`: as registered; those of a listed client may
    have `{}` for one path segment. `jwks`: its public keys as JSON, None if it has none there; `jwks_uri`: where they
    are. `secret_digest`: SHA-256 of its secret.
    """

    client_id: str
    presented_as: str
    kind: ClientKind
    name: str
    redirect_uris: tuple[str, ...]
    auth_method: AuthMethod = AuthMethod.NONE
    secret_digest: bytes | None = field(default=None, repr=False)
    jwks: str | None = None
    jwks_uri: str = ""
    tls_subject: str | None = None

    @property
    def row_id(self) -> str:
        """The primary key of the client's row, whether there is one or not."""
        return row_id(self.client_id)


def row_id(client_id: str) -> str:
    """The primary key of a client's row: `cli_` and 32 hex digits of SHA-256 of its id."""
    return f"cli_{hashlib.sha256(client_id.encode('utf-8')).hexdigest()[:_ROW_ID_DIGITS]}"

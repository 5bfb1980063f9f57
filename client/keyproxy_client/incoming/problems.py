"""The responses to requests without a usable identity: documents of `application/problem+json`, RFC 9457."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from keyproxy_client.incoming.verified_identity import Identity

MEDIA_TYPE: Final = "application/problem+json"

_CHALLENGE: Final = 'Api-Key realm="keyproxy"'

#: The code with which a refused WebSocket is closed, RFC 6455 section 7.4.1: a violation of policy.
WEBSOCKET_CLOSE_CODE: Final = 1008


@dataclass(frozen=True, slots=True)
class Problem:
    """The response to a request. `headers`: those beside Content-Type and Content-Length."""

    code: str
    status: int
    title: str
    detail: str
    headers: tuple[tuple[str, str], ...] = ()

    def content(self) -> dict[str, object]:
        """The members of the document."""
        return {
            "type": f"urn:keyproxy:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }

    def body(self) -> bytes:
        """The document."""
        return json.dumps(self.content()).encode("utf-8")

    def all_headers(self, body: bytes) -> list[tuple[str, str]]:
        """The headers of a response with this body. It concerns one request, so that no cache may keep it."""
        return [
            ("Content-Type", MEDIA_TYPE),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            *self.headers,
        ]


IDENTITY_MISSING: Final = Problem(
    "identity_missing",
    401,
    "Identity missing",
    "The request has no verified identity. Send it through keyproxy, with an API key.",
    (("WWW-Authenticate", _CHALLENGE),),
)
IDENTITY_INVALID: Final = Problem(
    "identity_invalid", 400, "Identity invalid", "The identity headers of the request are repeated or malformed."
)
IDENTITY_UNTRUSTED: Final = Problem(
    "identity_untrusted",
    401,
    "Identity untrusted",
    "The identity assertion of the request is invalid or expired.",
    (("WWW-Authenticate", _CHALLENGE),),
)
IDENTITY_UNVERIFIABLE: Final = Problem(
    "identity_unverifiable",
    503,
    "Identity unverifiable",
    "The identity of the request cannot be verified now, because the keys of keyproxy are not available.",
    (("Retry-After", "5"),),
)


def insufficient_scope(missing: Iterable[str]) -> Problem:
    """The response to a request whose identity lacks these scopes. The detail and the challenge name them."""
    scopes = list(missing)
    word = "scope" if len(scopes) == 1 else "scopes"
    return Problem(
        "insufficient_scope",
        403,
        "Insufficient scope",
        f"The API key lacks the {word} {', '.join(repr(one) for one in scopes)}.",
        (("WWW-Authenticate", f'{_CHALLENGE}, error="insufficient_scope", scope="{" ".join(scopes)}"'),),
    )


def missing_scopes(identity: Identity, required: Iterable[str]) -> list[str]:
    """The required scopes that an identity lacks, in this order."""
    return [scope for scope in required if scope not in identity.scopes]

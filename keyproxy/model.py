"""The values that travel through a request's life. All are frozen; none knows where it came from or where it goes.

Each phase consumes the type that the phase before it made: a `RequestHead` is judged, an `Identity` is known, a `Grant`
says that this identity may use this route now, a `Permit` is what forwarding asks for. There is no other way to make one.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

from keyproxy.reasons import Reason

#: SHA-256 of the whole key, 32 bytes. What is cached, stored and compared; the key itself goes no further.
KeyDigest = NewType("KeyDigest", bytes)

NEVER = math.inf


class Moment(NamedTuple):
    """One instant on both clocks. `wall_seconds` is Unix time, for dates that people set; `mono_seconds` never jumps."""

    wall_seconds: float
    mono_seconds: float


class CredentialField(NamedTuple):
    """One header that may hold a key. The value is plaintext: only `credential` looks at it."""

    name: bytes
    value: bytes

    def __repr__(self) -> str:
        return f"CredentialField({self.name!r}, <{len(self.value)} bytes>)"


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request line and headers that are well-formed HTTP/1.1, judged and taken apart once.

    `target` is what goes upstream (origin form or `*`), `path` its part before `?`. `fields` is the block of end-to-end
    header lines in the order they came, each `name: value\\r\\n`, without anything that ends at this proxy.
    `forwarded` holds the X-Forwarded-* and related fields, lower-case names, believed only from a trusted peer.
    """

    method: bytes
    target: bytes
    path: bytes
    minor_version: int
    host: bytes | None
    fields: bytes = field(repr=False)
    credentials: tuple[CredentialField, ...] = ()
    forwarded: tuple[tuple[bytes, bytes], ...] = ()
    request_id: bytes | None = None
    content_length: int | None = None
    is_chunked: bool = False
    keeps_alive: bool = True
    expects_continue: bool = False

    @property
    def has_body(self) -> bool:
        """Whether body bytes follow the head."""
        return self.is_chunked or bool(self.content_length)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """An upstream's status line and headers, judged. `fields` as in `RequestHead`, hop-by-hop ones gone.

    `content_length` None and not `is_chunked`: the body, if the status allows one, ends with the connection.
    """

    status: int
    reason_phrase: bytes
    minor_version: int
    fields: bytes
    content_length: int | None
    is_chunked: bool
    keeps_alive: bool


@dataclass(frozen=True, slots=True)
class Identity:
    """What a key resolves to, made once when its row enters the cache.

    `header_block` is the identity headers as ready bytes. `standing` is None, or why this real key is refused whatever
    it asks for. `expires_wall_seconds` is Unix time, NEVER if the key has no expiry.
    """

    key_id: str
    user_id: str
    tenant_id: str
    scopes: frozenset[str]
    is_test: bool
    expires_wall_seconds: float
    standing: Reason | None
    header_block: bytes

    @property
    def mode(self) -> str:
        """`live` or `test`."""
        return "test" if self.is_test else "live"


@dataclass(frozen=True, slots=True)
class Route:
    """One compiled row of the route table. `name` is its text in the configuration, and its label in the metrics."""

    name: str
    scopes: frozenset[str] = frozenset()
    error_shape: str = "problem"


class Grant(NamedTuple):
    """This identity may use this route at this moment."""

    identity: Identity
    route: Route


class Permit(NamedTuple):
    """A decision to forward. Nothing is written upstream without one."""

    grant: Grant


class Ending(enum.Enum):
    """How an exchange ended."""

    ANSWERED = "answered"  # the upstream's answer was relayed whole
    REFUSED = "refused"  # answered by us
    CUT = "cut"  # the answer had begun and could not be completed; the client was made to notice
    CLIENT_GONE = "client_gone"  # the client left before its answer was complete


class Missing(Exception):
    """A decision needs a value that is not in memory. `bring` fetches it, or raises the Refusal that says why not."""

    def __init__(self, what: str, bring: Callable[[], Awaitable[None]]) -> None:
        super().__init__(what)
        self.bring = bring

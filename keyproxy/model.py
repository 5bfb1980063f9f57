"""The values that travel through a request's life. None knows where it came from or where it goes. What is shared
between requests is compared by identity, so that it can be looked up by at the cost of a pointer.

Each phase consumes the type that the phase before it made: a `RequestHead` is judged, an `Identity` is known, a `Grant`
says that this identity may use this route now, a `Permit` is what forwarding asks for. There is no other way to make one.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NewType

from keyproxy.limits.allowance import Allowance, Hold
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason

#: SHA-256 of the whole key, 32 bytes. What is cached, stored and compared; the key itself goes no further.
KeyDigest = NewType("KeyDigest", bytes)

#: Whose a request is: tenant, user and mode. All keys of a user count together, and test traffic apart from live.
Owner = tuple[str, str, str]

NEVER = math.inf

NO_TOKENS = "none"

_FINAL: Final = 200
_NO_CONTENT: Final = 204


@mypyc_attr(acyclic=True, free_list_len=1)
class Moment:
    """One instant on both clocks. `wall_seconds` is Unix time, for dates people set; `mono_seconds` never jumps."""

    # Made for every request, as Grant and Permit are: a NamedTuple takes twice as long to make.
    __slots__ = ("mono_seconds", "wall_seconds")

    def __init__(self, wall_seconds: float, mono_seconds: float) -> None:
        self.wall_seconds: Final = wall_seconds
        self.mono_seconds: Final = mono_seconds

    def __repr__(self) -> str:
        return f"Moment({self.wall_seconds!r}, {self.mono_seconds!r})"


class CredentialField(NamedTuple):
    """One header that may hold a key, its name in lower case. The value is plaintext: only `credential` looks at it."""

    name: bytes
    value: bytes

    def __repr__(self) -> str:
        return f"CredentialField({self.name!r}, <{len(self.value)} bytes>)"


@dataclass(frozen=True, slots=True, eq=False)
class RequestLine:
    """A judged request line. `start` is the line as it goes upstream; `path` the target's part before `?`.

    `holds_key`: the target has a key in it; the line is shown to nobody.
    """

    method: bytes
    target: bytes = field(repr=False)
    path: bytes = field(repr=False)
    minor_version: int
    start: bytes = field(repr=False)
    holds_key: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class RequestFields:
    """What a request's header fields say about it, apart from the values that differ from request to request.

    `host` is None for an HTTP/1.0 request without one. `host_block` is the X-Forwarded-Host line. `head_end` is how the
    head that goes upstream ends: what frames the body, and the empty line. `says_close`: `close` is among the options of
    Connection, so that nothing that follows is a request. `opens_tunnel`: a WebSocket handshake.
    `media_type`, without parameters, and `codings`, the values of Content-Encoding, are of what goes on, in lower case;
    `is_json`: the type is of JSON, or there is none. `accepts_codings`: an Accept-Encoding is there.
    `has_idempotency_key`, `has_traceparent`: exactly one field of that name, whatever its value.
    """

    host: bytes | None
    host_block: bytes
    has_content_length: bool = False
    is_chunked: bool = False
    keeps_alive: bool = True
    says_close: bool = False
    expects_continue: bool = False
    opens_tunnel: bool = False
    media_type: bytes = b""
    codings: tuple[bytes, ...] = ()
    has_idempotency_key: bool = False
    has_traceparent: bool = False
    accepts_codings: bool = True
    is_json: bool = field(init=False)
    head_end: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_json", _is_json(self.media_type))
        end = b"\r\n\r\n"
        if self.is_chunked:
            end = b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        elif self.opens_tunnel:
            end = b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        object.__setattr__(self, "head_end", end)


def _is_json(media_type: bytes) -> bool:
    """Whether content of this type is to be read as JSON; without a type it is."""
    return not media_type or media_type == b"application/json" or media_type.endswith(b"+json")


class RequestHead:
    """A request line and fields that are well-formed HTTP/1.1, judged and taken apart.

    `line` and `fields` are shared between requests that are alike; the whole of it between requests on one connection
    that are the same, byte for byte. So nothing of it changes once `credential` has found the key. `block` holds the
    end-to-end header lines as they came and in the order they came, without anything that ends at this proxy.
    `forwarded` holds X-Forwarded-* and related fields, lower-case names, believed only from a trusted peer. `raw` is
    the head as it came, empty if it is not to be compared with. `credential` keeps three things here: `digest`;
    `key_part`, the bytes by which the key is found wherever else it stands; `is_free_of_key` once no other field holds
    them any more.
    """

    __slots__ = (
        "block", "content_length", "credentials", "digest", "fields", "forwarded", "has_body", "is_free_of_key",
        "key_part", "line", "raw", "request_id",
    )  # fmt: skip

    def __init__(
        self,
        line: RequestLine,
        fields: RequestFields,
        block: bytes,
        credentials: tuple[CredentialField, ...],
        content_length: int,
    ) -> None:
        self.line = line
        self.fields = fields
        self.block = block
        self.credentials = credentials
        self.content_length = content_length
        #: Whether body bytes follow the head.
        self.has_body = content_length > 0 or fields.is_chunked
        self.forwarded: tuple[tuple[bytes, bytes], ...] = ()
        self.request_id: bytes | None = None
        self.raw = b""
        self.digest: KeyDigest | None = None
        self.key_part = b""
        self.is_free_of_key = False

    def __repr__(self) -> str:
        return f"RequestHead({self.line.method!r}, <{len(self.line.target)} bytes>)"


@dataclass(frozen=True, slots=True, eq=False)
class StatusLine:
    """A judged status line. `start` is the line as it goes to the client.

    `ends_with_head`: a response with this status has no body and must not announce one. RFC 9110 section 8.6.
    """

    status: int
    minor_version: int
    start: bytes
    ends_with_head: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends_with_head", self.status < _FINAL or self.status == _NO_CONTENT)


@dataclass(frozen=True, slots=True, eq=False)
class ResponseFields:
    """What a response's header fields say about its framing. `media_type`, `codings` and `is_json` as in
    `RequestFields`. `states_limits`: a RateLimit field or one like it is there."""

    has_content_length: bool = False
    is_chunked: bool = False
    keeps_alive: bool = True
    opens_tunnel: bool = False
    media_type: bytes = b""
    codings: tuple[bytes, ...] = ()
    has_date: bool = True
    states_limits: bool = False
    is_json: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_json", _is_json(self.media_type))


class ResponseHead:
    """An upstream's status line and fields, judged. `block` and `raw` as in `RequestHead`.

    `usage_tokens`: the value of X-Usage-Tokens, None if there is not one, or more than one.
    Neither a length nor chunked: the body, if the status allows one, ends with the connection.
    """

    __slots__ = ("block", "content_length", "fields", "line", "raw", "usage_tokens")

    def __init__(self, line: StatusLine, fields: ResponseFields, block: bytes, content_length: int) -> None:
        self.line = line
        self.fields = fields
        self.block = block
        self.content_length = content_length
        self.usage_tokens: bytes | None = None
        self.raw = b""

    def __repr__(self) -> str:
        return f"ResponseHead({self.line.status})"


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """What a key resolves to, made once when its row enters the cache.

    `header_block` is the identity headers as ready bytes. `standing` is None, or why this real key is refused whatever
    it asks for. `expires_wall_seconds` is Unix time, NEVER if the key has no expiry. `mode` is `live` or `test`.
    `allowance` is the limits its requests are under, None if there are none. `retiring_field` is the start of the header
    line with the remaining lifetime of the key, None unless another key has replaced it. `owner` is what requests
    are counted by where users share something of a bounded number.
    """

    key_id: str
    user_id: str
    tenant_id: str
    scopes: frozenset[str]
    is_test: bool
    expires_wall_seconds: float
    standing: Reason | None
    header_block: bytes = field(repr=False)
    allowance: Allowance | None = field(default=None, repr=False)
    retiring_field: bytes | None = field(default=None, repr=False)
    mode: str = field(init=False)
    owner: Owner = field(init=False)

    def __post_init__(self) -> None:
        mode = "test" if self.is_test else "live"
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "owner", (self.tenant_id, self.user_id, mode))


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One compiled row of the route table. `name` is its text in the configuration, and its label in the metrics.

    `tokens`: where the answers say what was used, NO_TOKENS if they don't.
    """

    name: str
    scopes: frozenset[str] = frozenset()
    error_shape: str = "problem"
    tokens: str = NO_TOKENS


@mypyc_attr(acyclic=True)
class Grant:
    """This identity may use this route at this moment."""

    __slots__ = ("identity", "route")

    def __init__(self, identity: Identity, route: Route) -> None:
        self.identity: Final = identity
        self.route: Final = route


@mypyc_attr(acyclic=True)
class Permit:
    """A decision to forward. Nothing is written upstream without one. `hold`: what it has taken of limits."""

    __slots__ = ("grant", "hold")

    def __init__(self, grant: Grant, hold: Hold | None = None) -> None:
        self.grant: Final = grant
        self.hold: Final = hold


@mypyc_attr(acyclic=True)
class TokenUse:
    """Tokens that a request used: of its prompt, and of what was produced for it; `total` is charged."""

    __slots__ = ("tokens_in", "tokens_out", "total")

    def __init__(self, tokens_in: int, tokens_out: int) -> None:
        self.tokens_in: Final = tokens_in
        self.tokens_out: Final = tokens_out
        self.total: Final = tokens_in + tokens_out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenUse):
            return NotImplemented
        return (self.tokens_in, self.tokens_out) == (other.tokens_in, other.tokens_out)

    def __hash__(self) -> int:
        return hash((self.tokens_in, self.tokens_out))

    def __repr__(self) -> str:
        return f"TokenUse({self.tokens_in}, {self.tokens_out})"


class Ending(enum.Enum):
    """How an exchange ended."""

    ANSWERED = "answered"  # the upstream's answer was relayed whole
    REFUSED = "refused"  # answered by us
    CUT = "cut"  # the answer had begun and could not be completed; the client was made to notice
    CLIENT_GONE = "client_gone"  # the client left before its answer was complete


#: How nearly all end. A member looked up on its class costs more than the comparison it is for.
ANSWERED: Final = Ending.ANSWERED


#: How long one request waits to hear how it stands with its limits, in all rounds of its decision together.
PATIENCE_SECONDS: Final = 4.0


class TimeBudget:
    """How long one request still waits to hear how it stands with its limits: each wait takes from it what it took."""

    __slots__ = ("seconds_left",)

    def __init__(self) -> None:
        self.seconds_left = PATIENCE_SECONDS


class Missing(Exception):
    """A decision needs a value that is not in memory. `fetch_missing` fetches it, or raises a Refusal."""

    def __init__(self, what: str, fetch_missing: Callable[[TimeBudget], Awaitable[None]]) -> None:
        super().__init__(what)
        self._bring = fetch_missing

    async def fetch_missing(self, patience: TimeBudget | None = None) -> None:
        """Fetch it. `patience` is the request's, of which earlier rounds of its decision may have taken; None: all."""
        await self._bring(TimeBudget() if patience is None else patience)

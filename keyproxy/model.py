"""The values of a request's life, independent of their source and use. Values that requests share are compared by
identity, so that a lookup costs no more than hashing a pointer.

Each phase consumes the type that the phase before it made: a `RequestHead` is validated, an `Identity` is resolved, a
`Grant` states that this identity may use this route now, a `Permit` is required for forwarding. There is no other way
to make one. On public routes a `PublicGrant` takes the place of identity and grant.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NewType, TypeVar

from keyproxy.limits.allowance import Allowance, Hold
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

#: SHA-256 of the whole key, 32 bytes. The digest is cached, stored and compared, never the key itself.
KeyDigest = NewType("KeyDigest", bytes)

#: The owner of a request: tenant, user and mode. All keys of a user count together, test and live traffic separately.
Owner = tuple[str, str, str]

LIVE: Final = "live"
TEST: Final = "test"
PUBLIC: Final = "public"

#: All requests on public routes together.
PUBLIC_OWNER: Final[Owner] = ("", "", PUBLIC)

NEVER = math.inf

NO_TOKENS = "none"

_FINAL: Final = 200
_NO_CONTENT: Final = 204


@mypyc_attr(acyclic=True, free_list_len=1)
class Moment:
    """One instant on both clocks. `wall_seconds` is Unix time, for configured dates; `mono_seconds` never jumps."""

    # Made for every request, as Grant and Permit are: a NamedTuple takes twice as long to make.
    __slots__ = ("mono_seconds", "wall_seconds")

    def __init__(self, wall_seconds: float, mono_seconds: float) -> None:
        self.wall_seconds: Final = wall_seconds
        self.mono_seconds: Final = mono_seconds

    def __repr__(self) -> str:
        return f"Moment({self.wall_seconds!r}, {self.mono_seconds!r})"


class CredentialField(NamedTuple):
    """A header that may contain a key, its name in lower case. The value is plaintext: only `credentials` reads it."""

    name: bytes
    value: bytes

    def __repr__(self) -> str:
        return f"CredentialField({self.name!r}, <{len(self.value)} bytes>)"


@dataclass(frozen=True, slots=True, eq=False)
class RequestLine:
    """A validated request line. `start` is the line as it goes upstream; `path` the part of the target before `?`.

    `holds_key`: the target contains a key, so the line must not be displayed or logged.
    """

    method: bytes
    target: bytes = field(repr=False)
    path: bytes = field(repr=False)
    minor_version: int
    start: bytes = field(repr=False)
    holds_key: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class RequestFields:
    """The properties of a request that follow from its header fields, without values that differ between requests.

    `host` is None for an HTTP/1.0 request without one. `host_block` is the X-Forwarded-Host line. `head_end` is the end
    of the head that goes upstream: the body framing and the empty line. `has_close_option`: Connection has the option
    `close`, so no further request follows. `opens_tunnel`: a WebSocket handshake.
    `media_type`, without parameters, and `codings`, the values of Content-Encoding, describe the forwarded body, in
    lower case; `is_json`: the media type is JSON or missing. `has_clear_type`: all servers read the content by the same
    type, and in UTF-8. `accepts_codings`: Accept-Encoding is present.
    `has_idempotency_key`, `has_traceparent`: there is exactly one field of that name, whatever its value.
    `digests_body`: a field signs or digests the body, so that changed bytes would not match.
    """

    host: bytes | None
    host_block: bytes
    has_content_length: bool = False
    is_chunked: bool = False
    keeps_alive: bool = True
    has_close_option: bool = False
    expects_continue: bool = False
    opens_tunnel: bool = False
    media_type: bytes = b""
    codings: tuple[bytes, ...] = ()
    has_idempotency_key: bool = False
    has_traceparent: bool = False
    accepts_codings: bool = True
    digests_body: bool = False
    has_clear_type: bool = True
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
    """Whether to read content of this type as JSON; also if it has no type."""
    return not media_type or media_type == b"application/json" or media_type.endswith(b"+json")


class RequestHead:
    """A parsed and validated request line with fields, well-formed HTTP/1.1.

    Similar requests share `line` and `fields`; byte-for-byte identical requests on one connection share the whole head.
    So it must not change once `credentials` has found the key. `block` contains the end-to-end header lines, unchanged
    and in their original order, without fields that end at this proxy. `forwarded` contains X-Forwarded-* and related
    fields with names in lower case, trusted only from a trusted peer. `raw` is the head as received, empty if it must
    not be compared. `credentials` stores three values here: `digest`; `key_part`, the search pattern for other
    occurrences of the key; `is_free_of_key`, set once no other field contains it.
    """

    __slots__ = (
        "block",
        "content_length",
        "credentials",
        "digest",
        "fields",
        "forwarded",
        "has_body",
        "is_free_of_key",
        "key_part",
        "line",
        "raw",
        "request_id",
    )

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
    """A validated status line. `start` is the line as it goes to the client.

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
    """The properties of a response that follow from its header fields. `media_type`, `codings` and `is_json` are as in
    `RequestFields`. `states_limits`: a RateLimit field, or an equivalent one, is present."""

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
    """A validated status line and fields from an upstream. `block` and `raw` are as in `RequestHead`.

    `usage_tokens`: the value of X-Usage-Tokens, None unless there is exactly one.
    With neither a length nor chunks, the body, if the status allows one, ends with the connection.
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
    """The identity behind a key, computed once when its row enters the cache.

    `header_block` is the identity headers as ready bytes. `standing` is None, or the reason for refusing every request
    with this key. `expires_wall_seconds` is Unix time, NEVER if the key has no expiry. `mode` is `live` or `test`.
    `allowance` is the limits that apply to its requests, None if there are none. `retiring_field` is the start of the
    header line with the remaining lifetime of the key, None unless another key has replaced it. `owner` is the unit by
    which requests are counted where users share a bounded resource.
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
        mode = TEST if self.is_test else LIVE
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "owner", (self.tenant_id, self.user_id, mode))

    def retiring_header(self, wall_seconds: float) -> bytes:
        """The header line with the number of seconds for which a replaced key still works; empty for any other key."""
        if self.retiring_field is None:
            return b""
        return b"%b%d\r\n" % (self.retiring_field, max(0, math.floor(self.expires_wall_seconds - wall_seconds)))


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One compiled row of the route table. `name` is its text in the configuration, and its label in the metrics.

    `tokens`: the dialect of metered requests; NO_TOKENS: no metering. `deduplicates`: repeats of a request with an
    Idempotency-Key are charged once. `is_public`: requests need no key, and credentials are ignored.
    `forwards_encoded_slash`: paths may have `%2F` in the value of a placeholder.
    """

    name: str
    scopes: frozenset[str] = frozenset()
    error_shape: str = "problem"
    tokens: str = NO_TOKENS
    deduplicates: bool = True
    is_public: bool = False
    forwards_encoded_slash: bool = False


@mypyc_attr(acyclic=True)
class Grant:
    """This identity may use this route at this moment."""

    __slots__ = ("identity", "route")

    def __init__(self, identity: Identity, route: Route) -> None:
        self.identity: Final = identity
        self.route: Final = route


@mypyc_attr(acyclic=True)
class PublicGrant:
    """Any client may use this public route. No identity is known, so none goes upstream and no limits apply."""

    __slots__ = ("route",)

    def __init__(self, route: Route) -> None:
        self.route: Final = route


@mypyc_attr(acyclic=True)
class Permit:
    """A decision to forward. Nothing is written upstream without one. `hold`: the request's reservation under limits."""

    __slots__ = ("grant", "hold")

    def __init__(self, grant: Grant | PublicGrant, hold: Hold | None = None) -> None:
        self.grant: Final = grant
        self.hold: Final = hold

    def limit_headers(self, now_mono: float) -> bytes:
        """The RateLimit header lines for the limits that apply to the request; empty if there are none."""
        return b"" if self.hold is None else self.hold.bundle.statement.lines(now_mono)


class Ending(enum.Enum):
    """How an exchange ended."""

    COMPLETED = "completed"  # the upstream's response was relayed completely
    REFUSED = "refused"  # the proxy sent its own response
    CUT = "cut"  # the response broke off; its framing is left incomplete, so that the client notices
    CLIENT_GONE = "client_gone"  # the client disconnected before the response was complete


#: The most frequent ending. An attribute lookup on the enum class would cost more than the comparison itself.
COMPLETED: Final = Ending.COMPLETED


#: A decision may need an identity, a body, its reading, ownership, an earlier charge and a lease; a fetched value may be
#: evicted before its use.
_ROUNDS_MAX: Final = 8

_Decision = TypeVar("_Decision")

#: The maximum time for which one request waits for the ledger, over all rounds of its decision.
PATIENCE_SECONDS: Final = 4.0


class TimeBudget:
    """The remaining time for which a request may wait for the ledger. Each wait is subtracted from it."""

    __slots__ = ("seconds_left",)

    def __init__(self) -> None:
        self.seconds_left = PATIENCE_SECONDS


class Missing(Exception):
    """A decision needs a value that is not in memory. `fetch_missing` fetches it, or raises a Refusal."""

    def __init__(self, what: str, fetch_missing: Callable[[TimeBudget], Awaitable[None]]) -> None:
        super().__init__(what)
        self._bring = fetch_missing

    async def fetch_missing(self, patience: TimeBudget | None = None) -> None:
        """Fetch the value. `patience`: the request's time budget, which earlier rounds may have reduced; None: full."""
        await self._bring(TimeBudget() if patience is None else patience)

    async def failure(self, patience: TimeBudget) -> Refusal | None:
        """Fetch the value. Returns the Refusal if that fails."""
        try:
            await self.fetch_missing(patience)
        except Refusal as refusal:
            return refusal
        return None

    async def fetch_and_decide(self, decide: Callable[[], _Decision], is_over: Callable[[], bool]) -> _Decision | None:
        """The cold path of a decision: fetch the value and decide again, until no value is missing.

        Returns None if `is_over`: nothing waits for the decision any more. Raises a Refusal.
        """
        missing, patience = self, TimeBudget()
        for _ in range(_ROUNDS_MAX):
            failure = await missing.failure(patience)
            if is_over():
                return None
            try:
                return decide()
            except Missing as still:
                # A value that could not be fetched may no longer be needed: stale values are used while the store is
                # down. The failure becomes the refusal only if the decision still needs the value.
                if failure is not None:
                    raise failure from still
                missing = still
        raise Refusal(Reason.OVERLOADED, f"no decision after {_ROUNDS_MAX} rounds; missing: {missing}")

"""HTTP messages as values: heads of requests and responses, parsed and validated, independent of who parsed them.

Values that messages share are compared by identity, so that a lookup costs no more than hashing a pointer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from keyproxy.model import KeyDigest, Route
from keyproxy.mypyc_compat import mypyc_attr

_FINAL: Final = 200
_NO_CONTENT: Final = 204


@mypyc_attr(acyclic=True)
class CredentialField:
    """A header that may contain a key, its name in lower case. The value is plaintext: only `credentials` reads it."""

    # Made for every request: a NamedTuple takes several times as long to make.
    __slots__ = ("name", "value")

    def __init__(self, name: bytes, value: bytes) -> None:
        self.name: Final = name
        self.value: Final = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CredentialField) and self.name == other.name and self.value == other.value

    def __hash__(self) -> int:
        return hash((self.name, self.value))

    def __repr__(self) -> str:
        return f"CredentialField({self.name!r}, <{len(self.value)} bytes>)"


@mypyc_attr(acyclic=True)
class RequestLine:
    """A validated request line. `start` is the line as it goes upstream; `path` the part of the target before `?`.

    `holds_key`: the target contains a key, so the line must not be displayed or logged. `is_plain`: the path has neither
    `%` nor `;`, so that no server decodes or shortens it. The route table that was asked last for the route of this line
    stores itself and the route here, because the same line often comes again.
    """

    # Made for every request with a new path: compiled, a dataclass takes fifteen times as long to make.
    __slots__ = (
        "holds_key",
        "is_plain",
        "matched_by",
        "method",
        "minor_version",
        "path",
        "route",
        "start",
        "target",
    )

    def __init__(
        self,
        method: bytes,
        target: bytes,
        path: bytes,
        minor_version: int,
        start: bytes,
        holds_key: bool = False,
        *,
        is_plain: bool = False,
    ) -> None:
        self.method: Final = method
        self.target: Final = target
        self.path: Final = path
        self.minor_version: Final = minor_version
        self.start: Final = start
        self.holds_key: Final = holds_key
        self.is_plain: Final = is_plain
        self.matched_by: object | None = None
        self.route: Route | None = None

    def __repr__(self) -> str:
        return f"RequestLine({self.method!r}, holds_key={self.holds_key})"


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


@mypyc_attr(acyclic=True)
class RequestHead:
    """A parsed and validated request line with fields, well-formed HTTP/1.1.

    Similar requests share `line` and `fields`; byte-for-byte identical requests on one connection share the whole head.
    So it must not change once `credentials` has found the key. `block` contains the end-to-end header lines, unchanged
    and in their original order, without fields that end at this proxy. `forwarded` contains X-Forwarded-* and related
    fields with names in lower case, trusted only from a trusted peer. `raw` is the head as received, empty if it must
    not be compared. `credentials` stores three values here: `digest`; `key_part`, the search pattern for other
    occurrences of the key; `is_free_of_key`, set once no other field contains it.
    `act_for`: the value of the Act-For header, None without one. `traceparent`: the value of the field, as received;
    empty if it has to be looked for among the lines.
    """

    __slots__ = (
        "act_for",
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
        "traceparent",
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
        self.act_for: bytes | None = None
        self.traceparent = b""
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


@mypyc_attr(acyclic=True)
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

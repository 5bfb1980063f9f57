"""Header fields: one canonicaliser, the fields that end at this proxy, and the head that goes upstream.

`FieldNames.kind` is the only place that maps header names to their meaning. It classifies a name once and caches the
result, since the same few names come with every request. A name is compared in canonical form, in lower case with `-`
for `_` and `.`: servers that pass headers to CGI, WSGI or PHP programs fold these, so `X_Keyproxy_User` is as reserved
as `X-Keyproxy-User`. With `_` or `.`, a name that frames the message is refused, because such a server could take
`Content_Length` for a field that this proxy ignores; other names that this proxy acts on are dropped; the rest is
forwarded.

`identity_headers` has the reserved prefix and the headers under it, `forwarding` the X-Forwarded-* fields.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Final

from keyproxy.http import identity_headers
from keyproxy.http.forwarding import Forwarding
from keyproxy.http_messages import RequestHead
from keyproxy.model import Permit, PublicGrant


class Kind(enum.Enum):
    """What a header field means to this proxy."""

    PLAIN = enum.auto()  # end-to-end: forwarded
    HOP = enum.auto()  # ends here
    RESERVED = enum.auto()  # set only by this proxy: dropped in any spelling
    ACT_FOR = enum.auto()  # the user to act for, in any spelling: ends here; refused if repeated
    CREDENTIAL = enum.auto()
    HOST = enum.auto()
    CONTENT_LENGTH = enum.auto()
    TRANSFER_ENCODING = enum.auto()
    CONTENT_TYPE = enum.auto()  # forwarded, but refused if repeated
    CONNECTION = enum.auto()
    EXPECT = enum.auto()
    UPGRADE = enum.auto()  # ends here; a new one is written for a WebSocket handshake
    REQUEST_ID = enum.auto()
    FORWARDED = enum.auto()  # accepted only from a trusted peer
    USAGE = enum.auto()  # forwarded; in a response, the number of tokens used
    DROPPED = enum.auto()  # not forwarded: an override; a credential or hop-by-hop field in another spelling
    UNREADABLE = enum.auto()  # of a request: a name that two servers could read differently; refused


_KINDS: Final[dict[bytes, Kind]] = {
    b"authorization": Kind.CREDENTIAL,
    b"x-api-key": Kind.CREDENTIAL,
    b"host": Kind.HOST,
    b"content-length": Kind.CONTENT_LENGTH,
    b"transfer-encoding": Kind.TRANSFER_ENCODING,
    b"content-type": Kind.CONTENT_TYPE,
    b"connection": Kind.CONNECTION,
    b"expect": Kind.EXPECT,
    b"upgrade": Kind.UPGRADE,
    b"x-request-id": Kind.REQUEST_ID,
    b"forwarded": Kind.FORWARDED,
    b"x-real-ip": Kind.FORWARDED,
    b"x-usage-tokens": Kind.USAGE,
    **dict.fromkeys(
        (b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization",
         b"te", b"trailer", b"http2-settings"),
        Kind.HOP,
    ),
}  # fmt: skip

#: Fields by which some servers replace the method or target that the route was matched by.
_OVERRIDES: Final = frozenset(
    {
        b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-original-url", b"x-original-uri",
        b"x-original-method", b"x-rewrite-url", b"x-override-url",
    }
)  # fmt: skip

#: Kinds whose names, in another spelling, a server could take for the body's framing or its type.
_FRAMING: Final = frozenset(
    {Kind.HOST, Kind.CONTENT_LENGTH, Kind.TRANSFER_ENCODING, Kind.CONTENT_TYPE, Kind.CONNECTION, Kind.EXPECT,
     Kind.UPGRADE}
)  # fmt: skip

#: Determines the content of a body too, but has no other meaning to this proxy; and is replaced on metered routes.
_CONTENT_ENCODING: Final = b"content-encoding"
_ACCEPT_ENCODING: Final = b"accept-encoding"

#: Fields that a Connection option must not name: removing them would change the message. RFC 9110 section 7.6.1.
#: Names in lower case, in a set: a client may name thousands of options.
NOT_HOP_BY_HOP: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"content-type"})

#: Fields that must not appear in trailers, after the decision that depends on them. RFC 9110 section 6.5.1.
NOT_IN_TRAILERS: Final = frozenset(
    {Kind.HOST, Kind.CONTENT_LENGTH, Kind.TRANSFER_ENCODING, Kind.CONTENT_TYPE, Kind.CREDENTIAL, Kind.CONNECTION,
     Kind.EXPECT, Kind.UNREADABLE}
)  # fmt: skip

#: Older names of the RateLimit fields, which clients take for limits of this server.
_LIMIT_NAMES: Final = frozenset(
    {
        b"x-ratelimit", b"x-ratelimit-policy", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset",
        b"x-ratelimit-used", b"x-rate-limit-limit", b"x-rate-limit-remaining", b"x-rate-limit-reset",
    }
)  # fmt: skip

#: For each byte, how CGI-like servers compare it in a name.
_FOLDED: Final = bytes(range(256)).lower().replace(b"_", b"-").replace(b".", b"-")

_NAME = re.compile(rb"[A-Za-z0-9._-]+")
_EXACT_NAME = re.compile(rb"[A-Za-z0-9-]+")
_REMEMBERED_MAX: Final = 2048
_REMEMBERED_BYTES_MAX: Final = 48

#: https://www.w3.org/TR/trace-context/ section 3.2.2. Hexadecimal digits are in lower case.
_TRACEPARENT: Final = b"traceparent:"
_LF: Final = 0x0A
_TRACE_IDS: Final = rb"(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACE = re.compile(rb"[ \t]*00-" + _TRACE_IDS + rb"[ \t]*\r")
#: A future version: it starts with the same fields, and more may follow.
_LATER_TRACE = re.compile(rb"[ \t]*(?!00|ff)[0-9a-f]{2}-" + _TRACE_IDS + rb"(?:-[!-~]*)?[ \t]*\r")

#: The form of usual values: hexadecimal digits in lower case as `0`.
_USUAL_TRACE: Final = b"00-%b-%b-00" % (b"0" * 32, b"0" * 16)
_TRACE_CHARACTERS: Final = bytes(
    [48 if byte in b"0123456789abcdef" else 45 if byte == 45 else 0 for byte in range(256)]
)
_NO_TRACE_ID: Final = b"0" * 32
_NO_PARENT_ID: Final = b"0" * 16

#: A client's request id is kept if it has no spaces, controls, or characters that are unsafe in a log or a header.
_REQUEST_ID_BYTES_MAX: Final = 128
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,%d}" % _REQUEST_ID_BYTES_MAX)


class FieldNames:
    """Maps header names to their Kind, with the identity headers under one configured prefix."""

    def __init__(self, header_prefix: str = "X-Keyproxy-", *, forward_overrides: bool = False) -> None:
        self._prefix = canonical(header_prefix.encode("ascii"))
        #: The name of the Act-For header in canonical form.
        self.act_for: Final = self._prefix + identity_headers.ACT_FOR
        self._overrides = frozenset() if forward_overrides else _OVERRIDES
        self._remembered: dict[bytes, Kind] = {}

    def kind(self, name: bytes) -> Kind:
        """The Kind of a header name in any spelling."""
        try:
            return self._remembered[name]
        except KeyError:
            pass
        kind = self._judge(name)
        # Clear the cache when it is full. A client that sends thousands of names slows down other requests only briefly.
        if len(self._remembered) >= _REMEMBERED_MAX:
            self._remembered.clear()
        if len(name) <= _REMEMBERED_BYTES_MAX:
            self._remembered[name] = kind
        return kind

    def _judge(self, name: bytes) -> Kind:
        if not _NAME.fullmatch(name):
            return Kind.UNREADABLE
        plain = canonical(name)
        if plain == self.act_for:
            return Kind.ACT_FOR
        if identity_headers.is_reserved(plain, self._prefix):
            return Kind.RESERVED
        if plain in self._overrides:
            return Kind.DROPPED
        kind = Kind.FORWARDED if plain.startswith(b"x-forwarded-") else _KINDS.get(plain, Kind.PLAIN)
        if _EXACT_NAME.fullmatch(name):
            return kind
        if kind in _FRAMING or plain == _CONTENT_ENCODING:
            return Kind.UNREADABLE
        if kind in (Kind.REQUEST_ID, Kind.FORWARDED):
            return Kind.RESERVED
        is_dropped = kind in (Kind.CREDENTIAL, Kind.HOP) or plain == _ACCEPT_ENCODING
        return Kind.DROPPED if is_dropped else Kind.PLAIN


def canonical(name: bytes) -> bytes:
    """A header name as CGI-like servers compare it: lower-case, `-` for `_` and `.`."""
    return name.translate(_FOLDED)


def states_limits(name: bytes) -> bool:
    """Whether a response field with this name, in any spelling, would be confused with the proxy's RateLimit fields.

    A provider's fields that name the limited unit (`x-ratelimit-remaining-tokens`, `anthropic-ratelimit-…`) are not:
    they describe the provider's own account, and clients read them that way.
    """
    plain = canonical(name)
    return plain == b"ratelimit" or plain.startswith(b"ratelimit-") or plain in _LIMIT_NAMES


def without_limits(block: bytes) -> bytes:
    """The header lines without RateLimit fields."""
    lines = block.split(b"\r\n")[:-1]
    return b"".join([line + b"\r\n" for line in lines if not states_limits(line.partition(b":")[0])])


def without_field(block: bytes, name: bytes) -> bytes:
    """The header lines without those of this name, which is in canonical form, whatever their spelling."""
    if name not in canonical(block):
        return block
    lines = block.split(b"\r\n")[:-1]
    return b"".join([line + b"\r\n" for line in lines if canonical(line.partition(b":")[0]) != name])


def sane_request_id(value: bytes) -> bool:
    """Whether a client's X-Request-Id may be kept."""
    # Most are letters and digits: then an expression would take ten times as long.
    return (value.isalnum() and len(value) <= _REQUEST_ID_BYTES_MAX) or _SANE_REQUEST_ID.fullmatch(value) is not None


def trace_id(block: bytes, known: bytes = b"") -> bytes:
    """The trace id of the traceparent among these header lines; empty if it is not valid W3C Trace Context.

    `known`: the value of that line, if it is known; it need not be looked for then.
    """
    # Usual values are compared as a whole: an expression takes five times as long.
    if known.translate(_TRACE_CHARACTERS) == _USUAL_TRACE and known.startswith(b"00-"):
        trace, parent = known[3:35], known[36:52]
        return trace if trace != _NO_TRACE_ID and parent != _NO_PARENT_ID else b""
    start = block.find(_TRACEPARENT)
    if start < 0 or (start and block[start - 1] != _LF):
        # The name is in another case, or this is the suffix of another name.
        lines = block.lower()
        start = 0 if lines.startswith(_TRACEPARENT) else lines.find(b"\n" + _TRACEPARENT) + 1
        if not lines.startswith(_TRACEPARENT, start):
            return b""
    at = start + len(_TRACEPARENT)
    found = _TRACE.match(block, at) or _LATER_TRACE.match(block, at)
    return b"" if found is None else found[1]


def without_upgrade(head: RequestHead) -> RequestHead:
    """A WebSocket handshake as an ordinary request: a server may ignore an upgrade. RFC 9110 section 7.8."""
    fields = dataclasses.replace(head.fields, opens_tunnel=False)
    plain = RequestHead(head.line, fields, head.block, head.credentials, head.content_length)
    plain.forwarded, plain.request_id, plain.act_for = head.forwarded, head.request_id, head.act_for
    return plain


def build_upstream_head(
    head: RequestHead,
    block: bytes | None,
    permit: Permit,
    *,
    request_id: bytes,
    forwarding: Forwarding,
    host: bytes,
    is_signed: bool = False,
    credential: bytes = b"",
) -> bytes:
    """The head that goes upstream. `host` is used if an HTTP/1.0 client sent none.

    `block`: the header lines to forward; None: those of `head`. `is_signed`: with the assertion of the identity.
    `credential`: the header line of the upstream's credential, after those that name a tool; `block` has no such lines.
    """
    fields, grant = head.fields, permit.grant
    return b"".join(
        (
            head.line.start,
            b"" if fields.host is not None else b"Host: %b\r\n" % host,
            head.block if block is None else block,
            b"" if isinstance(grant, PublicGrant) else grant.identity.header_block,
            grant.identity.assertion.line if is_signed and not isinstance(grant, PublicGrant) else b"",
            credential,
            forwarding.block(head),
            b"X-Request-Id: ",
            request_id,
            fields.head_end,
        )
    )

"""What the header fields of a head mean to this proxy: which lines are forwarded, and how the message is framed.

Every line is classified by its name. A line is stripped if it ends at this proxy: hop-by-hop fields, credentials, and
whatever a client sends under the prefix of the identity headers, or as X-Forwarded-* (RESERVED, ACT_FOR, FORWARDED).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from keyproxy.http.headers import NOT_HOP_BY_HOP, FieldNames, Kind, canonical
from keyproxy.http_messages import CredentialField
from keyproxy.reasons import Reason, Refusal

CONTENT_LENGTH_DIGITS_MAX: Final = 18

_OPTIONS_WITHOUT_FIELD: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""})
_OWS: Final = b" \t"

Fields = Sequence[tuple[bytes, bytes]]


class ParsedFields:
    """The parsed fields of one head. `is_forwarded`: for each field, in order, whether it is forwarded."""

    __slots__ = (
        "act_for",
        "content_length",
        "content_length_place",
        "content_type",
        "credentials",
        "expects_continue",
        "fails_expectation",
        "forwarded",
        "host",
        "is_chunked",
        "is_forwarded",
        "options",
        "request_id",
        "upgrades",
        "usages",
    )

    def __init__(self) -> None:
        self.is_forwarded: list[bool] = []
        self.credentials: list[CredentialField] = []
        self.forwarded: list[tuple[bytes, bytes]] = []
        self.request_id: bytes | None = None
        self.act_for: bytes | None = None
        self.host: bytes | None = None
        self.content_length: int | None = None
        #: The index of Content-Length among the fields; -1 without one.
        self.content_length_place = -1
        self.content_type: bytes | None = None
        self.is_chunked = False
        self.expects_continue = False
        self.fails_expectation = False
        self.options: list[bytes] = []
        self.upgrades: list[bytes] = []
        self.usages: list[bytes] = []

    @property
    def usage_tokens(self) -> bytes | None:
        """The value of X-Usage-Tokens; None if there is not exactly one."""
        return self.usages[0] if len(self.usages) == 1 else None

    @property
    def opens_tunnel(self) -> bool:
        """Whether this is one side of a WebSocket handshake. RFC 6455 section 4. Any other upgrade is ignored."""
        return self.names_websocket and b"upgrade" in self.options and not self.is_chunked

    @property
    def names_websocket(self) -> bool:
        """Whether an Upgrade field names WebSocket."""
        return any(b"websocket" in [one.strip(_OWS) for one in value.split(b",")] for value in self.upgrades)

    def keeps_alive(self, minor_version: int) -> bool:
        """Whether this side of the connection is persistent. RFC 9112 section 9.3."""
        if b"close" in self.options:
            return False
        return minor_version == 1 or b"keep-alive" in self.options


def parse_fields(fields: Fields, names: FieldNames, *, is_request: bool, hops: Collection[bytes] = ()) -> ParsedFields:
    """Parse the fields of a head. `hops`: the names in Connection, in canonical form. Raises a Refusal."""
    parsed = ParsedFields()
    for name, value in fields:
        kind = names.kind(name)
        is_forwarded = False
        if kind is Kind.PLAIN or (kind in (Kind.UNREADABLE, Kind.DROPPED) and not is_request):
            # An upstream's field names are not restricted: they are relayed to the client, which they do not mislead.
            is_forwarded = canonical(name) not in hops
        elif kind is Kind.USAGE:
            is_forwarded = canonical(name) not in hops
            parsed.usages += [value] if is_forwarded else []
        elif kind is Kind.UNREADABLE:
            raise malformed("a header name is invalid, or a framing field in another spelling")
        elif kind is Kind.CREDENTIAL and is_request:
            parsed.credentials.append(CredentialField(name.lower(), value))
        elif kind is Kind.FORWARDED and is_request:
            parsed.forwarded.append((name.lower(), value))
        elif kind is Kind.REQUEST_ID:
            parsed.request_id = value
        elif kind is Kind.ACT_FOR and is_request:
            if parsed.act_for is not None:
                raise malformed("more than one Act-For")
            parsed.act_for = value
        elif kind is Kind.UPGRADE:
            parsed.upgrades.append(value.lower())
        elif kind is Kind.EXPECT and is_request:
            for member in value.lower().split(b","):
                if member.strip(_OWS) == b"100-continue":
                    parsed.expects_continue = True
                elif member.strip(_OWS):
                    parsed.fails_expectation = True
        elif kind not in (Kind.HOP, Kind.RESERVED, Kind.ACT_FOR, Kind.DROPPED):
            is_forwarded = _parse_framing(parsed, kind, value, is_request=is_request)
        parsed.is_forwarded.append(is_forwarded)
    named = {canonical(option) for option in parsed.options} - _OPTIONS_WITHOUT_FIELD
    if named and not hops:
        if not named.isdisjoint(NOT_HOP_BY_HOP):
            raise malformed("Connection names a field that is not hop-by-hop")
        if is_request and names.act_for in named:
            raise malformed("Connection names Act-For")
        return parse_fields(fields, names, is_request=is_request, hops=named)
    return parsed


def _parse_framing(parsed: ParsedFields, kind: Kind, value: bytes, *, is_request: bool) -> bool:
    """Process a framing, Host or Content-Type field; return whether it is forwarded."""
    if kind is Kind.CONNECTION:
        parsed.options += (option.strip(_OWS).lower() for option in value.split(b","))
        return False
    if kind is Kind.TRANSFER_ENCODING:
        if parsed.is_chunked or value.lower() != b"chunked":
            raise malformed("Transfer-Encoding is not exactly 'chunked', once")
        parsed.is_chunked = True
        return False
    if kind is Kind.CONTENT_LENGTH:
        if parsed.content_length is not None:
            raise malformed("more than one Content-Length")
        if not value.isdigit() or len(value) > CONTENT_LENGTH_DIGITS_MAX:
            raise malformed("Content-Length is not a number")
        parsed.content_length = int(value)
        parsed.content_length_place = len(parsed.is_forwarded)
    elif is_request and kind is Kind.HOST:
        if parsed.host is not None:
            raise malformed("more than one Host")
        parsed.host = value
    elif is_request and kind is Kind.CONTENT_TYPE:
        if parsed.content_type is not None:
            if parsed.content_type != value:
                raise malformed("conflicting Content-Type fields")
            return False
        parsed.content_type = value
    return True


def malformed(detail: str) -> Refusal:
    """The refusal of a malformed message."""
    return Refusal(Reason.REQUEST_MALFORMED, detail)

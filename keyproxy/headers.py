"""Header fields: one canonicaliser, what ends at this proxy, and the head that goes upstream.

`FieldNames.kind` is the only place that knows what a header name means here. It judges a name once and remembers the
judgement, since the same few names come with every request. A name is compared in canonical form, lower-case with `-`
for `_`: servers that hand headers to CGI, WSGI or PHP programs fold the two, so `X_Keyproxy_User` is as much ours as
`X-Keyproxy-User`. Reserved names are dropped in any spelling; any other name outside `[A-Za-z0-9-]` is refused, because
`Content_Length` would be one thing to us and another to such a server.

The identity headers are ready bytes that come with the identity; they are appended after everything the client sent has
been filtered, so no field, repetition or Connection option of the client can replace, double or remove them.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final

from keyproxy.model import Permit, RequestHead


class Kind(enum.Enum):
    """What a header field means to this proxy."""

    PLAIN = enum.auto()  # end-to-end: forwarded
    HOP = enum.auto()  # ends here
    RESERVED = enum.auto()  # set by us alone: dropped in any spelling
    CREDENTIAL = enum.auto()
    HOST = enum.auto()
    CONTENT_LENGTH = enum.auto()
    TRANSFER_ENCODING = enum.auto()
    CONTENT_TYPE = enum.auto()  # forwarded, but refused if repeated
    CONNECTION = enum.auto()
    EXPECT = enum.auto()
    UPGRADE = enum.auto()  # ends here; a WebSocket handshake is made anew
    REQUEST_ID = enum.auto()
    FORWARDED = enum.auto()  # believed only from a trusted peer
    USAGE = enum.auto()  # forwarded; in an answer it says what was used
    UNREADABLE = enum.auto()  # a name that two servers could read differently


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

#: Fields that a Connection option may not name: without them the message would be another one. RFC 9110 section 7.6.1.
NOT_HOP_BY_HOP: Final = frozenset({Kind.HOST, Kind.CONTENT_LENGTH, Kind.TRANSFER_ENCODING, Kind.CONTENT_TYPE})

#: Fields that must not come after the body, where they could change what was judged. RFC 9110 section 6.5.1.
NOT_IN_TRAILERS: Final = frozenset(
    {Kind.HOST, Kind.CONTENT_LENGTH, Kind.TRANSFER_ENCODING, Kind.CONTENT_TYPE, Kind.CREDENTIAL, Kind.CONNECTION,
     Kind.EXPECT, Kind.UNREADABLE}
)  # fmt: skip

_NAME = re.compile(rb"[A-Za-z0-9-]+")
_REMEMBERED_MAX: Final = 2048
_REMEMBERED_BYTES_MAX: Final = 48

#: A client's request id is kept if it is one: no spaces, no controls, nothing that a log or a header could trip over.
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class FieldNames:
    """Knows every header name's Kind, with the identity headers under one configured prefix."""

    def __init__(self, header_prefix: str = "X-Keyproxy-") -> None:
        self._prefix = canonical(header_prefix.encode("ascii"))
        self._remembered: dict[bytes, Kind] = {}

    def kind(self, name: bytes) -> Kind:
        """The Kind of a header name in any spelling."""
        try:
            return self._remembered[name]
        except KeyError:
            pass
        kind = self._judge(name)
        # Full: forget all. A caller who sends thousands of names costs itself the judgement, and no one else for long.
        if len(self._remembered) >= _REMEMBERED_MAX:
            self._remembered.clear()
        if len(name) <= _REMEMBERED_BYTES_MAX:
            self._remembered[name] = kind
        return kind

    def _judge(self, name: bytes) -> Kind:
        plain = canonical(name)
        if plain.startswith(self._prefix):
            return Kind.RESERVED
        kind = Kind.FORWARDED if plain.startswith(b"x-forwarded-") else _KINDS.get(plain, Kind.PLAIN)
        if not _NAME.fullmatch(name):
            # Ours to set in any spelling: dropped. What else it may be, two servers could read differently.
            return Kind.RESERVED if kind in (Kind.REQUEST_ID, Kind.FORWARDED) else Kind.UNREADABLE
        return kind


def canonical(name: bytes) -> bytes:
    """A header name as CGI-like servers compare it: lower-case, `-` for `_`."""
    return name.lower().replace(b"_", b"-")


def sane_request_id(value: bytes) -> bool:
    """Whether a client's X-Request-Id may be kept."""
    return _SANE_REQUEST_ID.fullmatch(value) is not None


def identity_block(prefix: str, values: Iterable[tuple[str, str]]) -> bytes:
    """Identity headers as bytes: `values` are (name without prefix, value). Raises ValueError for an unsafe value."""
    lines = []
    for name, value in values:
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(f"{name}: not printable ASCII, or with space around it")
        lines.append(f"{prefix}{name}: {value}\r\n")
    return "".join(lines).encode("ascii")


class Forwarding:
    """The X-Forwarded-* fields for requests of one connection, by the trust rule.

    A trusted peer's X-Forwarded-For is kept and extended by the peer's own address; anybody else's is dropped. Empty
    fields and empty elements of the list are no claims, and are left out (RFC 9110 section 5.6.1).
    """

    __slots__ = ("_address", "_block", "_certificate", "_is_trusted", "_scheme")

    def __init__(self, address: bytes, *, is_trusted: bool, is_tls: bool, certificate: bytes = b"") -> None:
        """`address`: the peer's IP address, empty for a unix socket. `certificate`: a header line that names its
        verified certificate, or empty."""
        self._address = address
        self._is_trusted = is_trusted
        self._scheme = b"https" if is_tls else b"http"
        self._certificate = certificate
        first = b"X-Forwarded-For: %b\r\n" % address if address else b""
        self._block = b"%b%bX-Forwarded-Proto: %b\r\n" % (certificate, first, self._scheme)

    def block(self, head: RequestHead) -> bytes:
        """The fields as header lines."""
        if self._is_trusted and head.forwarded:
            return self._extended(head)
        return self._block + head.fields.host_block

    def _extended(self, head: RequestHead) -> bytes:
        told = {b"x-forwarded-proto": self._scheme}
        if head.fields.host is not None:
            told[b"x-forwarded-host"] = head.fields.host
        hops: list[bytes] = []
        for name, value in head.forwarded:
            if name == b"x-forwarded-for":
                hops += [one.strip(b" \t") for one in value.split(b",") if one.strip(b" \t")]
            elif value:
                told[name] = value
        if self._address:
            hops.append(self._address)
        lines = [self._certificate]
        lines += [b"X-Forwarded-For: %b\r\n" % b", ".join(hops)] if hops else []
        lines += [b"%b: %b\r\n" % (name.title(), value) for name, value in told.items()]
        return b"".join(lines)


class TrustRule:
    """Which peers' X-Forwarded-* are believed: networks, and `unix` for the peers of a unix socket."""

    def __init__(self, trusted_proxies: Sequence[str], header_prefix: str = "X-Keyproxy-") -> None:
        """Raises ValueError for an entry that is neither a network nor `unix`."""
        self._header_prefix = header_prefix
        self._trusts_unix = "unix" in trusted_proxies
        self._networks = [ipaddress.ip_network(entry) for entry in trusted_proxies if entry != "unix"]

    def forwarding(self, address: str, *, is_tls: bool, subject: str | None = None) -> Forwarding:
        """The Forwarding for a connection from this IP address; empty: from a unix socket.

        `subject`: the name in the client's verified certificate, None if there is none.
        """
        certificate = b""
        if subject is not None:
            certificate = identity_block(self._header_prefix, [("Client-Cert-Subject", subject)])
        if not address:
            return Forwarding(b"", is_trusted=self._trusts_unix, is_tls=is_tls, certificate=certificate)
        parsed = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None)
        peer = mapped if mapped is not None else parsed
        is_trusted = any(peer in network for network in self._networks)
        where = str(peer).encode("ascii")
        return Forwarding(where, is_trusted=is_trusted, is_tls=is_tls, certificate=certificate)


def dress(
    head: RequestHead, block: bytes, permit: Permit, *, request_id: bytes, forwarding: Forwarding, host: bytes
) -> bytes:
    """The head that goes upstream, with these of its lines. `host` is sent if the client, an HTTP/1.0 one, sent none."""
    fields = head.fields
    return b"".join(
        (
            head.line.start,
            b"" if fields.host is not None else b"Host: %b\r\n" % host,
            block,
            permit.grant.identity.header_block,
            forwarding.block(head),
            b"X-Request-Id: ",
            request_id,
            fields.head_end,
        )
    )

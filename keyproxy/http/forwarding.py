"""The X-Forwarded-* fields, and which peers may set them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from keyproxy.http.identity_headers import identity_block
from keyproxy.http_messages import RequestHead

#: A hop of X-Forwarded-For that may be an address, with or without a port.
_HOP = re.compile(
    rb"\[?([0-9A-Fa-f]*:[0-9A-Fa-f:.]+)(?:\](?::[0-9]{1,5})?)?|([0-9]{1,3}(?:\.[0-9]{1,3}){3})(?::[0-9]{1,5})?"
)

#: The number of hops that are cached, and their greatest length; then the cache is cleared.
_REMEMBERED_MAX: Final = 2048
_REMEMBERED_BYTES_MAX: Final = 48


class Forwarding:
    """The X-Forwarded-* fields for requests of one connection, by the trust rule.

    A trusted peer's X-Forwarded-For is kept and extended with the address of that peer; any other is dropped. Empty
    fields and empty list elements are left out (RFC 9110 section 5.6.1).
    """

    __slots__ = ("_address", "_block", "_certificate", "_is_trusted", "_rule", "_scheme")

    def __init__(
        self, address: bytes, *, is_trusted: bool, is_tls: bool, certificate: bytes = b"", rule: TrustRule | None = None
    ) -> None:
        """`address`: the peer's IP address, empty for a unix socket. `certificate`: a header line that names its
        verified certificate, or empty. `rule`: which addresses in the X-Forwarded-For of a trusted peer are trusted."""
        self._address = address
        self._is_trusted = is_trusted
        self._rule = rule
        self._scheme = b"https" if is_tls else b"http"
        self._certificate = certificate
        first = b"X-Forwarded-For: %b\r\n" % address if address else b""
        self._block = b"%b%bX-Forwarded-Proto: %b\r\n" % (certificate, first, self._scheme)

    @property
    def has_certificate(self) -> bool:
        """Whether the peer has presented a certificate, which was verified."""
        return bool(self._certificate)

    def block(self, head: RequestHead) -> bytes:
        """The fields as header lines."""
        if self._is_trusted and head.forwarded:
            return self._extended(head)
        return self._block + head.fields.host_block

    def client_address(self, head: RequestHead | None) -> bytes:
        """The client's IP address; empty for a unix socket's.

        The address of the peer; behind trusted proxies the right-most untrusted address of X-Forwarded-For.
        """
        if self._is_trusted and self._rule is not None and head is not None and head.forwarded:
            return self._rule.client_address(head.forwarded, self._address)
        return self._address

    def _extended(self, head: RequestHead) -> bytes:
        fields = {b"x-forwarded-proto": self._scheme}
        if head.fields.host is not None:
            fields[b"x-forwarded-host"] = head.fields.host
        hops: list[bytes] = []
        for name, value in head.forwarded:
            if name == b"x-forwarded-for":
                hops += [one.strip(b" \t") for one in value.split(b",") if one.strip(b" \t")]
            elif value:
                fields[name] = value
        if self._address:
            hops.append(self._address)
        lines = [self._certificate]
        lines += [b"X-Forwarded-For: %b\r\n" % b", ".join(hops)] if hops else []
        lines += [b"%b: %b\r\n" % (name.title(), value) for name, value in fields.items()]
        return b"".join(lines)


class TrustRule:
    """The peers with X-Forwarded-* fields that are trusted: networks, and `unix` for the peers of a unix socket."""

    def __init__(self, trusted_proxies: Sequence[str], header_prefix: str = "X-Keyproxy-") -> None:
        """Raises ValueError for an entry that is neither a network nor `unix`."""
        self._header_prefix = header_prefix
        self._trusts_unix = "unix" in trusted_proxies
        self._networks = [ipaddress.ip_network(entry) for entry in trusted_proxies if entry != "unix"]
        #: Hops of X-Forwarded-For: the address, empty if invalid, and whether it is that of a trusted proxy.
        self._hops: dict[bytes, tuple[bytes, bool]] = {}

    def client_address(self, forwarded: Sequence[tuple[bytes, bytes]], peer: bytes) -> bytes:
        """The client's address by the X-Forwarded-For of a trusted `peer`.

        Read from the right: each hop was written by the one after it. Everything to the left of the first hop that is
        untrusted or invalid may be forged.
        """
        found = peer
        fields = [value for name, value in forwarded if name == b"x-forwarded-for"]
        for hop in reversed(b",".join(fields).split(b",")):
            address, is_trusted = self._hop(hop.strip(b" \t"))
            if not address:
                break
            found = address
            if not is_trusted:
                break
        return found

    def _hop(self, text: bytes) -> tuple[bytes, bool]:
        known = self._hops.get(text)
        if known is None:
            if len(self._hops) >= _REMEMBERED_MAX:
                self._hops.clear()
            known = self._parsed_hop(text)
            if len(text) <= _REMEMBERED_BYTES_MAX:
                self._hops[text] = known
        return known

    def _parsed_hop(self, text: bytes) -> tuple[bytes, bool]:
        # Some proxies include the port: 192.0.2.1:8080, [2001:db8::1]:8080.
        match = _HOP.fullmatch(text)
        try:
            peer = _unmapped((match[1] or match[2]).decode("ascii")) if match is not None else None
        except ValueError:
            peer = None
        if peer is None:
            return b"", False
        return str(peer).encode("ascii"), any(peer in network for network in self._networks)

    def forwarding(self, address: str, *, is_tls: bool, subject: str | None = None) -> Forwarding:
        """The Forwarding for a connection from this IP address; empty: from a unix socket.

        `subject`: the name in the client's verified certificate, None if there is none.
        """
        certificate = b""
        if subject is not None:
            certificate = identity_block(self._header_prefix, [("Client-Cert-Subject", subject)])
        if not address:
            return Forwarding(b"", is_trusted=self._trusts_unix, is_tls=is_tls, certificate=certificate, rule=self)
        peer = _unmapped(address)
        is_trusted = any(peer in network for network in self._networks)
        where = str(peer).encode("ascii")
        return Forwarding(where, is_trusted=is_trusted, is_tls=is_tls, certificate=certificate, rule=self)


def _unmapped(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IP address without its zone; an IPv4-mapped address as IPv4. Raises ValueError."""
    parsed = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return mapped if mapped is not None else parsed

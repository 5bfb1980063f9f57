"""The X-Forwarded-* fields, which peers may set them, and the client's address as it may be recorded."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from keyproxy.http.identity_headers import identity_block
from keyproxy.http_messages import RequestHead

#: A hop of X-Forwarded-For that may be an address, with or without a port and a zone.
_HOP = re.compile(
    rb"\[([0-9A-Fa-f]*:[0-9A-Fa-f:.]+)(?:%[0-9A-Za-z._~-]+)?\](?::[0-9]{1,5})?"
    rb"|([0-9A-Fa-f]*:[0-9A-Fa-f:.]+)(?:%[0-9A-Za-z._~-]+)?"
    rb"|([0-9]{1,3}(?:\.[0-9]{1,3}){3})(?::[0-9]{1,5})?"
)

#: A list without empty elements, as nearly all proxies write it.
_PLAIN_LIST = re.compile(rb"[^ \t,]+(?:, ?[^ \t,]+)*+")
_FORWARDED_FOR: Final = b"x-forwarded-for"

#: How much of a client's address is recorded.
FULL: Final = "full"
NETWORK: Final = "network"
NONE: Final = "none"

#: The prefix lengths of the networks by which clients are distinguished, by the version of IP.
_IPV4: Final = 4
_NETWORK_BITS: Final = {_IPV4: 24, 6: 48}

#: The number of hops that are cached, and their greatest length; then the cache is cleared.
_REMEMBERED_MAX: Final = 2048
_REMEMBERED_BYTES_MAX: Final = 48


class Hop:
    """A client or proxy by its address, empty if it is unknown.

    `network`: its /24 or /48, by which clients are distinguished; empty if none may be recorded. `recorded`: what may be
    recorded of the address. `is_trusted`: the X-Forwarded-* fields that it sends are trusted.
    """

    __slots__ = ("address", "is_trusted", "network", "recorded")

    def __init__(self, address: bytes, network: bytes, recorded: bytes, *, is_trusted: bool) -> None:
        self.address: Final = address
        self.network: Final = network
        self.recorded: Final = recorded
        self.is_trusted: Final = is_trusted


#: The peer of a unix socket, and a malformed hop.
UNKNOWN: Final = Hop(b"", b"", b"", is_trusted=False)


class Forwarding:
    """The X-Forwarded-* fields for requests of one connection, by the trust rule.

    A trusted peer's X-Forwarded-For is kept and extended with the address of that peer; any other is dropped. Empty
    fields and empty list elements are left out (RFC 9110 section 5.6.1).
    """

    __slots__ = (
        "_address", "_block", "_certificate", "_is_trusted", "_last", "_peer", "_rule", "_scheme", "certificate_digest",
    )  # fmt: skip

    def __init__(
        self,
        peer: Hop,
        *,
        is_trusted: bool,
        is_tls: bool,
        certificate: bytes = b"",
        certificate_digest: bytes = b"",
        rule: TrustRule | None = None,
    ) -> None:
        """`peer`: its address is empty for a unix socket. `certificate`: a header line that names its verified
        certificate, or empty; `certificate_digest`: the SHA-256 of that. `rule`: which addresses in the X-Forwarded-For
        of a trusted peer are trusted."""
        #: SHA-256 of the peer's verified certificate in DER, empty if it has none.
        self.certificate_digest: Final = certificate_digest
        self._peer = peer
        self._address = address = peer.address
        self._is_trusted = is_trusted
        self._rule = rule
        self._scheme = b"https" if is_tls else b"http"
        self._certificate = certificate
        first = b"X-Forwarded-For: %b\r\n" % address if address else b""
        self._block = b"%b%bX-Forwarded-Proto: %b\r\n" % (certificate, first, self._scheme)
        #: What follows the addresses of a client's list.
        self._last = b""
        if is_trusted:
            self._last = b"%b%b\r\nX-Forwarded-Proto: %b\r\n" % (b", " if address else b"", address, self._scheme)

    @property
    def has_certificate(self) -> bool:
        """Whether the peer has presented a certificate, which was verified."""
        return bool(self._certificate)

    @property
    def is_trusted(self) -> bool:
        """Whether requests of this connection may come from several clients."""
        return self._is_trusted

    def block(self, head: RequestHead) -> bytes:
        """The fields as header lines."""
        if self._is_trusted and head.forwarded:
            name, value = head.forwarded[0]
            if len(head.forwarded) == 1 and name == _FORWARDED_FOR and _PLAIN_LIST.fullmatch(value):
                return b"%bX-Forwarded-For: %b%b%b" % (self._certificate, value, self._last, head.fields.host_block)
            return self._extended(head)
        return self._block + head.fields.host_block

    def client(self, head: RequestHead | None) -> Hop:
        """The client, the peer or, behind trusted proxies, the right-most untrusted one of X-Forwarded-For."""
        if self._is_trusted and self._rule is not None and head is not None and head.forwarded:
            return self._rule.client(head.forwarded, self._peer)
        return self._peer

    def recorded_address(self, head: RequestHead | None) -> bytes:
        """The client's address as it may be recorded: its IP address or its network; empty: none, or unknown."""
        return self.client(head).recorded if self._is_trusted else self._peer.recorded

    def _extended(self, head: RequestHead) -> bytes:
        fields = {b"x-forwarded-proto": self._scheme}
        if head.fields.host is not None:
            fields[b"x-forwarded-host"] = head.fields.host
        hops: list[bytes] = []
        for name, value in head.forwarded:
            if name == _FORWARDED_FOR:
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

    def __init__(
        self, trusted_proxies: Sequence[str], header_prefix: str = "X-Keyproxy-", *, recorded: str = FULL
    ) -> None:
        """`recorded`: how much of a client's address is recorded. Raises ValueError for an entry that is neither a
        network nor `unix`."""
        self._header_prefix = header_prefix
        self._recorded = recorded
        self._trusts_unix = "unix" in trusted_proxies
        self._networks = [ipaddress.ip_network(entry) for entry in trusted_proxies if entry != "unix"]
        self._hops: dict[bytes, Hop] = {}
        #: Of peers without a certificate: most connections come from few of them, and share what is known of theirs.
        self._peers: dict[tuple[str, bool], Forwarding] = {}

    def client(self, forwarded: Sequence[tuple[bytes, bytes]], peer: Hop) -> Hop:
        """The client by the X-Forwarded-For of a trusted `peer`.

        Read from the right: each hop was written by the one after it. Everything to the left of the first hop that is
        untrusted or invalid may be forged.
        """
        found = peer
        for name, value in reversed(forwarded):
            end = len(value) if name == _FORWARDED_FOR else -1
            while end >= 0:
                start = value.rfind(b",", 0, end) + 1
                hop = self._hop(value[start:end].strip(b" \t"))
                if not hop.address:
                    return found
                if not hop.is_trusted:
                    return hop
                found = hop
                end = start - 1
        return found

    def _hop(self, text: bytes) -> Hop:
        known = self._hops.get(text)
        if known is None:
            if len(self._hops) >= _REMEMBERED_MAX:
                self._hops.clear()
            known = self._parsed_hop(text)
            if len(text) <= _REMEMBERED_BYTES_MAX:
                self._hops[text] = known
        return known

    def _parsed_hop(self, text: bytes) -> Hop:
        # Some proxies include the port: 192.0.2.1:8080, [2001:db8::1]:8080.
        match = _HOP.fullmatch(text)
        if match is None:
            return UNKNOWN
        try:
            return self._hop_of(_unmapped((match[1] or match[2] or match[3]).decode("ascii")))
        except ValueError:
            return UNKNOWN

    def _hop_of(self, parsed: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Hop:
        address, network = str(parsed).encode("ascii"), _network_of(parsed)
        recorded = {FULL: address, NETWORK: network}.get(self._recorded, b"")
        is_trusted = any(parsed in one for one in self._networks)
        return Hop(address, b"" if self._recorded == NONE else network, recorded, is_trusted=is_trusted)

    def forwarding(
        self, address: str, *, is_tls: bool, subject: str | None = None, certificate_digest: bytes = b""
    ) -> Forwarding:
        """The Forwarding for a connection from this IP address; empty: from a unix socket.

        `subject`: the name in the client's verified certificate, None if there is none; `certificate_digest`: its
        SHA-256.
        """
        if subject is None and not certificate_digest:
            known = self._peers.get((address, is_tls))
            if known is None:
                if len(self._peers) >= _REMEMBERED_MAX:
                    self._peers.clear()
                known = self._peers[address, is_tls] = self._forwarding(address, b"", b"", is_tls=is_tls)
            return known
        certificate = b""
        if subject is not None:
            certificate = identity_block(self._header_prefix, [("Client-Cert-Subject", subject)])
        return self._forwarding(address, certificate, certificate_digest, is_tls=is_tls)

    def _forwarding(self, address: str, certificate: bytes, certificate_digest: bytes, *, is_tls: bool) -> Forwarding:
        peer = self._hop_of(_unmapped(address)) if address else UNKNOWN
        is_trusted = peer.is_trusted if address else self._trusts_unix
        return Forwarding(
            peer,
            is_trusted=is_trusted,
            is_tls=is_tls,
            certificate=certificate,
            certificate_digest=certificate_digest,
            rule=self,
        )


def _network_of(parsed: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    """The network of an address, its first 24 or 48 bits, as `192.0.2.0/24`."""
    bits = _NETWORK_BITS[parsed.version]
    beyond = parsed.max_prefixlen - bits
    first = int(parsed) >> beyond << beyond
    network = ipaddress.IPv4Address(first) if parsed.version == _IPV4 else ipaddress.IPv6Address(first)
    return b"%b/%d" % (str(network).encode("ascii"), bits)


def _unmapped(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IP address without its zone; an IPv4-mapped address as IPv4. Raises ValueError."""
    parsed = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return mapped if mapped is not None else parsed

"""Which peers of a server may state identities: those that only keyproxy can be.

A server or middleware that takes the client's address from X-Forwarded-For lets every client choose it. uvicorn and
hypercorn then set the port 0, unless the header names a port (uvicorn), or X-Forwarded-Port does (daphne). So a peer
whose port is 0, or whose address and port the request names itself, is no evidence.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any, Final

LOOPBACK_NETWORKS: Final = ("127.0.0.0/8", "::1/128")

#: The shortest prefixes: those of the largest private networks, 10.0.0.0/8 and fc00::/7. Shorter ones would trust all.
_PREFIX_BITS_MIN: Final = {4: 8, 6: 7}

_ADDRESSES_KEPT_MAX: Final = 1024
_PORTS: Final = range(1, 65_536)

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class UnixPeers:
    """The peers of a unix socket, whose file mode decides which processes connect."""

    __slots__ = ()

    def trusts_asgi(self, scope: Mapping[str, Any], forwarding: Iterable[str | bytes] | None) -> bool:
        """Whether the request came by a unix socket with a path."""
        server = scope.get("server")
        if not isinstance(server, tuple | list) or len(server) != 2:
            return False
        path, port = server
        return port is None and isinstance(path, str) and path.startswith("/")

    def trusts_wsgi(self, environ: Mapping[str, Any], forwarding: Iterable[str | bytes] | None) -> bool:
        """Whether the request came by a unix socket: only such a peer has no address."""
        return not environ.get("REMOTE_ADDR")

    def __repr__(self) -> str:
        return "unix"


class NetworkPeers:
    """The peers with an address in these networks."""

    __slots__ = ("_known", "_networks")

    def __init__(self, networks: Iterable[str]) -> None:
        """Raises ValueError for a value that is not a network, and for networks that are too large to trust."""
        if isinstance(networks, str | bytes):
            raise TypeError("networks must be a list, such as ['127.0.0.0/8']")
        parsed: list[_Network] = [ipaddress.ip_network(one) for one in networks]
        if not parsed:
            raise ValueError("at least one network is required")
        for version, bits_min in _PREFIX_BITS_MIN.items():
            # Several small networks can add up to a large one.
            for network in ipaddress.collapse_addresses(one for one in parsed if one.version == version):  # type: ignore[type-var]
                if network.prefixlen < bits_min:
                    raise ValueError(f"{network} is too large to trust; the prefix must have at least {bits_min} bits")
        self._networks: Final = tuple(parsed)
        self._known: dict[str, bool] = {}

    def trusts_asgi(self, scope: Mapping[str, Any], forwarding: Iterable[str | bytes] | None) -> bool:
        """Whether the peer is in the networks, and its address is the connection's."""
        client = scope.get("client")
        if not isinstance(client, tuple | list) or len(client) != 2:
            return False
        address, port = client
        # Granian writes it as text.
        number = _number(port)
        if number not in _PORTS or not self._contains(address):
            return False
        return forwarding is None or not _is_named(address, number, forwarding)

    def trusts_wsgi(self, environ: Mapping[str, Any], forwarding: Iterable[str | bytes] | None) -> bool:
        """Like `trusts_asgi`. Some servers, such as Django's development server, provide no port."""
        address, port = environ.get("REMOTE_ADDR"), environ.get("REMOTE_PORT")
        if not self._contains(address) or "werkzeug.proxy_fix.orig" in environ:
            return False
        if port is None:
            return True
        number = _number(port)
        if number not in _PORTS:
            return False
        return forwarding is None or not _is_named(str(address), number, forwarding)

    def _contains(self, address: object) -> bool:
        if not isinstance(address, str):
            return False
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= _ADDRESSES_KEPT_MAX:
                self._known.clear()
            known = self._known[address] = self._judged(address)
        return known

    def _judged(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        # A socket for both versions of IP shows IPv4 peers as ::ffff:127.0.0.1.
        mapped = getattr(parsed, "ipv4_mapped", None)
        return any((mapped or parsed) in network for network in self._networks)

    def __repr__(self) -> str:
        return f"loopback({', '.join(map(str, self._networks))})"


def _is_named(address: str, port: int, forwarding: Iterable[str | bytes]) -> bool:
    """Whether a forwarding header names this address with this port, or this port alone.

    The port is parsed as servers do, by `int`.
    """
    for value in forwarding:
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        for hop in text.split(","):
            host, colon, number = hop.strip().rpartition(":")
            if _number(number) == port and (not colon or host.strip("[]") == address):
                return True
    return False


def _number(text: object) -> int:
    """The number that a text states, or that is given as one; 0 if it is none."""
    try:
        return int(text) if isinstance(text, str | int) else 0
    except ValueError:
        return 0

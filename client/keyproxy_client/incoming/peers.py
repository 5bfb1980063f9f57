"""Which peers of a server may state identities: those that only keyproxy can be.

A server or middleware that takes the client's address from X-Forwarded-For lets every client choose it. uvicorn and
hypercorn then set the port 0, unless the header names a port (uvicorn), or X-Forwarded-Port does (daphne). So a peer
whose port is 0, or whose address and port the request names itself, is no evidence.

In WSGI the port may be absent or stay that of the connection. There a peer whose address the request names is no
evidence either, unless the server takes no address from headers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

LOOPBACK_NETWORKS: Final = ("127.0.0.0/8", "::1/128")

#: The shortest prefixes: those of the largest private networks, 10.0.0.0/8 and fc00::/7. Shorter ones would trust all.
_PREFIX_BITS_MIN: Final = {4: 8, 6: 7}

_ADDRESSES_KEPT_MAX: Final = 1024
_PORTS: Final = range(1, 65_536)

#: Of X-Forwarded-For, and of the parameters of Forwarded.
_SEPARATOR: Final = re.compile("[,;]")
_FOR: Final = re.compile("for *= *", re.IGNORECASE)

#: Variables of WSGI that show that the address is what Werkzeug's ProxyFix, or the PROXY protocol in gunicorn, states.
_PROXY_FIX: Final = "werkzeug.proxy_fix.orig"
_PROXY_PROTOCOL: Final = "PROXY_PROTOCOL"
#: The variable by which waitress is known, which takes an address from a header and keeps the port of the connection.
_WAITRESS: Final = "waitress.client_disconnected"

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
        """Whether the request came by a unix socket: only such a peer has no address, and no port.

        waitress takes an empty address from a header, and gunicorn from the PROXY protocol.
        """
        return not environ.get("REMOTE_ADDR") and "REMOTE_PORT" not in environ and not _is_rewritten(environ)

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
        if not self._contains(address) or _is_rewritten(environ):
            return False
        if port is not None:
            number = _number(port)
            if number not in _PORTS or (forwarding is not None and _is_named(str(address), number, forwarding)):
                return False
        if forwarding is None or not _may_keep_the_port(environ):
            return True
        return not any(map(self._contains, _stated_addresses(forwarding)))

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


def _is_rewritten(environ: Mapping[str, Any]) -> bool:
    return _PROXY_FIX in environ or _PROXY_PROTOCOL in environ


def _may_keep_the_port(environ: Mapping[str, Any]) -> bool:
    """Whether the server, or an adapter of ASGI to WSGI, may have changed the address without a trace in the port."""
    if "REMOTE_PORT" in environ:
        return _WAITRESS in environ
    # uWSGI and wsgiref, the server of Django's `runserver`, take no address from headers.
    return "uwsgi.version" not in environ and not str(environ.get("SERVER_SOFTWARE")).startswith("WSGIServer/")


def _hops(forwarding: Iterable[str | bytes]) -> Iterator[str]:
    """The parts of forwarding headers that may be an address, a port, or both."""
    for value in forwarding:
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        for part in _SEPARATOR.split(text):
            yield _FOR.sub("", part.strip()).strip('" ')


def _stated_addresses(forwarding: Iterable[str | bytes]) -> Iterator[str]:
    """All addresses that these headers may state."""
    for hop in _hops(forwarding):
        yield hop.strip("[]")
        yield hop.rpartition(":")[0].strip("[] ")


def _is_named(address: str, port: int, forwarding: Iterable[str | bytes]) -> bool:
    """Whether a forwarding header names this address with this port, or this port alone.

    The port is parsed as servers do, by `int`.
    """
    for hop in _hops(forwarding):
        host, colon, number = hop.rpartition(":")
        if _number(number) == port and (not colon or host.strip("[]") == address):
            return True
    return False


def _number(text: object) -> int:
    """The number that a text states, or that is given as one; 0 if it is none."""
    try:
        return int(text) if isinstance(text, str | int) else 0
    except ValueError:
        return 0

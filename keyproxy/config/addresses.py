"""Find addresses in the configuration that lead to the same socket. Pure: the caller passes a function to resolve names.

Ports are shared on purpose (SO_REUSEPORT), so the kernel does not reject a second listener on a port but distributes
connections over both. Listeners with different purposes must therefore never overlap, wildcards included.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Resolves a host to its IP addresses. A name that cannot be resolved is returned unchanged.
Resolve: TypeAlias = Callable[[str], frozenset[IpAddress | str]]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_LOOPBACK: Final[frozenset[IpAddress | str]] = frozenset(
    {ipaddress.IPv4Address("127.0.0.1"), ipaddress.IPv6Address("::1")}
)


class NetworkAddress(NamedTuple):
    """The target of an address: hosts and a port, or the path of a unix socket."""

    hosts: frozenset[IpAddress | str]
    port: int
    path: str = ""


def listener_problem(value: str) -> str | None:
    """Return the fault of a listener's address, or None."""
    if value.startswith("unix:"):
        return None if value[5:].startswith("/") else "must be unix: and an absolute path"
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        return "must be 'host:port', '[ipv6]:port' or 'unix:/path'"
    return None


def upstream_problem(value: str) -> str | None:
    """Return the fault of an upstream's URL, or None."""
    if not re.fullmatch(r"[!-~]+", value):
        return "contains a space or another character that is invalid in a URL"
    if value.startswith("unix:"):
        return listener_problem(value)
    try:
        parts = urlsplit(value)
        port_is_sane = parts.port is None or parts.port > 0
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_sane:
        return "must be 'http://host[:port]', 'https://host[:port]' or 'unix:/path'"
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username or parts.password:
        return "must name only a server: the path of a request is forwarded unchanged"
    return None


def mode_problem(value: str) -> str | None:
    """Return the fault of a unix socket's file mode, or None."""
    if not re.fullmatch(r"0?[0-7]{3}", value) or int(value, 8) & 0o600 != 0o600 or int(value, 8) & 0o111:
        return "must be an octal mode such as '0600' or '0660': readable and writable by the owner, not executable"
    return None


def literal(host: str) -> frozenset[IpAddress | str]:
    """The addresses of a host that need no lookup: numeric ones, and those of localhost."""
    if host.lower().rstrip(".") == "localhost":
        return _LOOPBACK
    try:
        return frozenset({plain(ipaddress.ip_address(host))})
    except ValueError:
        return frozenset({host.lower()})


def plain(address: IpAddress) -> IpAddress:
    """Unwrap an IPv4-mapped IPv6 address."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def of_listener(address: str, resolve: Resolve = literal) -> NetworkAddress:
    """The NetworkAddress of a listener's `host:port`, `[ipv6]:port` or `unix:/path`."""
    if address.startswith("unix:"):
        return NetworkAddress(frozenset(), 0, _normal(address[5:]))
    host, _, port = address.rpartition(":")
    return NetworkAddress(resolve(host.strip("[]")), int(port))


def of_url(url: str, resolve: Resolve = literal) -> NetworkAddress:
    """The NetworkAddress of an upstream's `http://host[:port]`, `https://host[:port]` or `unix:/path`."""
    if url.startswith("unix:"):
        return NetworkAddress(frozenset(), 0, _normal(url[5:]))
    parts = urlsplit(url)
    return NetworkAddress(resolve(parts.hostname or ""), parts.port or _DEFAULT_PORTS[parts.scheme.lower()])


def overlap(one: NetworkAddress, other: NetworkAddress) -> bool:
    """Whether two listeners would compete for connections. Port 0 is any free port: it never overlaps."""
    if one.path or other.path:
        return one.path == other.path
    if one.port != other.port or not one.port:
        return False
    return any(_covers(a, b) or _covers(b, a) for a in one.hosts for b in other.hosts)


def reaches(target: NetworkAddress, listener: NetworkAddress, is_local: Callable[[IpAddress], bool]) -> bool:
    """Whether connecting to `target` ends at `listener`. `is_local`: whether an address belongs to this machine."""
    if target.path or listener.path:
        return target.path == listener.path
    if target.port != listener.port:
        return False
    for host in target.hosts:
        # Connecting to the wildcard means connecting to this machine.
        ends_here = not isinstance(host, str) and (host.is_unspecified or is_local(host))
        for bound in listener.hosts:
            if bound == host or (_is_wildcard(host) and _covers(host, bound) and _is_loopback(bound)):
                return True
            if ends_here and _is_wildcard(bound) and _covers(bound, host):
                return True
    return False


def conflicts(
    listeners: Mapping[str, str],
    upstreams: Mapping[str, str],
    *,
    resolve: Resolve = literal,
    is_local: Callable[[IpAddress], bool] = lambda address: address.is_loopback,
) -> list[str]:
    """One sentence for each pair of overlapping listeners, and for each upstream that leads back to a listener.

    Both mappings are from configuration key to value.
    """
    wrong = []
    places = {name: of_listener(address, resolve) for name, address in listeners.items()}
    names = list(places)
    for number, name in enumerate(names):
        wrong += [
            f"{name}: {listeners[name]} overlaps {before} ({listeners[before]}): give each listener its own address"
            for before in names[:number]
            if overlap(places[before], places[name])
        ]
    for key, url in upstreams.items():
        target = of_url(url, resolve)
        wrong += [
            f"{key}: {url} is this proxy itself: {name} is {listeners[name]}"
            for name in names
            if reaches(target, places[name], is_local)
        ]
    return wrong


def _normal(path: str) -> str:
    # POSIX lets a leading // mean something else; Linux does not.
    return posixpath.normpath("/" + path.lstrip("/"))


def _covers(one: IpAddress | str, other: IpAddress | str) -> bool:
    """Whether a listener on `one` takes connections to `other`. A listener on :: takes IPv4 as well."""
    if isinstance(one, str) or isinstance(other, str) or not one.is_unspecified:
        return one == other
    return one.version == 6 or other.version == 4


def _is_wildcard(host: IpAddress | str) -> bool:
    return not isinstance(host, str) and host.is_unspecified


def _is_loopback(host: IpAddress | str) -> bool:
    return not isinstance(host, str) and host.is_loopback


def port_of(address: str) -> int | None:
    """The port of a listener's address; None for a unix socket, and without an address."""
    return int(address.rpartition(":")[2]) if address and not address.startswith("unix:") else None


def is_loopback(address: str) -> bool:
    """Whether a listener's address is reachable from this host only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

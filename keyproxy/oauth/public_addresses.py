"""Which IP addresses are public: reachable from everywhere, and never this machine or its network.

The ranges are those of the IANA registries of special-purpose addresses. The standard library has them too, but their
meaning there depends on the version of Python.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final, TypeAlias

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_NOT_PUBLIC_V4: Final = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
#: Of the global unicast addresses. 6to4 and Teredo lead to an IPv4 address that only a relay knows.
_NOT_PUBLIC_V6: Final = ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
_GLOBAL_UNICAST: Final = "2000::/3"
_NAT64: Final = "64:ff9b::/96"

_V4_BITS: Final = 0xFFFF_FFFF


def carried(address: IpAddress) -> IpAddress:
    """The IPv4 address that an IPv6 address leads to, IPv4-mapped or by NAT64; else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in ipaddress.IPv6Network(_NAT64):
        return ipaddress.IPv4Address(int(address) & _V4_BITS)
    return address


def is_public(address: IpAddress) -> bool:
    """Whether an address is public, and the one that it leads to."""
    target = carried(address)
    if isinstance(target, ipaddress.IPv4Address):
        return not _is_within(target, map(ipaddress.IPv4Network, _NOT_PUBLIC_V4))
    if target.scope_id is not None or target not in ipaddress.IPv6Network(_GLOBAL_UNICAST):
        return False
    return not _is_within(target, map(ipaddress.IPv6Network, _NOT_PUBLIC_V6))


def is_within(address: IpAddress, networks: Iterable[IpNetwork]) -> bool:
    """Whether the address that this one leads to is within one of the networks."""
    return _is_within(carried(address), networks)


def _is_within(address: IpAddress, networks: Iterable[IpNetwork]) -> bool:
    return any(address in network for network in networks if network.version == address.version)

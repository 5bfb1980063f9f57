"""Redirect URIs: which are acceptable, and which presented one matches a registered one. RFC 8252 and RFC 9700.

Comparison is exact, except for the port of a loopback URI, which a native program learns when it starts. A URI of a known
client may have `{}` for one path segment; no URI of another client can contain these characters.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable
from typing import Final

BYTES_MAX: Final = 500

#: One path segment of a known client's URI.
SEGMENT: Final = "{}"

#: Schemes that run code, read local files or start programs in some browser or operating system.
_DANGEROUS_SCHEMES: Final = frozenset(
    {"javascript", "data", "vbscript", "file", "blob", "about", "intent", "filesystem"}
)
_DANGEROUS_PREFIX: Final = "ms-"

#: The characters of RFC 3986. A browser reads others, such as `\`, differently than this module.
_CHARACTERS: Final = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_PARTS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/?]*))?(.*)")
_HTTPS_AUTHORITY: Final = re.compile(
    r"((?:[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?\.)*[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?\.?|\[[0-9A-Fa-f:.]+\])"
    r"(?::([0-9]{1,5}))?"
)
_LOOPBACK: Final = re.compile(r"(http://(?:127\.0\.0\.1|\[::1\]|localhost))(?::([0-9]{1,5}))?(?=[/?]|$)(.*)")
#: A host that browsers read as an IP address, whatever its spelling: `0x7f.1` is 127.0.0.1.
_ADDRESS: Final = re.compile(r"\[.*\]|(?:.*\.)?(?:[0-9]+|0[Xx][0-9A-Fa-f]*)\.?")
_PORT_MAX: Final = 65_535

_FREE_SEGMENT: Final = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+"


def fault(uri: str, known_schemes: Collection[str] = ()) -> str | None:
    """Return what is wrong with a redirect URI, as a predicate, or None.

    `known_schemes`: private-use schemes without a dot that are accepted.
    """
    if not uri:
        return "is empty"
    if len(uri.encode("utf-8", "surrogatepass")) > BYTES_MAX:
        return f"has more than {BYTES_MAX} bytes"
    if _CHARACTERS.fullmatch(uri) is None:
        return "contains a character that is invalid in a URI"
    if "#" in uri:
        return "has a fragment"
    parts = _PARTS.fullmatch(uri)
    if parts is None:
        return "has no scheme"
    scheme, authority = parts[1], parts[2]
    lower = scheme.lower()
    if lower in _DANGEROUS_SCHEMES or lower.startswith(_DANGEROUS_PREFIX):
        return f"has the scheme {lower}, which is not allowed"
    if scheme != lower:
        return "has a scheme in upper case"
    if authority is not None and "@" in authority:
        return "has userinfo"
    if scheme == "https":
        return _https_fault(authority)
    if scheme == "http":
        return _http_fault(uri)
    if "." in scheme or scheme in known_schemes:
        return None
    return (
        "has a scheme that is neither https nor private-use: a private-use scheme contains a dot, as in com.example.app"
    )


def matches(registered: str, presented: str) -> bool:
    """Whether a presented URI is the registered one: the same text, except for the port of http loopback."""
    if SEGMENT in registered:
        return _pattern(registered).fullmatch(presented) is not None
    return registered == presented or (
        is_loopback(registered) and without_loopback_port(registered) == without_loopback_port(presented)
    )


def matches_any(registered: Iterable[str], presented: str) -> bool:
    """Whether a presented URI is one of the registered ones."""
    return any(matches(one, presented) for one in registered)


def is_loopback(uri: str) -> bool:
    """Whether a URI leads to a program on the user's own machine by http, which any program there may listen for."""
    return _LOOPBACK.fullmatch(uri) is not None


def without_loopback_port(uri: str) -> str:
    """The URI, without its port if it is http loopback."""
    loopback = _LOOPBACK.fullmatch(uri)
    return uri if loopback is None else loopback[1] + loopback[3]


def scheme(uri: str) -> str:
    """The scheme of a valid URI."""
    return uri.partition(":")[0]


def host(uri: str) -> str:
    """The host of a valid https or http URI in lower case, without port; empty for other schemes."""
    parts = _PARTS.fullmatch(uri)
    if parts is None or parts[1] not in ("https", "http") or parts[2] is None:
        return ""
    return re.sub(r":[0-9]*$", "", parts[2]).lower()


def shown_target(uri: str) -> str:
    """What a user is shown as the target of a redirect: the host, or the private-use scheme with its colon."""
    return host(uri) or f"{scheme(uri)}:"


def _https_fault(authority: str | None) -> str | None:
    found = _HTTPS_AUTHORITY.fullmatch(authority or "")
    if found is None:
        return "has no valid host"
    if _ADDRESS.fullmatch(found[1]) is not None and not _is_plain_address(found[1].lower()):
        return "has an IP address that is invalid, or that browsers write differently"
    return _port_fault(found[2])


def _http_fault(uri: str) -> str | None:
    loopback = _LOOPBACK.fullmatch(uri)
    if loopback is None:
        return "has the scheme http with another host than 127.0.0.1, [::1] or localhost"
    return _port_fault(loopback[2])


def _is_plain_address(host: str) -> bool:
    """Whether a host is an IP address in the form in which browsers show it."""
    try:
        if host.startswith("["):
            address = ipaddress.IPv6Address(host.strip("[]"))
            return address.ipv4_mapped is None and f"[{address.compressed}]" == host
        return str(ipaddress.IPv4Address(host)) == host
    except ValueError:
        return False


def _port_fault(port: str | None) -> str | None:
    return None if port is None or 1 <= int(port) <= _PORT_MAX else "has an invalid port"


def _pattern(registered: str) -> re.Pattern[str]:
    return re.compile(_FREE_SEGMENT.join(re.escape(part) for part in registered.split(SEGMENT)))

"""Checks of the URLs that identify an issuer or a resource: they are compared byte for byte."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

_CHARACTERS: Final = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")


def https_fault(url: str) -> str | None:
    """What is wrong with the URL of an issuer, as a predicate, or None."""
    if _CHARACTERS.fullmatch(url) is None:
        return "contains a space or another character that is invalid in a URL"
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        return "is not a URL"
    if not parts.hostname or not has_port or parts.scheme not in ("https", "http"):
        return "must be 'https://host[:port][/path]'"
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        return "must be https; http is for 127.0.0.1, [::1] and localhost only"
    if "?" in url or "#" in url or "@" in parts.netloc:
        return "must have no query, no fragment and no user"
    return None


def identifier_fault(url: str) -> str | None:
    """What is wrong with the issuer or a resource of this server, as a predicate, or None."""
    fault = https_fault(url)
    if fault is not None:
        return fault
    if url.endswith("/"):
        return "must not end with '/'"
    parts = urlsplit(url)
    if not url.startswith(f"{parts.scheme}://{parts.netloc.lower()}"):
        return "must have its scheme and host in lower case, as clients write them"
    if any(segment in (".", "..") for segment in parts.path.split("/")) or "//" in parts.path:
        return "must have no empty or dot segments in its path"
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

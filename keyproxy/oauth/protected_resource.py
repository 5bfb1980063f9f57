"""The metadata of the protected resource, by which clients find the authorization server. RFC 9728.

The proxy and the authorization server publish the same documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

WELL_KNOWN: Final = "/.well-known/oauth-protected-resource"

#: A scope of authorization servers, which grants nothing at the resource.
_OFFLINE_ACCESS: Final = "offline_access"


def document(resource: str, issuer: str, scopes: Sequence[str]) -> bytes:
    """The metadata of one resource, as JSON. `scopes`: that may be requested for it."""
    content: dict[str, object] = {"resource": resource, "authorization_servers": [issuer]}
    if offered := resource_scopes(scopes):
        # Empty lists must be left out. RFC 9728 section 3.2.
        content["scopes_supported"] = offered
    content["bearer_methods_supported"] = ["header"]
    return json.dumps(content, separators=(",", ":")).encode("utf-8")


def resource_scopes(scopes: Sequence[str]) -> list[str]:
    """Those of the scopes that a resource names to clients."""
    return [scope for scope in scopes if scope != _OFFLINE_ACCESS]


def paths(resource: str) -> tuple[str, ...]:
    """The paths of the metadata of a resource: that by which clients find it, then the bare one if it differs."""
    return tuple(dict.fromkeys((WELL_KNOWN + urlsplit(resource).path.rstrip("/"), WELL_KNOWN)))


def metadata_url(resource: str) -> str:
    """Where clients find the metadata of a resource. RFC 9728 section 3.1."""
    parts = urlsplit(resource)
    return f"{parts.scheme}://{parts.netloc}{paths(resource)[0]}"

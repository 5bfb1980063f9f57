"""The metadata of protected resources."""

from __future__ import annotations

import json

import pytest

from keyproxy.oauth import protected_resource

ORIGIN = "https://mcp.example.com"
BARE = "/.well-known/oauth-protected-resource"


@pytest.mark.parametrize(
    ("resource", "paths", "url"),
    [
        (ORIGIN, (BARE,), ORIGIN + BARE),
        (f"{ORIGIN}/mcp", (f"{BARE}/mcp", BARE), f"{ORIGIN}{BARE}/mcp"),
        (f"{ORIGIN}:8443/a/b", (f"{BARE}/a/b", BARE), f"{ORIGIN}:8443{BARE}/a/b"),
        ("http://127.0.0.1:8080/mcp", (f"{BARE}/mcp", BARE), f"http://127.0.0.1:8080{BARE}/mcp"),
    ],
)
def test_metadata_stand_between_the_host_and_the_path_of_the_resource(
    resource: str, paths: tuple[str, ...], url: str
) -> None:
    assert protected_resource.paths(resource) == paths
    assert protected_resource.metadata_url(resource) == url


@pytest.mark.parametrize(
    ("scopes", "supported"),
    [
        (["jobs:write", "jobs:read"], ["jobs:write", "jobs:read"]),
        (["offline_access", "jobs:write"], ["jobs:write"]),
        (["offline_access"], None),
        ([], None),
    ],
)
def test_metadata_name_the_issuer_and_the_scopes_but_never_offline_access(
    scopes: list[str], supported: list[str] | None
) -> None:
    content = json.loads(protected_resource.document(f"{ORIGIN}/mcp", ORIGIN, scopes))
    assert content.get("scopes_supported") == supported
    assert content["resource"] == f"{ORIGIN}/mcp"
    assert content["authorization_servers"] == [ORIGIN]
    assert content["bearer_methods_supported"] == ["header"]
    assert None not in content.values()

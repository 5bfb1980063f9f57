"""The row of ASGI: its packages, and the proxy that its tests use."""

from __future__ import annotations

import httpx

from deployment import Deployment


def test_request_with_a_service_key_reaches_the_upstream_as_the_named_user(deployment: Deployment) -> None:
    secret = deployment.service_key_file("acme").read_text(encoding="ascii").strip()
    headers = {"Authorization": f"Api-Key {secret}"}
    seen = httpx.post(f"{deployment.origin}/v1/ai/jobs", headers=headers, content=b"{}").json()
    assert (seen["method"], seen["target"], seen["body"]) == ("POST", "/v1/ai/jobs", "{}")
    assert ["X-Keyproxy-User", "u_service_acme"] in seen["headers"]

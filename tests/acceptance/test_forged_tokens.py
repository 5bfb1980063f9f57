"""Agent tokens over real processes: a forged one costs no query, and a token outlives the proxy that minted it."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from typing import Any

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from tests.acceptance.conftest import Configure, Site, until
from tests.acceptance.fleet import beside

ROUTES = [
    {"match": "POST /v1/agent-tokens", "scopes": ["agents:mint"], "serves": "agent-tokens"},
    {"match": "POST /v1/ai/jobs"},
]

#: Enough for another proxy to start and accept a token.
TTL_SECONDS = 12


async def mint(site: Site, secret: str, **changed: object) -> dict[str, Any]:
    """The response of a mint that must succeed."""
    body = {"agent": "crawler", "scopes": ["data:read"], **changed}
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{site.proxy_port}/v1/agent-tokens"
        async with session.post(url, json=body, headers={"X-Api-Key": secret}) as response:
            content: dict[str, Any] = await response.json(content_type=None)
            assert response.status == 201, content
            return content


def part(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).decode().rstrip("=")


async def test_a_forged_agent_token_is_refused_without_a_query(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES, access={"assertion": True})
    key = await site.key(scopes=["agents:mint", "data:read"])
    async with site.serving():
        token = (await mint(site, key["secret"]))["token"]
        assert await site.call(token) == (200, "")
        assertion = site.upstream.requests[-1].one("X-Keyproxy-Assertion")
        header, claims, _ = token.split(".")
        kid = jwt.get_unverified_header(token)["kid"]
        (jwk,) = json.loads((await site.ops("/jwks.json"))[1])["keys"]
        payload = jwt.decode(token, options={"verify_signature": False})
        mine = ec.generate_private_key(ec.SECP256R1())
        headers = {"typ": "at+jwt", "alg": "ES256", "kid": kid}

        def signed(**changed: object) -> str:
            return jwt.encode(payload, mine, "ES256", headers={**headers, **changed}, sort_headers=False)

        secret = json.dumps(jwk).encode()
        hs256 = part({**headers, "alg": "HS256"}) + "." + claims
        mac = base64.urlsafe_b64encode(hmac.digest(secret, hs256.encode(), "sha256")).decode().rstrip("=")
        forged = [
            part({**headers, "alg": "none"}) + "." + claims + ".",
            part({**headers, "alg": "none"}) + "." + claims + ".AAAA",
            f"{hs256}.{mac}",
            signed(),
            signed(jku="http://127.0.0.1:1/jwks.json"),
            signed(jwk={"kty": "EC"}),
            signed(crit=["exp"]),
            f"{header}.{part({**payload, 'scope': 'admin'})}.{token.rpartition('.')[2]}",
            assertion,
        ]
        before = await site.metric("keyproxy_identity_lookups_total", result="miss")
        rejected = await site.metric("keyproxy_agent_tokens_rejected_offline_total")
        for content in forged:
            assert content is not None
            assert await site.call(content) == (401, "api_key_invalid"), content
        # An unknown key makes the proxy read the keys once, and look up no identity either.
        other = jwt.encode(payload, mine, "ES256", headers={**headers, "kid": "A" * 43}, sort_headers=False)
        assert await site.call(other) == (401, "api_key_invalid")
        assert await site.metric("keyproxy_identity_lookups_total", result="miss") == before
        assert await site.metric("keyproxy_agent_tokens_rejected_offline_total") > rejected
    logged = b"".join(site.printed)
    for content in (token, *forged):
        assert content is not None
        assert content.rpartition(".")[2].encode() not in logged or len(content.rpartition(".")[2]) < 10


async def test_a_token_outlives_the_proxy_that_minted_it_and_not_its_own_expiry(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=ROUTES)
    key = await site.key(scopes=["agents:mint", "data:read"])
    other = beside(site, dsn)
    async with site.serving():
        minted = await mint(site, key["secret"], ttl_seconds=TTL_SECONDS)
        token, began = minted["token"], time.monotonic()
    async with other.serving():
        assert await other.call(token) == (200, "")
        keys = json.loads((await other.ops("/jwks.json"))[1])["keys"]
        assert jwt.get_unverified_header(token)["kid"] in {one["kid"] for one in keys}

        async def is_expired() -> bool:
            return await other.call(token) == (401, "api_key_expired")

        await asyncio.sleep(max(0.0, began + TTL_SECONDS - 2 - time.monotonic()))
        await until(is_expired, seconds=20)
        assert time.monotonic() - began >= TTL_SECONDS - 1

        async def is_gone() -> bool:
            keys = json.loads((await other.ops("/jwks.json"))[1])["keys"]
            return jwt.get_unverified_header(token)["kid"] not in {one["kid"] for one in keys}

        await until(is_gone, seconds=5)

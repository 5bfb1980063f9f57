"""Delegated requests as operators see them: the access log, usage, its exports, and the metrics of all workers."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from typing import Any

import aiohttp

from tests.acceptance.conftest import Configure, Site, administering
from tests.rawhttp import free_port

ROUTES = [
    {"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]},
    {"match": "POST /v1/agent-tokens", "scopes": ["agents:mint"], "serves": "agent-tokens"},
]
COLUMNS = ("actor_user_id", "agent_id", "agent_token_id")


async def post(
    site: Site, credential: str, *, act_for: str = "", path: str = "/v1/ai/jobs", **body: object
) -> tuple[int, dict[str, Any]]:
    """(status, content) of one call."""
    headers = {"Authorization": credential} | ({"X-Keyproxy-Act-For": act_for} if act_for else {})
    url = f"http://127.0.0.1:{site.proxy_port}{path}"
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        return response.status, await response.json(content_type=None)


async def test_delegated_requests_are_attributed_in_the_log_in_usage_and_in_the_metrics(
    configure: Configure, dsn: str
) -> None:
    admin_port = free_port()
    site = configure(dsn, routes=ROUTES, listen={"workers": 2}, ops={}, admin={"address": f"127.0.0.1:{admin_port}"})
    for user in ("u_worker", "u_alice"):
        await site.key(user)
    key = await site.run_json(
        "key", "issue", "--user", "u_worker", "--acts-for", "tenant", "--scope", "jobs:write", "--scope", "agents:mint"
    )
    secret = f"Api-Key {key['secret']}"
    async with site.serving() as process:
        await site.until_ready(process)
        _, page = await site.ops("/metrics")
        for series in (
            'acting_requests_total{mode="live"}', 'acting_requests_total{mode="test"}', "acting_entries",
            'delegation_refusals_total{kind="acting"}', 'delegation_refusals_total{kind="mint"}',
            'agent_tokens_minted_total{via="route"}',
        ):  # fmt: skip
            assert f"keyproxy_{series} 0.0" in page
        assert (await post(site, secret))[0] == 200
        assert (await post(site, secret, act_for="u_alice"))[0] == 200
        assert (await post(site, secret, act_for="u_nobody"))[0] == 403
        minting = {"path": "/v1/agent-tokens", "act_for": "u_alice"}
        assert (await post(site, secret, **minting, agent="crawler", scopes=["data:delete"]))[0] == 403
        status, token = await post(site, secret, **minting, agent="crawler", scopes=["jobs:write"])
        assert status == 201
        bearer = f"Bearer {token['token']}"
        assert (await post(site, bearer))[0] == 200
        assert (await post(site, bearer, path="/v1/agent-tokens", agent="x", scopes=["jobs:write"]))[0] == 403
        counts = {
            "acting": await site.metric("keyproxy_acting_requests_total", mode="live"),
            "refused": await site.metric("keyproxy_delegation_refusals_total", kind="acting"),
            "refused_mints": await site.metric("keyproxy_delegation_refusals_total", kind="mint"),
            "minted": await site.metric("keyproxy_agent_tokens_minted_total", via="route"),
            "is_cached": await site.metric("keyproxy_acting_entries") > 0,
        }
        # The third kind of refusal lacks the scope, so it was not admitted to mint.
        assert counts == {"acting": 3, "refused": 1, "refused_mints": 1, "minted": 1, "is_cached": True}
    own, acting = ["u_worker", None, None, None], ["u_alice", "u_worker", None, None]
    by_token = ["u_alice", "u_worker", "crawler", token["id"]]
    expected = [(200, own), (200, acting), (403, own), (403, acting), (201, acting), (200, by_token), (403, by_token)]
    lines = [line for line in site.log() if line["key_id"] == key["id"]]
    fields = ("status", "user", "actor", "agent", "token_id")
    wanted = Counter((status, *names) for status, names in expected)
    assert Counter(tuple(line[name] for name in fields) for line in lines) == wanted
    assert not any(part.encode() in b"".join(site.printed) for part in token["token"].split(".")[1:])
    rows = await _exported(site, key["id"])
    assert Counter((row["status"], row["user"], *(row[name] for name in COLUMNS)) for row in rows) == wanted
    await _exported_alike(site, key["id"], rows, admin_port)
    await site.run_json("user", "delete", "u_alice", "--yes")
    assert await _exported(site, key["id"]) == rows


async def _exported(site: Site, key_id: str) -> list[dict[str, Any]]:
    """The events of a key, which agree with its daily sums."""
    done = await site.run("usage", "export", "--events", "--key", key_id)
    rows = [json.loads(line) for line in done.out.splitlines()]
    sums = await site.run_json("usage", "show", "--key", key_id, "--by", "user", "--by", "key")
    assert {row["key"] for row in sums} == {key_id}
    assert {row["user"]: row["requests"] + row["refusals"] for row in sums} == Counter(row["user"] for row in rows)
    return rows


async def _exported_alike(site: Site, key_id: str, rows: list[dict[str, Any]], admin_port: int) -> None:
    """CSV and the admin API have the same events."""
    export = ("usage", "export", "--events", "--key", key_id)
    table = csv.DictReader(io.StringIO((await site.run(*export, "--format", "csv")).out))
    names = ("id", "user", *COLUMNS)
    assert [[row[name] or None for name in names] for row in table] == [[row[name] for name in names] for row in rows]
    token = await site.run_json("admin", "token", "create", "--name", "reader", "--scope", "usage:read")
    site.environment["KEYPROXY_ADMIN_TOKEN"] = token["secret"]
    async with administering(site, admin_port):
        remote = await site.run(*export, "--admin-url", f"http://127.0.0.1:{admin_port}")
    assert [json.loads(line) for line in remote.out.splitlines()] == rows, remote.err

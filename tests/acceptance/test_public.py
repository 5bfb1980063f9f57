"""Public routes, as clients, operators and the database see them."""

from __future__ import annotations

import json

import asyncpg

from tests.acceptance.conftest import Configure, Site, until
from tests.rawhttp import free_port

ROUTES = [
    {"match": "GET /healthz", "access": "public", "name": "health"},
    {"match": "OPTIONS /{rest...}", "access": "public"},
    {"match": "POST /v1/ai/jobs"},
]


async def statuses(site: Site, *requests: tuple[str, str]) -> list[int]:
    """The status of each request, given as method and path, and a header line."""
    found = []
    async with site.client() as client:
        for start, line in requests:
            await client.send(f"{start} HTTP/1.1\r\nHost: h\r\n{line}\r\n\r\n".encode())
            found.append((await client.answer(method=start.partition(" ")[0])).status)
    return found


async def test_a_public_route_is_served_while_the_store_is_down_from_the_start(configure: Configure) -> None:
    site = configure(f"postgresql://keyproxy@127.0.0.1:{free_port()}/keyproxy", routes=ROUTES)
    async with site.serving():
        key = f"Authorization: Bearer kp_live_{'0' * 49}"
        requests = [("GET /healthz", "A: b"), ("GET /healthz", key), ("OPTIONS /v1/ai/jobs", "A: b")]
        assert await statuses(site, *requests) == [200, 200, 200]
        assert (await site.ops("/readyz"))[0] == 503
    assert [seen.one("X-Keyproxy-User") for seen in site.upstream.requests] == [None] * 3


async def test_a_public_request_is_counted_and_logged_without_an_identity_and_leaves_no_usage(
    configure: Configure, dsn: str
) -> None:
    site = configure(dsn, routes=ROUTES)
    secret = (await site.key())["secret"]
    async with site.serving() as process:
        await site.until_ready(process)
        key = f"Authorization: Api-Key {secret}"
        requests = [("GET /healthz", key), ("POST /v1/ai/jobs", key), ("POST /v1/ai/jobs", "A: b"), ("GET /x", key)]
        assert await statuses(site, *requests) == [200, 200, 401, 403]
        labels = {"route": "health", "mode": "none", "status": "200", "code": "ok"}
        assert await site.metric("keyproxy_requests_total", **labels) == 1
        assert await site.metric("keyproxy_request_seconds_count", route="health", mode="none") == 1

        async def is_written() -> bool:
            return not await site.metric("keyproxy_usage_events_pending")

        await until(is_written)
    public, keyed, stranger, elsewhere = site.log()
    assert [line["access"] for line in (public, keyed, stranger, elsewhere)] == ["public", "key", None, None]
    assert [public[name] for name in ("route", "mode", "tenant", "user", "key_id")] == [
        "health",
        "none",
        None,
        None,
        None,
    ]
    assert secret not in json.dumps(site.log())
    connection = await asyncpg.connect(dsn)
    try:
        events = await connection.fetch("SELECT route FROM keyproxy.usage_events")
        sums = await connection.fetch(
            "SELECT route, sum(requests) AS n FROM keyproxy.usage GROUP BY route ORDER BY route"
        )
    finally:
        await connection.close()
    assert sorted(event["route"] for event in events) == ["POST /v1/ai/jobs", "none"]
    assert {row["route"]: row["n"] for row in sums} == {"POST /v1/ai/jobs": 1, "none": 0}

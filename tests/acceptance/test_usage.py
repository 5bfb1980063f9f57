"""Usage as operators see it: counts match requests, a killed proxy loses only moments, refusals are explained."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import shutil
from typing import Any

import pytest

from tests.acceptance.conftest import Configure, Site, until


async def counted(site: Site, *arguments: str) -> dict[str, int]:
    """Totals over all rows of `usage show`."""
    rows = await site.run_json("usage", "show", *arguments)
    return {name: sum(row[name] for row in rows) for name in ("requests", "refusals")}


async def test_usage_equals_the_requests_sent_and_each_is_exported_once(site: Site) -> None:
    key, test = await site.key(), await site.key(is_test=True)
    async with site.serving():
        assert [await site.call(key["secret"]) for _ in range(3)] == [(200, "")] * 3
        assert await site.call(test["secret"]) == (200, "")
        await site.run_json("key", "revoke", test["id"])

        async def is_refused() -> bool:
            return (await site.call(test["secret"]))[0] == 401

        await until(is_refused, seconds=5)
        assert (await site.call("kp_live_nobody"))[0] == 401
    # The proxy writes its remaining usage when it exits.
    reached = len(site.upstream.requests)
    rows = await site.run_json("usage", "show", "--user", "u_42", "--by", "mode")
    assert {row["mode"]: row["requests"] for row in rows} == {"live": 3, "test": reached - 3}
    assert sum(row["refusals"] for row in rows) == 1
    assert await counted(site, "--tenant", "acme") == {"requests": reached, "refusals": 1}
    assert await counted(site, "--key", key["id"]) == {"requests": 3, "refusals": 0}
    assert await counted(site, "--user", "somebody") == {"requests": 0, "refusals": 0}
    await _exported(site, key["id"], requests=reached + 1)


async def _exported(site: Site, key_id: str, *, requests: int) -> None:
    exported = [json.loads(line) for line in (await site.run("usage", "export", "--events")).out.splitlines()]
    assert len({event["id"] for event in exported}) == len(exported) == requests
    assert {event["request_id"] for event in exported} <= {line["request_id"] for line in site.log()}
    table = list(csv.DictReader(io.StringIO((await site.run("usage", "export", "--format", "csv")).out)))
    assert sum(int(row["requests"]) + int(row["refusals"]) for row in table) == requests
    rest = await site.run("usage", "export", "--format", "cloudevents", "--after", exported[1]["id"], "--key", key_id)
    events: list[dict[str, Any]] = [json.loads(line) for line in rest.out.splitlines()]
    assert [event["id"] for event in events] == [exported[2]["id"]]
    assert events[0]["specversion"] == "1.0"
    assert events[0]["data"]["status"] == 200
    lost = await site.run("usage", "export", "--events", "--after", "nothing")
    assert (lost.status, lost.out) == (1, "")


async def test_a_killed_proxy_loses_only_unwritten_usage_and_none_of_the_spend(configure: Configure, dsn: str) -> None:
    site = configure(dsn, ledger={"lease_seconds": 1.0, "settle_seconds": 0.1})
    key = await site.key()
    await site.run_json("plan", "set", "daily", "--requests-per-day", "1000")
    await site.run_json("user", "set-plan", "u_42", "daily")
    async with site.serving() as process:

        async def counts_requests() -> bool:
            await site.call(key["secret"])
            return bool(await site.metric("keyproxy_ledger_round_trip_seconds_count"))

        await until(counts_requests, seconds=10)
        sent = len(site.upstream.requests)

        async def is_written() -> bool:
            return (await counted(site))["requests"] >= sent

        await until(is_written, seconds=20)
        for _ in range(5):
            assert (await site.call(key["secret"]))[0] == 200
        process.kill()
        await process.wait()
    reached = len(site.upstream.requests)
    assert reached - 5 <= (await counted(site))["requests"] <= reached
    (window,) = await site.run_json("usage", "windows", "--user", "u_42")
    assert (window["policy"], window["limit"]) == ("user.requests_per_day", 1000)
    assert window["spent"] + window["held"] >= reached


async def test_an_exhausted_quota_is_explained_as_it_is_refused(configure: Configure, dsn: str) -> None:
    site = configure(dsn, routes=[{"match": "POST /v1/ai/jobs"}])
    key = await site.key()
    await site.run_json("plan", "set", "two", "--requests-per-day", "2", "--rate", "100/s")
    await site.run_json("user", "set-plan", "u_42", "two")
    question = ("key", "explain", key["id"], "--method", "POST", "--path", "/v1/ai/jobs")
    before = await site.run_json(*question)
    assert (before["allowed"], before["code"]) == (True, None)
    async with site.serving():
        assert [(await site.call(key["secret"]))[1] for _ in range(3)] == ["", "", "quota_exhausted"]
        after = await site.run_json(*question)
    assert after == after | {
        "allowed": False,
        "code": "quota_exhausted",
        "status": 429,
        "policy": "user.requests_per_day",
        "user": "u_42",
        "tenant": "acme",
        "mode": "live",
        "route": "POST /v1/ai/jobs",
    }
    limits = {limit["policy"]: limit for limit in after["limits"]}
    assert set(limits) == {"user.requests_per_day", "user.rate"}
    assert limits["user.requests_per_day"] == limits["user.requests_per_day"] | {
        "limit": 2,
        "remaining": 0,
        "refuses": True,
    }
    assert not limits["user.rate"]["refuses"]
    other = await site.run_json("key", "explain", key["id"], "--method", "GET", "--path", "/")
    assert (other["allowed"], other["code"], other["status"]) == (False, "route_not_allowed", 403)
    assert (await site.run("key", "explain", "key_of_nobody", "--path", "/")).status == 1
    assert len(site.upstream.requests) == 2


async def test_limits_the_ledger_and_usage_are_in_the_metrics_and_the_page_is_well_formed(
    configure: Configure, dsn: str
) -> None:
    site = configure(dsn)
    key = await site.key()
    await site.run_json("plan", "set", "two", "--requests-per-day", "2")
    await site.run_json("user", "set-plan", "u_42", "two")
    async with site.serving():
        assert [(await site.call(key["secret"]))[1] for _ in range(4)] == ["", "", *["quota_exhausted"] * 2]
        assert await site.metric("keyproxy_limit_refusals_total", policy="user.requests_per_day") == 2
        assert await site.metric("keyproxy_ledger_admissions_total") == 2
        assert 1 <= await site.metric("keyproxy_ledger_waits_total") <= 4
        assert await site.metric("keyproxy_ledger_round_trip_seconds_count") >= 1
        _, page = await site.ops("/readyz")
        assert json.loads(page)["checks"]["ledger"] == {"status": "ok"}

        async def is_written() -> bool:
            pending = await site.metric("keyproxy_usage_events_pending")
            return not pending and await site.metric("keyproxy_usage_events_total") == 4

        await until(is_written, seconds=5)
        _, page = await site.ops("/metrics")
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    process = await asyncio.create_subprocess_exec(
        promtool,
        "check",
        "metrics",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(page.encode())
    assert (process.returncode, output.decode()) == (0, "")

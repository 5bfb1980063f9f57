"""Usage, limits and decisions through the API."""

from __future__ import annotations

import json

import pytest

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.config.schema import Usage
from keyproxy.platform import clock
from keyproxy.store.usage.journal import UsageJournal
from tests import fakes
from tests.admin.conftest import Api
from tests.store.usage.test_journal import ended, rows


@pytest.fixture
async def used(api: Api) -> Api:
    """An API with today's usage of two users of two tenants: one request each, of 11 tokens."""
    journal = UsageJournal(api.database, Usage(), clock.now, settle_seconds=0.5)
    people = [fakes.identity("ann", "acme"), fakes.identity("bob", "other")]
    journal.take(rows(*(ended(who, use=TokenUse(10, 1)) for who in people)))
    await journal.flush()
    return api


async def test_usage_is_grouped_by_the_requested_dimensions(used: Api) -> None:
    result = await used.done("GET", "/v1/usage?by=tenant,user")
    assert result == {
        "is_complete": True, "money_unit": "USD",
        "items": [
            {"tenant": tenant, "user": user, "requests": 1, "refusals": 0, "tokens_in": 10, "tokens_out": 1,
             "tokens_estimated": 0, "tokens_cached": 0, "tokens_cache_write": 0, "tokens_reasoning": 0, "cost_micros": 0}
            for tenant, user in (("acme", "ann"), ("other", "bob"))
        ],
    }  # fmt: skip
    assert (await used.done("GET", "/v1/usage?limit=1"))["is_complete"] is False
    assert (await used.done("GET", "/v1/usage?until=2020-01-01T00:00:00Z"))["items"] == []
    assert (await used.call("GET", "/v1/usage?by=weather")).json["errors"][0]["field"] == "query.by"


async def test_totals_are_exported_completely(used: Api) -> None:
    lines = (await used.call("GET", "/v1/usage/export")).body.splitlines()
    result = [json.loads(line) for line in lines]
    assert [(row["tenant"], row["user"], row["requests"]) for row in result] == [
        ("acme", "ann", 1),
        ("other", "bob", 1),
    ]
    assert set(result[0]) >= {"day", "key", "mode", "route"}
    assert (await used.call("GET", "/v1/usage/export?until=2020-01-01T00:00:00Z")).body == b""


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/usage/export", "/v1/usage/events"])
@pytest.mark.parametrize("query", ["since=0001-01-01T00:00:00Z", "until=9999-12-31T23:59:59Z"])
async def test_the_first_and_the_last_day_of_the_calendar_are_days(used: Api, path: str, query: str) -> None:
    reply = await used.call("GET", f"{path}?{query}")
    assert reply.status == 200
    assert b"ann" in reply.body


async def test_events_are_exported_and_go_on_after_the_last(used: Api) -> None:
    lines = (await used.call("GET", "/v1/usage/events")).body.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["user"] for event in events] == ["ann", "bob"]
    assert {event[name] for event in events for name in ("actor_user_id", "agent_id", "agent_token_id")} == {None}
    rest = await used.call("GET", f"/v1/usage/events?after={events[0]['id']}")
    assert rest.json["user"] == "bob"
    assert (await used.call("GET", "/v1/usage/events?after=0123456789abcdef:1:1")).code == "invalid"


async def test_a_bound_token_reads_its_tenants_usage_alone(used: Api) -> None:
    await used.user("ann", "acme")
    other = await used.user("bob", "other")
    bound = await used.token("usage:read", tenant="acme")
    assert {row["user"] for row in (await used.done("GET", "/v1/usage", token=bound))["items"]} == {"ann"}
    for query in ("tenant=other", "user=bob"):
        assert (await used.done("GET", f"/v1/usage?{query}", token=bound))["items"] == []
        for path in ("events", "export"):
            assert (await used.call("GET", f"/v1/usage/{path}?{query}", token=bound)).body == b""
    for path in ("events", "export"):
        result = (await used.call("GET", f"/v1/usage/{path}", token=bound)).body
        assert b"ann" in result
        assert b"bob" not in result
    for path in ("/v1/users/bob/limits", f"/v1/keys/{other['key']['id']}/explain?path=/"):
        assert (await used.call("GET", path, token=bound)).code == "not_found"


async def test_limits_and_explanations_charge_nothing(api: Api) -> None:
    key = (await api.user())["key"]["id"]
    await api.done("PUT", "/v1/plans/none", {"limits": {"requests_per_day": 0, "rate": 5}})
    allowed = await api.done("GET", f"/v1/keys/{key}/explain?path=/v1/ai/jobs")
    assert (allowed["allowed"], allowed["user"], allowed["limits"]) == (True, "u_1", [])
    await api.done("PATCH", "/v1/users/u_1", {"plan": "none"})
    refused = await api.done("GET", f"/v1/keys/{key}/explain?path=/v1/ai/jobs")
    assert (refused["allowed"], refused["code"], refused["status"]) == (False, "quota_exhausted", 429)
    limits = (await api.done("GET", "/v1/users/u_1/limits"))["items"]
    assert {limit["policy"]: limit["remaining"] for limit in limits} == {"user.rate": 5, "user.requests_per_day": 0}

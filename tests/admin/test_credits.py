"""Credits: the limit of one window changes, with a reason, by an unbound actor alone."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.database import Database
from tests.admin.conftest import Api

DAILY = [{"measure": "tokens", "per": "day", "amount": 100}]
MIXED = [
    *DAILY,
    {"measure": "spend", "per": "month", "amount": 5_000_000, "model": "gpt-4o"},
    {"measure": "requests", "per": "day", "amount": 10, "mode": "live"},
    {"measure": "request-rate", "per": "second", "amount": 5},
]


@pytest.fixture
async def limited(api: Api) -> Api:
    """An API with a user and a tenant under a plan."""
    await api.user()
    await api.done("PUT", "/v1/plans/p", {"limits": MIXED})
    await api.done("PATCH", "/v1/users/u_1", {"plan": "p"})
    await api.done("PATCH", "/v1/tenants/acme", {"plan": "p"})
    return api


def credit(**fields: Any) -> dict[str, Any]:
    """The body of a credit."""
    return {"user": "u_1", "limit": "tokens/day", "amount": 50, "reason": "ticket 811"} | fields


async def windows(api: Api, *, test: bool = False) -> dict[str, dict[str, Any]]:
    """The state of the user's limits by policy."""
    items = (await api.done("GET", f"/v1/users/u_1/limits?is_test={str(test).lower()}"))["items"]
    return {one["policy"]: one for one in items}


async def granted(database: Database, window: Window, units: int, *, limit: int = 100) -> int:
    """How many of the units the ledger grants."""
    ledger = PostgresLedger(database, lease_seconds=60.0)
    line = LeaseReport(1, window, 0, limit, 0.0, 0, 0, 0, units, 1, units, is_closing=False)
    (reply,) = await ledger.sync(f"h{units}", 1, [line]) or []
    return reply.granted


async def test_a_credit_raises_the_limit_of_the_current_window_and_is_logged(limited: Api, database: Database) -> None:
    reply = await limited.call("POST", "/v1/usage/credits", credit())
    made = reply.json
    assert (reply.status, made["id"][:4]) == (201, "crd_")
    today = f"{datetime.now(UTC):%Y-%m-%dT00:00:00Z}"
    assert {name: value for name, value in made.items() if name not in ("id", "window_ends")} == {
        "pool_kind": "user", "pool_id": "u_1", "tenant": "acme", "mode": "live", "limit": "tokens/day", "amount": 50,
        "reason": "ticket 811", "credited": 50, "total": 150, "spent": 0, "held": 0, "window_starts": today,
    }  # fmt: skip
    assert (await limited.done("POST", "/v1/usage/credits", credit(amount=-20)))["credited"] == 30
    state = (await windows(limited))["user.tokens_per_day"]
    assert (state["limit"], state["credited"], state["remaining"]) == (100, 30, 130)
    assert await granted(database, Window(Pool("user", "u_1", False), "tokens_per_day"), 1000) == 130
    rows = await limited.audit(entity="window", action="window.credit")
    assert [(row["actor"], row["entity_id"], row["tenant"], row["after"]["amount"]) for row in rows] == [
        ("token:file", "user u_1", "acme", -20),
        ("token:file", "user u_1", "acme", 50),
    ]
    assert (rows[1]["after"]["reason"], rows[1]["before"], rows[1]["after"]["id"]) == (
        "ticket 811", {"credited": 0}, made["id"],
    )  # fmt: skip


async def test_selectors_owners_and_modes_have_windows_of_their_own(limited: Api) -> None:
    money = "spend/month@model:gpt-4o"
    await limited.done("POST", "/v1/usage/credits", credit(limit=money, amount=1))
    await limited.done("POST", "/v1/usage/credits", credit(is_test=True, amount=7))
    body = credit(amount=9)
    del body["user"]
    await limited.done("POST", "/v1/usage/credits", {**body, "tenant": "acme"})
    live, test = await windows(limited), await windows(limited, test=True)
    assert {name: one["credited"] for name, one in live.items() if one.get("credited")} == {
        "user.spend_per_month@model:gpt-4o": 1, "tenant.tokens_per_day": 9,
    }  # fmt: skip
    assert live["user.spend_per_month@model:gpt-4o"]["selector"] == "model:gpt-4o"
    assert {name: one["credited"] for name, one in test.items() if one.get("credited")} == {"user.tokens_per_day": 7}
    assert "user.requests_per_day@mode:live" in live
    assert "user.requests_per_day@mode:live" not in test


async def test_keys_that_replace_each_other_share_a_credited_window(limited: Api) -> None:
    key = (await limited.directory.keys.list_by_id("", 10))[0]["id"]
    await limited.done("PATCH", f"/v1/keys/{key}", {"plan": "p"})
    new = (await limited.done("POST", f"/v1/keys/{key}/rotate", {}))["id"]
    body = {"limit": "tokens/day", "amount": 5, "reason": "r"}
    assert (await limited.done("POST", "/v1/usage/credits", {**body, "key": key}))["credited"] == 5
    made = await limited.done("POST", "/v1/usage/credits", {**body, "key": new})
    assert (made["pool_id"], made["credited"]) == (key, 10)
    refused = await limited.call("POST", "/v1/usage/credits", {**body, "key": new, "is_test": True})
    assert (refused.status, "is a live key" in refused.json["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("fields", "status", "detail"),
    [
        ({"amount": 0}, 422, "must not be 0"),
        ({"amount": 1.5}, 422, "integer"),
        ({"amount": 10**15}, 422, "less than or equal"),
        ({"amount": -101}, 422, "must stay from 0 to 10^15"),
        ({"reason": ""}, 422, "at least 1 character"),
        ({"user": "u_9"}, 404, "no user 'u_9'"),
        ({"tenant": "acme"}, 422, "exactly one of tenant, user and key"),
        (
            {"limit": "tokens/month"},
            422,
            "has no limit tokens/month for live traffic; its limits: requests/day@mode:live, tokens/day",
        ),
        ({"limit": "requests/day@mode:live", "is_test": True}, 422, "for test traffic"),
        ({"limit": "request-rate"}, 422, "equest-rate has no window to credit"),
        ({"limit": "tokens/request"}, 422, "okens/request has no window to credit"),
        ({"limit": "weather"}, 422, "there are requests, tokens"),
    ],
)
async def test_a_credit_that_cannot_be_made_changes_nothing(
    limited: Api, fields: dict[str, Any], status: int, detail: str
) -> None:
    reply = await limited.call("POST", "/v1/usage/credits", credit(**fields))
    text = reply.json["detail"] + str(reply.json.get("errors"))
    assert (reply.status, detail in text) == (status, True), text
    assert await limited.audit(entity="window") == []
    assert not any(one.get("credited") for one in (await windows(limited)).values())


async def test_a_repeated_request_credits_once_and_a_bound_token_never(limited: Api) -> None:
    for _ in range(2):
        headers = {"Idempotency-Key": "one"}
        assert (await limited.call("POST", "/v1/usage/credits", credit(), headers=headers)).json["credited"] == 50
    bound = await limited.token("admin:write", tenant="acme")
    assert (await limited.call("POST", "/v1/usage/credits", credit(), token=bound)).code == "tenant_bound"
    reader = await limited.token("usage:read")
    assert (await limited.call("POST", "/v1/usage/credits", credit(), token=reader)).code == "insufficient_scope"
    assert (await windows(limited))["user.tokens_per_day"]["credited"] == 50


async def test_limits_in_a_list_are_set_and_changed_by_entry(limited: Api) -> None:
    entry = {"measure": "tokens", "per": "week", "amount": 7, "model": "gpt-4o"}
    changed = await limited.done(
        "PATCH", "/v1/plans/p", {"limits": [entry, {"measure": "request-rate", "amount": None}]}
    )
    assert changed["changed"] == {
        "tokens_per_week@model:gpt-4o": {"old": None, "new": 7}, "rate": {"old": 5.0, "new": None},
    }  # fmt: skip
    assert changed["previous"] == (await limited.done("PUT", "/v1/plans/q", {"limits": MIXED}))["limits"]
    assert {one["measure"] for one in changed["limits"]} == {"tokens", "spend", "requests"}
    named = await limited.done("PATCH", "/v1/plans/p", {"limits": {"tokens_per_day": 5, "concurrency": 2}})
    assert named["changed"] == {"tokens_per_day": {"old": 100, "new": 5}, "concurrency": {"old": None, "new": 2}}
    for limits, field, detail in (
        ([{"measure": "tokens", "per": "day"}], "body.limits.0.amount", "required"),
        ([{**entry, "amont": 1}], "body.limits.0.amont", "did you mean amount?"),
        ([{**entry, "per": "year"}], "body.limits.0.per", "'week'"),
        ({"tokens_per_dy": 1}, "body.limits.tokens_per_dy", "did you mean tokens_per_day?"),
    ):
        reply = await limited.call("PUT", "/v1/plans/p", {"limits": limits})
        (error,) = reply.json["errors"]
        assert (error["field"], detail in error["detail"]) == (field, True), error
    warned = await limited.done("PUT", "/v1/plans/w", {"limits": {"tokens_per_request": 9, "tokens_per_day": 5}})
    assert warned["warnings"][0].startswith("tokens/request=9 exceeds tokens/day=5")

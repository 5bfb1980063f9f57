"""The explanation of a request matches the decision of a proxy, and charges nothing."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from keyproxy.ai.categories import Category
from keyproxy.ai.models import Model, price_of
from keyproxy.config import schema
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.budgets import budget_plan
from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.model import Identity, Moment
from keyproxy.platform import clock
from keyproxy.reasons import Reason
from keyproxy.store.directory.directory import NotFound
from keyproxy.store.directory.errors import Invalid
from keyproxy.store.ledger.explain import Explanation, Question, explain, explain_identity
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.explained_credentials import key_credential
from keyproxy.store.usage.user_windows import windows_of_user
from tests.store.agent_rows import AGENT_TOKEN, add_agent_token
from tests.store.harness import Sql, add_key, add_user

ROUTES = (RouteRow("POST /v1/ai/jobs", ["jobs:write"]), RouteRow("POST /v1/chat", tokens="openai"))
CONFIGURED = Settings(routes=ROUTES, ledger=schema.LedgerSettings(lease_seconds=60.0))
JOB = Question("POST", "/v1/ai/jobs")


async def give(sql: Sql, limits: str, *, to: str = "user") -> None:
    """The user u_42 with the key key_1, and a plan for one of them or the tenant."""
    if not await sql.fetchval("SELECT count(*) FROM keyproxy.users"):
        await add_user(sql)
        await add_key(sql)
    await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ($1, $2)", f"of_{to}", limits)
    table = {"key": "api_keys", "user": "users", "tenant": "tenants"}[to]
    await sql.execute(f"UPDATE keyproxy.{table} SET plan_id = $1", f"of_{to}")


async def use(database: Database, measure: str, *, spent: int = 0, held: int = 0, limit: int = 100) -> int:
    """Let another proxy use and hold units of the user's window. Return the number of its lease."""
    window = Window(Pool("user", "u_42", False), measure)
    ledger = PostgresLedger(database, lease_seconds=60.0)
    asked = LeaseReport(1, window, 0, limit, 0.0, 0, 0, 0, spent + held, spent + held, False, False)
    (reply,) = await ledger.sync("other", 1, [asked]) or []
    assert reply.granted == spent + held
    await ledger.sync("other", 2, [asked._replace(granted=reply.granted, used=spent, want=0, at_least=0)])
    return 1


async def explain_key(
    database: Database, key_id: str, question: Question, configured: Settings, *, now: Callable[[], Moment]
) -> tuple[Identity, Explanation]:
    """The identity of a key, and the decision on a request with it."""
    identity = (await key_credential(database, key_id, question.act_for, "X-Keyproxy-")).identity
    return identity, await explain_identity(database, identity, question, configured, now=now)


async def explained(database: Database, question: Question = JOB) -> Explanation:
    return (await explain_key(database, "key_1", question, CONFIGURED, now=clock.now))[1]


def about(told: Explanation, policy: str) -> dict[str, Any]:
    (found,) = [dict(limit) for limit in told.limits if limit["policy"] == policy]
    return found


def refusals(told: Explanation) -> set[str]:
    return {limit["policy"] for limit in told.limits if limit["refuses"]}


async def test_request_within_its_limits_is_allowed_and_every_limit_is_reported(database: Database, sql: Sql) -> None:
    await give(sql, '{"requests_per_day": 100, "rate": 5, "burst": 10, "concurrency": 3}')
    await give(sql, '{"tokens_per_month": 5000}', to="tenant")
    await use(database, "requests_per_day", spent=7, held=2)
    told = await explained(database)
    assert told.refusal is None
    assert told.route == "POST /v1/ai/jobs"
    assert {limit["policy"] for limit in told.limits} == {
        "user.requests_per_day", "user.rate", "user.concurrency", "tenant.tokens_per_month",
    }  # fmt: skip
    day = about(told, "user.requests_per_day")
    assert day == day | {"limit": 100, "spent": 7, "held": 2, "forfeited": 0, "remaining": 91, "refuses": False}
    until_midnight = 86_400 - datetime.now(UTC).timestamp() % 86_400
    assert math.isclose(day["reset_seconds"], until_midnight, abs_tol=30.0)
    assert about(told, "user.rate")["remaining"] == 10
    assert refusals(told) == set()


async def test_exhausted_window_refuses_and_is_named(database: Database, sql: Sql) -> None:
    await give(sql, '{"requests_per_day": 5, "concurrency": 3}')
    await use(database, "requests_per_day", spent=5, limit=5)
    told = await explained(database)
    assert told.refusal is not None
    assert told.refusal.reason.code == "quota_exhausted"
    assert told.refusal.limit is not None
    assert told.refusal.limit.policy.name == "user.requests_per_day"
    assert refusals(told) == {"user.requests_per_day"}


async def test_exhausted_rate_refuses_with_the_wait_that_the_ledger_reports(database: Database, sql: Sql) -> None:
    await give(sql, '{"rate": 0.01, "burst": 3}')
    window, ledger = Window(Pool("user", "u_42", False), "rate"), PostgresLedger(database, lease_seconds=60.0)
    asked = LeaseReport(1, window, 0, 3, 100.0, 0, 0, 0, 2, 2, False, False)
    assert await ledger.sync("other", 1, [asked])
    told = await explained(database)
    assert (told.refusal, about(told, "user.rate")["remaining"]) == (None, 1)
    await ledger.sync("other", 2, [asked._replace(want=1, at_least=1)])
    told = await explained(database)
    assert told.refusal is not None
    assert told.refusal.reason.code == "rate_limited"
    (reply,) = await ledger.sync("other", 3, [asked._replace(want=1, at_least=1)]) or []
    assert told.refusal.retry_after_seconds == pytest.approx(reply.wait_seconds, abs=5.0)
    assert refusals(told) == {"user.rate"}


async def test_units_of_other_proxies_are_waited_for_as_a_proxy_does(database: Database, sql: Sql) -> None:
    await give(sql, '{"requests_per_day": 5}')
    await use(database, "requests_per_day", spent=2, held=3, limit=5)
    told = await explained(database)
    assert told.refusal is not None
    asking = asyncio.create_task(explained(database))
    done, _ = await asyncio.wait([asking], timeout=0.2)
    assert not done
    window = Window(Pool("user", "u_42", False), "requests_per_day")
    back = LeaseReport(1, window, 0, 5, 0.0, 5, 2, 3, 0, 0, False, True)
    await PostgresLedger(database, lease_seconds=60.0).sync("other", 3, [back])
    assert (await asking).refusal is None


@pytest.mark.parametrize(
    ("tokens", "code", "refusing"),
    [
        (20, None, set[str]()),
        (21, "token_budget_exhausted", {"user.tokens_per_day"}),
        (51, "token_limit_per_request", {"user.tokens_per_day", "user.tokens_per_request"}),
    ],
)
async def test_tokens_are_checked_against_budgets(
    database: Database, sql: Sql, tokens: int, code: str | None, refusing: set[str]
) -> None:
    await give(sql, '{"tokens_per_day": 100, "tokens_per_request": 50}')
    await use(database, "tokens_per_day", spent=80)
    told = await explained(database, Question("POST", "/v1/chat", tokens))
    assert (None if told.refusal is None else told.refusal.reason.code) == code
    assert refusals(told) == refusing


@pytest.mark.parametrize(
    ("question", "change", "code"),
    [
        (Question("GET", "/v1/ai/jobs"), "SELECT 1", "route_not_allowed"),
        (Question("POST", "/v1/../ai"), "SELECT 1", "request_malformed"),
        (Question("POST", "no path"), "SELECT 1", "request_malformed"),
        (JOB, "UPDATE keyproxy.api_keys SET scopes = '{}'", "insufficient_scope"),
        (JOB, "UPDATE keyproxy.api_keys SET revoked_at = now()", "api_key_revoked"),
        (JOB, "UPDATE keyproxy.api_keys SET expires_at = now() - interval '1 s'", "api_key_expired"),
        (JOB, "UPDATE keyproxy.tenants SET disabled_at = now()", "account_disabled"),
        (Question("POST", "/v1/ai/jobs?next=1"), "SELECT 1", None),
    ],
)
async def test_admission_comes_before_limits_and_limits_are_still_reported(
    database: Database, sql: Sql, question: Question, change: str, code: str | None
) -> None:
    await give(sql, '{"requests_per_month": 9}')
    await sql.execute(change)
    told = await explained(database, question)
    assert (None if told.refusal is None else told.refusal.reason.code) == code
    assert [limit["policy"] for limit in told.limits] == ["user.requests_per_month"]


async def test_explaining_changes_nothing_in_the_ledger(database: Database, sql: Sql) -> None:
    await give(sql, '{"requests_per_day": 5, "rate": 1, "tokens_per_day": 10}')
    for _ in range(8):
        told = await explained(database, Question("POST", "/v1/chat", 5))
        assert told.refusal is None
    for table in ("windows", "leases", "lease_holders", "usage"):
        assert await sql.fetchval(f"SELECT count(*) FROM keyproxy.{table}") == 0


async def test_unknown_key_or_user_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound, match="there is no key 'key_1'"):
        await explained(database)
    with pytest.raises(NotFound, match="there is no user 'u_42'"):
        await windows_of_user(database, "u_42", CONFIGURED, is_test=False, now=clock.now)


async def test_windows_of_a_user_are_its_own_and_its_tenant_s_in_one_mode(database: Database, sql: Sql) -> None:
    await give(sql, '{"requests_per_day": 50}')
    await give(sql, '{"tokens_per_month": 70}', to="tenant")
    await use(database, "requests_per_day", spent=4, held=1, limit=50)
    live = await windows_of_user(database, "u_42", CONFIGURED, is_test=False, now=clock.now)
    test = await windows_of_user(database, "u_42", CONFIGURED, is_test=True, now=clock.now)
    assert [(row["owner"], row["policy"], row["spent"], row["held"], row["remaining"]) for row in live] == [
        ("acme", "tenant.tokens_per_month", 0, 0, 70),
        ("u_42", "user.requests_per_day", 4, 1, 45),
    ]
    assert [row["remaining"] for row in test] == [70, 50]


async def test_windows_of_a_user_are_those_of_its_agents_and_live_tokens_too(database: Database, sql: Sql) -> None:
    await give(sql, '{"requests_per_day": 50}')
    dead, revoked, boundless = (f"agt_{letter * 22}" for letter in "xyz")
    await add_agent_token(sql, token_budget=900, request_budget=10**15)
    await add_agent_token(sql, dead, token_budget=5, ends="interval '-1 s'")
    await add_agent_token(sql, revoked, token_budget=5)
    await add_agent_token(sql, boundless)
    await sql.execute("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = $1", revoked)
    await sql.execute("UPDATE keyproxy.agents SET plan_id = 'of_user'")
    ledger, budget = (
        PostgresLedger(database, lease_seconds=60.0),
        Window(Pool("token", AGENT_TOKEN, False), "tokens_total"),
    )
    asked = LeaseReport(1, budget, 0, 900, 0.0, 0, 0, 0, 100, 100, False, False)
    await ledger.sync("other", 1, [asked])
    await ledger.sync("other", 2, [asked._replace(granted=100, used=70, want=0, at_least=0)])
    live = await windows_of_user(database, "u_42", CONFIGURED, is_test=False, now=clock.now)
    assert [(row["owner"], row["policy"], row["remaining"]) for row in live] == [
        ("u_42", "user.requests_per_day", 50),
        ("u_42/crawler", "agent.requests_per_day", 50),
        (AGENT_TOKEN, "token.requests_total", 10**15 - 1),
        (AGENT_TOKEN, "token.tokens_total", 800),
    ]
    assert live[-1] == live[-1] | {"limit": 900, "spent": 70, "held": 30, "credited": 0, "reset_seconds": None}
    # Of the key's mode alone; an agent has one plan for both.
    test = await windows_of_user(database, "u_42", CONFIGURED, is_test=True, now=clock.now)
    assert [row["owner"] for row in test] == ["u_42", "u_42/crawler"]


@pytest.mark.parametrize(
    ("spent", "tokens", "code"), [(0, 10, None), (4, 7, "token_budget_exhausted"), (0, 11, "token_budget_exhausted")]
)
async def test_budget_decides_as_a_proxy_does(
    database: Database, sql: Sql, spent: int, tokens: int, code: str | None
) -> None:
    await give(sql, "{}")
    identity, _ = await explain_key(database, "key_1", JOB, CONFIGURED, now=clock.now)
    budget = Pool("token", AGENT_TOKEN, False)
    ledger = PostgresLedger(database, lease_seconds=60.0)
    asked = LeaseReport(1, Window(budget, "tokens_total"), 0, 10, 0.0, 0, 0, 0, spent, spent, False, False)
    await ledger.sync("other", 1, [asked])
    await ledger.sync("other", 2, [asked._replace(granted=spent, used=spent, want=0, at_least=0)])
    holder = replace(identity, allowance=Allowance(((budget, budget_plan(10, None)),)))
    question = Question("POST", "/v1/chat", tokens)
    told = await explain(holder, question, CONFIGURED, ledger, owners=database, now=clock.now)
    assert (None if told.refusal is None else told.refusal.reason.code) == code
    assert told.refusal is None or told.refusal.retry_after_seconds is None
    assert about(told, "token.tokens_total")["remaining"] == 10 - spent


# -- bodies


HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello, how are you?"}]}
PRICED = Settings(
    routes=(RouteRow("POST /v1/chat/completions", tokens="openai"),),
    ledger=schema.LedgerSettings(lease_seconds=60.0),
    models=(Model("gpt-4o", price=price_of(2_500_000, 10_000_000)), Model("mini", price=price_of(0, 0))),
)


CENT_A_DAY = '[{"measure": "spend", "per": "day", "amount": 10000}]'


async def reserved(database: Database, *, model: str = "", **members: Any) -> tuple[Any, ...]:
    """(code, model, input, output, cap, price) of Hello with these members."""
    body = json.dumps(HELLO | members).encode()
    question = Question("POST", "/v1/chat/completions", model=model, body=body)
    _, told = await explain_key(database, "key_1", question, PRICED, now=clock.now)
    code = None if told.refusal is None else told.refusal.reason.code
    return (code, *(told.reservation[name] for name in ("model", "input", "output", "cap", "price")))


@pytest.mark.parametrize(
    ("limits", "members", "wanted"),
    [
        ("{}", {}, (None, "gpt-4o", 18, 4096, 4096, 41_005)),
        ("{}", {"max_completion_tokens": 50}, (None, "gpt-4o", 18, 50, None, 545)),
        ("{}", {"max_tokens": 50, "n": 3}, (None, "gpt-4o", 18, 150, None, 1_545)),
        ('{"tokens_per_request": 500}', {}, (None, "gpt-4o", 18, 482, 482, 4_865)),
        ('{"tokens_per_day": 300}', {}, (None, "gpt-4o", 18, 282, 282, 2_865)),
        ('{"tokens_per_request": 33}', {}, ("token_limit_per_request", "gpt-4o", 18, 16, 16, 205)),
        (CENT_A_DAY, {}, (None, "gpt-4o", 18, 995, 995, 9_995)),
        (CENT_A_DAY, {"model": "x"}, ("model_unpriced", "x", 18, 4096, 4096, None)),
        ("{}", {"model": "x"}, (None, "x", 18, 4096, 4096, None)),
    ],
)  # fmt: skip
async def test_a_body_reserves_what_a_proxy_would_reserve(
    database: Database, sql: Sql, limits: str, members: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    await give(sql, limits)
    assert await reserved(database, **members) == wanted
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.windows") == 0


async def test_a_named_model_replaces_the_one_of_the_body(database: Database, sql: Sql) -> None:
    await give(sql, "{}")
    assert await reserved(database, model="mini") == (None, "mini", 18, 4096, 4096, 0)


async def test_a_body_that_a_proxy_refuses_is_refused(database: Database, sql: Sql) -> None:
    await give(sql, "{}")
    assert await reserved(database, max_tokens="many") == ("request_malformed", None, None, None, None, None)
    assert (await explained(database, JOB._replace(body=b"not JSON"))).reservation["input"] is None


@pytest.mark.parametrize(
    ("path", "named"), [("/v1/chat/completions", "'max_completion_tokens'"), ("/v1/responses", "'max_output_tokens'")]
)
async def test_a_body_without_the_maximum_that_its_route_requires_is_explained_as_it_is_refused(
    database: Database, sql: Sql, path: str, named: str
) -> None:
    await give(sql, '{"tokens_per_day": 300}')
    refusing = replace(PRICED, routes=(RouteRow(f"POST {path}", tokens="openai", cap="refuse"),))
    question = Question("POST", path, body=json.dumps(HELLO | {"input": "Hello"}).encode())
    _, told = await explain_key(database, "key_1", question, refusing, now=clock.now)
    assert told.refusal is not None
    assert told.refusal.reason is Reason.OUTPUT_MAXIMUM_REQUIRED
    assert named in told.refusal.caller_text
    assert told.reservation["input"] is None
    assert [(row["remaining"], row["refuses"]) for row in told.limits] == [(300, False)]


async def test_a_key_without_the_scopes_of_a_route_is_explained_so_whatever_the_body(
    database: Database, sql: Sql
) -> None:
    await give(sql, "{}")
    scoped = replace(PRICED, routes=(RouteRow("POST /v1/chat/completions", ["ai:chat"], tokens="openai"),))
    question = Question("POST", "/v1/chat/completions", body=b"not JSON")
    _, told = await explain_key(database, "key_1", question, scoped, now=clock.now)
    assert told.refusal is not None
    assert told.refusal.reason is Reason.SCOPE_INSUFFICIENT


async def test_credits_and_selectors_are_part_of_a_window_s_state(database: Database, sql: Sql) -> None:
    await give(sql, '[{"measure": "tokens", "per": "day", "amount": 100, "model": "gpt-4o"}]')
    await sql.execute(
        "SELECT keyproxy.credit_window('user', 'u_42', false, 'tokens_per_day', 'model:gpt-4o', 100, 25, 'r')"
    )
    (row,) = await windows_of_user(database, "u_42", CONFIGURED, is_test=False, now=clock.now)
    assert {name: row[name] for name in ("policy", "selector", "limit", "credited", "remaining")} == {
        "policy": "user.tokens_per_day@model:gpt-4o", "selector": "model:gpt-4o", "limit": 100, "credited": 25,
        "remaining": 125,
    }  # fmt: skip


async def test_a_public_route_is_explained_as_open_to_any_key_and_under_no_limit(database: Database, sql: Sql) -> None:
    await give(sql, '{"requests_per_day": 5}')
    await use(database, "requests_per_day", spent=5, limit=5)
    configured = Settings(routes=(RouteRow("GET /healthz", access="public"), *ROUTES))
    _, told = await explain_key(database, "key_1", Question("GET", "/healthz"), configured, now=clock.now)
    assert (told.route, told.refusal, list(told.limits)) == ("GET /healthz", None, [])


@pytest.mark.parametrize(
    ("path", "code"),
    [("/v1/files/a%2Fb", None), ("/v1/files/a%2F..", "request_malformed"), ("/a%2Fb", "route_not_allowed")],
)
async def test_an_encoded_slash_is_explained_as_it_is_judged(
    database: Database, sql: Sql, path: str, code: str | None
) -> None:
    await add_user(sql)
    await add_key(sql)
    configured = Settings(routes=(RouteRow("GET /v1/files/{id}", encoded_slash="forward"),))
    _, told = await explain_key(database, "key_1", Question("GET", path), configured, now=clock.now)
    assert (None if told.refusal is None else told.refusal.reason.code) == code


JUDGING = Settings(
    models=(Model("small"), Model("big", scopes=frozenset({"model:premium"}))),
    categories=(Category("code", frozenset({"prompt:code"})), Category("plain")),
    routes=(
        RouteRow("POST /chat", tokens="openai", prompt="openai", category=["=plain", "template"]),
        RouteRow("POST /kind", category=["header:X-Kind"]),
        RouteRow(
            "POST /c/{c...}",
            binds=[
                {"value": "path:c", "starts": "{tenant}/"},
                {"value": "header:X-Id", "owned": "collection", "missing": "allow"},
            ],
        ),
    ),
)


@pytest.mark.parametrize(
    ("question", "code", "missing", "shown"),
    [
        (Question("POST", "/chat", model="small", categories=("plain",)), None, None, {"model": "small"}),
        (Question("POST", "/chat", model="big", categories=("plain",)), "model_not_allowed", "model:premium",
         {"model": "big", "categories": []}),
        (Question("POST", "/chat", model="unlisted"), "model_not_allowed", None, {"model": "unlisted"}),
        (Question("POST", "/chat", model="mine", categories=("plain",)), None, None, {"model": "mine"}),
        (Question("POST", "/chat", model="theirs", categories=("plain",)), "model_not_allowed", None, {}),
        (Question("POST", "/chat"), "request_malformed", None, {}),
        (Question("POST", "/chat?model=big", model="small"), "model_not_allowed", "model:premium", {}),
        (Question("POST", "/chat", model="small"), "prompt_category_not_allowed", None, {}),
        (
            Question("POST", "/chat", model="small", categories=("code",)), "prompt_category_not_allowed",
            "prompt:code",
            {
                "model": "small",
                "categories": [{"name": "plain", "source": "route"}, {"name": "code", "source": "template"}],
            },
        ),
        (
            Question("POST", "/chat", body=b'{"model":"small","messages":[]}', categories=("plain",)), None, None,
            {
                "model": "small",
                "categories": [{"name": "plain", "source": "route"}, {"name": "plain", "source": "template"}],
            },
        ),
        (Question("POST", "/kind", categories=("plain",)), None, None,
         {"categories": [{"name": "plain", "source": "declared"}]}),
        (Question("POST", "/kind"), "prompt_category_not_allowed", None, {}),
        (
            Question("POST", "/c/acme/docs", namespaces=(("header:x-id", "c-1"),)), None, None,
            {
                "binds": [
                    {"value": "path:c", "rule": "starts", "text": "{tenant}/", "holds": True},
                    {"value": "header:X-Id", "rule": "owned", "text": "collection", "holds": True},
                ]
            },
        ),
        (
            Question("POST", "/c/globex/docs", namespaces=(("header:X-Id", "c-2"),)), "namespace_forbidden", None,
            {
                "binds": [
                    {"value": "path:c", "rule": "starts", "text": "{tenant}/", "holds": False},
                    {"value": "header:X-Id", "rule": "owned", "text": "collection", "holds": False},
                ]
            },
        ),
        (Question("POST", "/c/acme/docs", namespaces=(("path:c", "globex/x"),)), "namespace_forbidden", None, {}),
        (Question("POST", "/c/acme/docs"), None, None, {}),
    ],
)  # fmt: skip
async def test_a_judged_request_is_explained_as_a_proxy_judges_it(
    database: Database, sql: Sql, question: Question, code: str | None, missing: str | None, shown: dict[str, Any]
) -> None:
    await add_user(sql)
    await add_key(sql)
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ('globex')")
    owned = "INSERT INTO keyproxy.owned (kind, id, tenant_id) VALUES ($1, $2, $3)"
    for row in (("model", "mine", "acme"), ("model", "theirs", "globex"), ("collection", "c-1", "acme")):
        await sql.execute(owned, *row)
    _, told = await explain_key(database, "key_1", question, JUDGING, now=clock.now)
    assert (None if told.refusal is None else told.refusal.reason.code) == code
    assert (None if told.refusal is None else min(told.refusal.missing_scopes, default=None)) == missing
    assert {name: told.access[name] for name in shown} == shown


async def test_a_namespace_that_the_route_does_not_bind_is_an_error(database: Database, sql: Sql) -> None:
    await add_user(sql)
    await add_key(sql)
    for namespaces in ((("query:c", "x"),), (("c", "x"),)):
        with pytest.raises(Invalid, match="namespace"):
            await explain_key(
                database, "key_1", Question("POST", "/c/acme/x", namespaces=namespaces), JUDGING, now=clock.now
            )


TOOLS = (
    ToolRow("read", scopes=["jobs:write"]),
    ToolRow("crm.update", "update_contact", scopes=["data:write"]),
    ToolRow("agents_only", credentials=["agent"]),
    ToolRow("partner", client_certificate=True),
    ToolRow("mail", approval="consent"),
    ToolRow("transfer", approval="human"),
)
WITH_TOOLS = Settings(
    routes=(
        RouteRow("POST /mcp", scopes=["jobs:write"], protocol="mcp"),
        RouteRow("POST /v1/mail", tool="mail"),
        RouteRow("POST /v1/ai/jobs"),
    ),
    tools=TOOLS,
    ledger=schema.LedgerSettings(lease_seconds=60.0),
)


async def explained_tool(database: Database, path: str, tool: str = "", **more: Any) -> tuple[str | None, Any, Any]:
    """The code, and what the explanation has of the tool."""
    question = Question("POST", path, tool=tool, **more)
    found = (await explain_key(database, "key_1", question, WITH_TOOLS, now=clock.now))[1]
    code = None if found.refusal is None else found.refusal.reason.code
    return code, found.access["tool"], found.access["missing"]


@pytest.mark.parametrize("path", ["/mcp", ""])
async def test_tool_is_judged_as_a_proxy_judges_it(database: Database, sql: Sql, path: str) -> None:
    await give(sql, "{}")
    refused = "tool_not_allowed"
    assert await explained_tool(database, path) == (None, None, None)
    assert await explained_tool(database, path, "read") == (None, "read", None)
    assert await explained_tool(database, path, "update_contact") == (refused, "crm.update", "scope")
    assert await explained_tool(database, path, "agents_only") == (refused, "agents_only", "credential")
    assert await explained_tool(database, path, "unknown") == (refused, None, "tool")
    assert await explained_tool(database, path, "partner") == (refused, "partner", "client_certificate")
    assert await explained_tool(database, path, "partner", has_certificate=True) == (None, "partner", None)


async def test_call_that_needs_an_approval_is_explained_as_refused_unless_a_consent_suffices(
    database: Database, sql: Sql
) -> None:
    await give(sql, "{}")
    for path, tool in (("/mcp", "mail"), ("/mcp", "transfer"), ("/v1/mail", ""), ("/v1/mail", "mail")):
        assert await explained_tool(database, path, tool) == ("approval_required", tool or "mail", None)
    await sql.execute(
        "INSERT INTO keyproxy.consents (id, user_id, tool, agent_id, granted_by, expires_at)"
        " SELECT 'cns_' || lpad(n::text, 22, '0'), 'u_42', tool, NULL, 'cli:test', now() + interval '1 day'"
        " FROM unnest(ARRAY['mail', 'transfer']) WITH ORDINALITY AS t (tool, n)"
    )
    assert await explained_tool(database, "/v1/mail") == (None, "mail", None)
    assert await explained_tool(database, "/mcp", "transfer") == ("approval_required", "transfer", None)


async def test_body_of_a_message_names_the_tool_by_its_name_in_the_protocol(database: Database, sql: Sql) -> None:
    await give(sql, "{}")
    for name, label in (("read", "read"), ("update_contact", "crm.update"), ("crm.update", None)):
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name}}).encode()
        assert (await explained_tool(database, "/mcp", body=body))[1] == label
    assert await explained_tool(database, "/mcp", body=b'{"method": "tools/list"}') == (None, None, None)
    assert (await explained_tool(database, "/mcp", body=b"[]"))[0] == "request_malformed"


async def test_tool_that_the_route_does_not_call_cannot_be_explained(database: Database, sql: Sql) -> None:
    await give(sql, "{}")
    for path in ("/v1/mail", "/v1/ai/jobs"):
        with pytest.raises(Invalid, match="the route calls"):
            await explained_tool(database, path, "read")

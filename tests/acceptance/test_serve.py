"""`keyproxy serve` with a real PostgreSQL, as a black-box client sees it."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import signal
import socket
import time
from pathlib import Path

import asyncpg
import pytest

from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations
from tests.acceptance.conftest import Configure, Site, until


async def test_a_key_from_the_command_line_is_accepted_with_its_identity(site: Site) -> None:
    await site.run_json("tenant", "create", "acme")
    await site.run_json("user", "create", "u_42", "--tenant", "acme", "--no-key")
    key = await site.run_json("key", "issue", "--user", "u_42", "--scope", "jobs:write", "--scope", "jobs:read")
    test = await site.run_json("key", "issue", "--user", "u_42", "--test")
    async with site.serving():
        assert await site.call(key["secret"]) == (200, "")
        assert await site.call(test["secret"]) == (200, "")
    live, other = site.upstream.requests
    assert live.one("X-Keyproxy-User") == "u_42"
    assert live.one("X-Keyproxy-Tenant") == "acme"
    assert live.one("X-Keyproxy-Scope") == "jobs:write jobs:read"
    assert (live.one("X-Keyproxy-Test"), other.one("X-Keyproxy-Test")) == ("false", "true")
    assert live.one("X-Keyproxy-Key-Id") == key["id"]


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("UPDATE keyproxy.api_keys SET revoked_at = now()", "api_key_revoked"),
        ("UPDATE keyproxy.api_keys SET expires_at = now() - interval '1 second'", "api_key_expired"),
        ("UPDATE keyproxy.users SET disabled_at = now()", "account_disabled"),
        ("UPDATE keyproxy.tenants SET disabled_at = now()", "account_disabled"),
        ("UPDATE keyproxy.api_keys SET scopes = '{}'", "insufficient_scope"),
        ("DELETE FROM keyproxy.api_keys", "api_key_invalid"),
        ("DELETE FROM keyproxy.users", "api_key_invalid"),
        ("DELETE FROM keyproxy.tenants", "api_key_invalid"),
        ("TRUNCATE keyproxy.tenants CASCADE", "api_key_invalid"),
    ],
)
async def test_a_change_by_any_sql_client_takes_effect_within_a_second(
    configure: Configure, dsn: str, statement: str, code: str
) -> None:
    site = configure(dsn, routes=[{"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]}])
    key = await site.key(scopes=["jobs:write"])
    connection = await asyncpg.connect(dsn)
    async with site.serving():
        assert await site.call(key["secret"]) == (200, "")
        await connection.execute(statement)
        changed = time.monotonic()

        async def is_refused() -> bool:
            return (await site.call(key["secret"]))[1] == code

        await until(is_refused, seconds=1.0)
        assert time.monotonic() - changed < 1.0
    await connection.close()


async def test_requests_import_no_module(configure: Configure, dsn: str) -> None:
    """An import takes longer than a hundred requests, which all would wait for it."""
    routes = [
        {"match": "POST /v1/ai/chat/completions", "tokens": "openai"},
        {"match": "POST /v1/ai/jobs", "scopes": ["jobs:write"]},
    ]
    site = configure(dsn, routes=routes)
    # Only the start of an interpreter reads this variable.
    site.commands, site.environment["PYTHONPROFILEIMPORTTIME"] = None, "1"
    key, other = await site.key(scopes=["jobs:write"]), await site.key("u_43")
    async with site.serving() as process:
        await site.until_ready(process)
        await site.until_logged("proxy on")
        assert b"import time:" in b"".join(site.printed)
        already = len(b"".join(site.printed))
        assert await site.call(key["secret"]) == (200, "")
        assert await site.call(key["secret"], path="/v1/ai/chat/completions") == (200, "")
        assert await site.call(other["secret"]) == (403, "insufficient_scope")
        assert await site.call("kp_unknown") == (401, "api_key_invalid")
        assert await site.call(key["secret"], "GET", "/v1/ai/jobs") == (403, "route_not_allowed")
    assert b"import time:" not in b"".join(site.printed)[already:]


async def test_an_unknown_key_works_within_a_second_of_its_creation(site: Site, dsn: str) -> None:
    key = await site.key()
    connection = await asyncpg.connect(dsn)
    row = await connection.fetchrow("DELETE FROM keyproxy.api_keys RETURNING *")
    assert row is not None
    async with site.serving():
        assert await site.call(key["secret"]) == (401, "api_key_invalid")
        await connection.execute(
            "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ($1, $2, $3)", "key_1", "u_42", row["digest"]
        )

        async def is_let_in() -> bool:
            return (await site.call(key["secret"]))[0] == 200

        await until(is_let_in, seconds=1.0)
    await connection.close()


async def test_an_outage_of_the_store_neither_opens_the_door_nor_locks_out(
    configure: Configure, tmp_path: Path
) -> None:
    home = Path("/tmp") / f"kp-{tmp_path.name[-20:]}-{time.monotonic_ns() % 10**9}"
    server = embedded_postgres.start(home, {"fsync": "off"})
    await migrations.migrate(server.dsn())
    site = configure(server.dsn(), cache={"fresh_seconds": 1.0})
    known, unseen = await site.key("u_1"), await site.key("u_2")
    async with site.serving():
        assert await site.call(known["secret"]) == (200, "")
        server.stop()
        for _ in range(3):
            assert await site.call(known["secret"]) == (200, "")
            assert await site.call(unseen["secret"]) == (503, "store_unavailable")
            await asyncio.sleep(0.5)
        status, page = await site.ops("/readyz")
        assert (status, json.loads(page)["checks"]["store"]["status"]) == (200, "degraded")
        assert await site.metric("keyproxy_store_up") == 0
        server = embedded_postgres.start(home, {"fsync": "off"})

        async def has_recovered() -> bool:
            return (await site.call(unseen["secret"]))[0] == 200

        await until(has_recovered, seconds=5.0)
        assert await site.call(known["secret"]) == (200, "")
        assert await site.metric("keyproxy_store_up") == 1
    server.stop()


async def test_it_starts_without_a_store_refuses_strangers_and_recovers(configure: Configure, tmp_path: Path) -> None:
    home = Path("/tmp") / f"kp-{tmp_path.name[-20:]}-{time.monotonic_ns() % 10**9}"
    server = embedded_postgres.start(home, {"fsync": "off"})
    await migrations.migrate(server.dsn())
    site = configure(server.dsn())
    key = await site.key()
    server.stop()
    async with site.serving():
        assert await site.call(key["secret"]) == (503, "store_unavailable")
        assert (await site.ops("/readyz"))[0] == 503
        server = embedded_postgres.start(home, {"fsync": "off"})

        async def is_let_in() -> bool:
            return (await site.call(key["secret"]))[0] == 200

        await until(is_let_in, seconds=5.0)
        assert (await site.ops("/readyz"))[0] == 200
    server.stop()


async def test_readiness_fails_with_a_reason_while_the_upstream_is_down(site: Site) -> None:
    async with site.serving():
        await site.upstream.stop()

        async def is_unready() -> bool:
            return (await site.ops("/readyz"))[0] == 503

        await until(is_unready, seconds=5.0)
        _, page = await site.ops("/readyz")
        assert json.loads(page)["checks"]["upstream"]["status"] == "failed"
        assert json.loads(page)["checks"]["upstream"]["reason"]


async def test_sigterm_finishes_requests_in_flight_and_exits_0(site: Site) -> None:
    key = await site.key()
    async with site.serving() as process, site.client() as client:
        head = f"POST / HTTP/1.1\r\nHost: a\r\nAuthorization: Api-Key {key['secret']}\r\nContent-Length: 4\r\n\r\n"
        await client.send(head.encode() + b"ab")
        await until(lambda: _is_true(len(site.upstream.heads) == 1), seconds=5)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        await client.send(b"cd")
        answer = await client.answer()
        assert (answer.status, answer.one("Connection")) == (200, "close")
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def test_every_request_has_one_line_in_the_access_log_and_one_count_in_the_metrics(site: Site) -> None:
    key = await site.key()
    async with site.serving():
        await site.call(key["secret"], path="/v1/ai/jobs?secret=query")
        await site.call("kp_live_nonsense")
        async with site.client() as client:
            await client.send(b"nonsense\r\n\r\n")
            assert (await client.answer()).status == 400
        labels = {"route": "any", "status": "200", "mode": "live", "code": "ok"}
        assert await site.metric("keyproxy_requests_total", **labels) == 1
        assert await site.metric("keyproxy_refusals_total", code="api_key_invalid") == 1
        assert await site.metric("keyproxy_refusals_total", code="request_malformed") == 1
        assert await site.metric("keyproxy_identity_lookups_total", result="miss") == 1
        assert await site.metric("keyproxy_request_seconds_count", route="any", mode="live") == 1
    good, refused, malformed = site.log()
    assert (good["status"], good["code"], good["user"], good["key_id"]) == (200, "ok", "u_42", key["id"])
    assert (good["method"], good["path"], good["mode"]) == ("POST", "/v1/ai/jobs", "live")
    assert (refused["status"], refused["code"], refused["user"]) == (401, "api_key_invalid", None)
    assert (malformed["status"], malformed["code"]) == (400, "request_malformed")
    assert [line["client"] for line in (good, refused, malformed)] == ["127.0.0.1"] * 3
    assert refused["detail"] == "malformed, or wrong checksum"
    assert malformed["detail"].startswith("llhttp: ")


async def test_a_limit_that_refused_is_named_in_the_log_and_in_the_usage_events(configure: Configure, dsn: str) -> None:
    site = configure(dsn, log={"access": "refusals"})
    key = await site.key()
    await site.run_json("plan", "set", "one", "--requests-per-day", "1")
    await site.run_json("user", "set-plan", "u_42", "one")
    async with site.serving():
        assert [(await site.call(key["secret"]))[1] for _ in range(2)] == ["", "quota_exhausted"]
        assert await site.metric("keyproxy_refusals_total", code="quota_exhausted", blame="caller") == 1
        assert await site.metric("keyproxy_responses_total", **{"class": "2xx"}) == 1
    (refused,) = site.log()
    assert (refused["code"], refused["policy"]) == ("quota_exhausted", "user.requests_per_day")
    wanted = [("ok", None), ("quota_exhausted", "user.requests_per_day")]
    exported = (await site.run("usage", "export", "--events")).out
    events = [json.loads(line) for line in exported.splitlines()]
    assert [(event["code"], event["policy"]) for event in events] == wanted
    exported = (await site.run("usage", "export", "--format", "cloudevents")).out
    events = [json.loads(line)["data"] for line in exported.splitlines()]
    assert [(event["code"], event["policy"]) for event in events] == wanted
    exported = (await site.run("usage", "export", "--events", "--format", "csv")).out
    assert [(row["code"], row["policy"] or None) for row in csv.DictReader(io.StringIO(exported))] == wanted


async def test_which_requests_are_logged_changes_with_the_configuration(configure: Configure, dsn: str) -> None:
    site = configure(dsn, log={"access": False})
    key = await site.key()
    async with site.serving() as process:
        await site.call(key["secret"])
        await site.call("kp_live_nonsense")
        site.config.write_text(site.config.read_text().replace("access = false", 'access = "refusals"'))
        process.send_signal(signal.SIGHUP)

        async def is_logged() -> bool:
            await site.call(key["secret"])
            await site.call("kp_live_nonsense")
            return bool(site.log())

        await until(is_logged)
    assert {line["code"] for line in site.log()} == {"api_key_invalid"}


async def test_last_use_is_written_within_seconds_without_other_changes(site: Site, dsn: str) -> None:
    key = await site.key()
    connection = await asyncpg.connect(dsn)
    # A proxy publishes its signing key when it starts, perhaps only after its port is open.
    counted = "SELECT count(*) FROM keyproxy.changes WHERE kind <> 'signing'"
    async with site.serving():
        changes = await connection.fetchval(counted)
        await site.call(key["secret"])

        async def is_written() -> bool:
            return await connection.fetchval("SELECT last_used_at IS NOT NULL FROM keyproxy.api_keys")  # type: ignore[no-any-return]

        await until(is_written, seconds=10.0)
        assert await connection.fetchval(counted) == changes
    await connection.close()


@pytest.mark.parametrize(
    ("tables", "status", "sentence"),
    [
        ({"listen": {"adress": "x"}}, 2, "listen.adress: no such key"),
        (
            {"store": {"dsn": "postgresql://127.0.0.1:1/x"}},
            1,
            "the database is unavailable: cannot connect to 127.0.0.1:1, database 'x': ",
        ),
    ],
)
async def test_a_startup_error_is_one_line_with_a_remedy(
    configure: Configure, dsn: str, tables: dict[str, dict[str, str]], status: int, sentence: str
) -> None:
    output = await configure(dsn, **tables).run("migrate")
    assert (output.status, output.out) == (status, "")
    assert len(output.err.splitlines()) == 1
    assert sentence in output.err


async def test_a_missing_schema_is_reported_with_the_command_that_creates_it(
    configure: Configure, empty_dsn: str
) -> None:
    output = await configure(empty_dsn).run("serve")
    assert output.status == 1
    assert "keyproxy migrate" in output.err


async def test_a_port_in_use_is_reported(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.proxy_port)):
        output = await site.run("serve")
    assert output.status == 1
    assert f"cannot listen on 127.0.0.1:{site.proxy_port}" in output.err


async def _is_true(value: bool) -> bool:
    return value

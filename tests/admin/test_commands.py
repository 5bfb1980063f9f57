"""Commands print the same from the database and, with --admin-url, from the admin API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import orjson
import pytest

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.cli import main
from keyproxy.config import loader
from keyproxy.config.schema import Usage
from keyproxy.platform import clock
from keyproxy.store.usage.journal import UsageJournal
from tests import fakes
from tests.admin.conftest import FILE_TOKEN, Api, serving
from tests.store.harness import Sql
from tests.store.usage.test_journal import ended, rows


class Printed(NamedTuple):
    """A command's output and exit status."""

    status: int
    out: str
    err: str


Run = Callable[..., Any]


@pytest.fixture
def run(api: Api, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`await run(*arguments, by="database" or "api" or the URL of an API)`: a command, in this process."""
    config, nothing = tmp_path / "keyproxy.toml", tmp_path / "nothing.toml"
    config.write_text(f"[store]\ndsn = {json.dumps(dsn)}\n")
    nothing.write_text('[store]\ndsn = "postgresql://nowhere.invalid/x"\n')
    monkeypatch.setenv("KEYPROXY_ADMIN_TOKEN", FILE_TOKEN)

    async def running(*arguments: str, by: str = "database") -> Printed:
        where = ["--config", str(config)]
        if by != "database":
            where = ["--config", str(nothing), "--admin-url", api.url if by == "api" else by]
        status = await asyncio.to_thread(main, [*arguments, *where])
        return Printed(status, *capsys.readouterr())

    return running


@pytest.fixture
async def key(api: Api) -> str:
    """A key of a user under limits, with usage."""
    journal = UsageJournal(api.database, Usage(), clock.now, settle_seconds=0.5)
    journal.take(rows(*(ended(fakes.identity("u_1", "acme"), use=TokenUse(10, 1)) for _ in range(2))))
    await journal.flush()
    key: str = (await api.user())["key"]["id"]
    await api.done("PUT", "/v1/plans/five", {"limits": {"requests_per_day": 5, "tokens_per_month": 0}})
    await api.done("PATCH", "/v1/users/u_1", {"plan": "five"})
    await api.token("keys:read")
    await api.done("PUT", "/v1/roles/reader", {"scopes": ["a", "b"]})
    await api.done("PATCH", "/v1/users/u_1", {"roles": ["reader"]})
    await api.done("PUT", "/v1/owned/collection/a%2Fb", {"tenant": "acme"})
    await api.done("PATCH", f"/v1/keys/{key}", {"acts_for": "tenant", "scopes": ["a"]})
    await api.directory.agent_tokens.mint(key, {"agent": "crawler", "scopes": ["a"]})
    return key


@pytest.mark.parametrize(
    ("scope", "command"),
    [("usage:read", "key origins KEY"), ("keys:write", "key suspend KEY --reason x"), ("keys:write", "key resume KEY")],
)
async def test_command_needs_only_the_scope_of_its_endpoint(
    run: Run, api: Api, key: str, scope: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYPROXY_ADMIN_TOKEN", await api.token(scope))
    printed = await run(*command.replace("KEY", key).split(), by="api")
    assert (printed.status, printed.err) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        "tenant list", "tenant show acme", "user list", "user show u_1", "key list", "key show KEY", "plan list",
        "key list --sort created", "key stale --unused 365d", "key revoke-all --user u_1 --dry-run", "plan show five",
        "audit list", "audit list --entity token", "audit export", "key whose KEY",
        "usage show", "usage show --by user --by mode", "usage show --tenant nobody", "usage windows --user u_1 --test",
        "usage export", "usage export --format csv", "usage export --events", "usage export --format cloudevents",
        "role list", "role show reader", "role show nothing", "owned list", "owned list --tenant acme", "owned show m x",
        "key explain KEY --path /v1/ai/jobs", "key explain KEY --path /v1/ai/jobs --method GET --tokens 5",
        "usage show --by model", "usage credit --user u_1 --limit tokens/week --amount 5 --reason r",
        "key origins KEY", "key origins key_x", "tenant show absent", "user show absent",
        "key show key_x", "key explain key_x --path /",
        "agent list --user u_1", "agent list --user u_none", "agent show crawler --user u_1", "agent show x --user u_1",
        "key explain KEY --act-for u_1", "key explain KEY --act-for u_none --path /v1/ai/jobs", "agent explain TOKEN",
        "key explain KEY --tool read", "key explain KEY --path /v1/ai/jobs --tool read --client-certificate",
        "agent explain TOKEN --path /v1/ai/jobs --tokens 5", f"agent explain agt_{'0' * 22}",
        "audit list --entity agent", "audit list --entity agent_token",
        "usage windows --user nobody", "usage export --events --after 0123456789abcdef:1:1",
    ],
)  # fmt: skip
async def test_lookups_print_the_same_with_and_without_the_api(
    run: Run, api: Api, key: str, sql: Sql, command: str
) -> None:
    token = await sql.fetchval("SELECT id FROM keyproxy.agent_tokens")
    arguments = [{"KEY": key, "TOKEN": token}.get(word, word) for word in command.split()]
    for form in ([], ["--json"]):
        direct, remote = await run(*arguments, *form), await run(*arguments, *form, by="api")
        assert direct.status == remote.status
        assert _timeless(direct.out) == _timeless(remote.out)
        assert len(remote.err.splitlines()) == remote.status
        assert bool(remote.out) is not bool(remote.status)


PRICED = """
[money]
unit = "kEUR"
[[models]]
name = "m"
input_micros_per_million = 0
output_micros_per_million = 1000000
[[routes]]
match = "POST /v1/chat/completions"
tokens = "openai"
"""


async def test_amounts_of_money_are_shown_with_the_configured_unit(
    run: Run, key: str, api: Api, tmp_path: Path
) -> None:
    config = tmp_path / "keyproxy.toml"
    config.write_text(config.read_text() + PRICED)
    settings = loader.load(config, {}).settings
    async with serving(api.database, settings=settings) as priced:
        for by in ("database", priced.url):
            await check_units(run, key, tmp_path, by)


async def check_units(run: Run, key: str, tmp_path: Path, by: str) -> None:
    limits = ("--limit", "spend/day=2.50", "--limit", "tokens/day=5000")
    assert (await run("plan", "set", "five", *limits)).status == 0
    body = tmp_path / "body.json"
    body.write_text('{"model":"m","max_tokens":50}')
    plan = await run("plan", "show", "five", by=by)
    assert re.search(r"^spend/day +2\.50 kEUR$", plan.out, re.MULTILINE)
    assert re.search(r"^tokens/day +5000$", plan.out, re.MULTILINE)
    assert "COST (kEUR)" in (await run("usage", "show", by=by)).out.splitlines()[0]
    windows = (await run("usage", "windows", "--user", "u_1", by=by)).out
    assert re.search(r"(?m)user\.spend_per_day +- +2\.50 .* kEUR$", windows)
    assert re.search(r"(?m)user\.tokens_per_day +- +5000 .* -$", windows)
    question = ("key", "explain", key, "--path", "/v1/chat/completions", "--body", str(body))
    explained = (await run(*question, by=by)).out
    assert re.search(r"(?m)user\.spend_per_day +- +2\.50 .* kEUR +no$", explained)
    assert re.search(r"^price +0\.00005 kEUR$", explained, re.MULTILINE)
    assert "kEUR" not in (await run("usage", "show", "--json", by=by)).out


def _timeless(text: str) -> str:
    """Remove durations that depend on the current time."""
    return re.sub(r" *\b\d+\.\d+\b *|(?<=after_seconds)[\": ]+\d+", "#", text)


@pytest.mark.parametrize("by", ["database", "api"])
async def test_each_change_of_a_key_is_in_the_audit_log_with_its_actor(run: Run, api: Api, by: str) -> None:
    async def run_json(*arguments: str) -> Any:
        printed = await run(*arguments, "--json", by=by)
        assert (printed.status, printed.err) == (0, "")
        return json.loads(printed.out)

    await run_json("plan", "set", "five", "--requests-per-day", "5")
    await run_json("tenant", "create", "acme", "--plan", "five")
    first = (await run_json("user", "create", "u_1", "--tenant", "acme", "--scope", "jobs:write"))["key"]
    other = await run_json("key", "issue", "--user", "u_1", "--test", "--name", "nightly", "--expires-in", "7d")
    assert first["secret"].startswith("kp_live_")
    assert other["secret"].startswith("kp_test_")
    new = await run_json("key", "rotate", first["id"], "--grace", "1h")
    await run_json("key", "set-plan", other["id"], "five")
    await run_json("key", "revoke", other["id"], "--reason", "lost")
    digest = hashlib.sha256(new["secret"].encode()).hexdigest()
    (leaked,) = (await run_json("key", "report-leaked", "--digest", digest))["found"]
    assert (leaked["key"], leaked["user"]) == (new["id"], "u_1")
    await run_json("user", "disable", "u_1")
    await run_json("user", "enable", "u_1")
    await run_json("tenant", "set-plan", "acme", "--none")
    assert (await run_json("key", "revoke-all", "--user", "u_1", "--yes"))["revoked"] == 1
    await run_json("key", "delete", other["id"], "--yes")
    await run_json("tenant", "delete", "acme", "--yes")
    await run_json("plan", "delete", "five", "--yes")
    log = await run_json("audit", "list")
    assert {row["actor"].partition(":")[0] for row in log} == {"cli" if by == "database" else "token"}
    acts = [(row["entity"], row["action"]) for row in reversed(log)]
    assert acts[:15] == [
        ("plan", "insert"), ("tenant", "insert"), ("user", "insert"), ("key", "insert"), ("key", "insert"),
        ("key", "insert"), ("key", "update"), ("key", "update"), ("key", "update"), ("key", "update"),
        ("user", "update"), ("user", "update"), ("tenant", "update"), ("key", "update"), ("key", "delete"),
    ]  # fmt: skip
    # The database chooses the order of deletions that cascade from a tenant.
    assert sorted(acts[15:-1]) == [("key", "delete"), ("key", "delete"), ("tenant", "delete"), ("user", "delete")]
    assert acts[-1] == ("plan", "delete")
    assert new["secret"] not in json.dumps(log)


@pytest.mark.parametrize("by", ["database", "api"])
async def test_an_export_resumes_after_its_last_row_but_not_in_another_history(
    run: Run, api: Api, tmp_path: Path, by: str
) -> None:
    file = tmp_path / "audit.jsonl"

    async def export() -> Printed:
        printed: Printed = await run("audit", "export", "--output", str(file), by=by)
        return printed

    await api.user()
    for added in (3, 0):
        printed = await export()
        assert (printed.status, printed.err) == (0, f"keyproxy: {added} rows added to {file}\n")
    await api.user("u_2")
    assert (await export()).status == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    assert [row["entity_id"] for row in rows if row["entity"] == "user"] == ["u_1", "u_2"]
    assert {row["db_role"] for row in rows} == {"keyproxy"}
    # After a restore from a backup, these ids belong to other rows, or to none yet.
    for other in ({**rows[-1], "at": "2020-01-01T00:00:00.000Z"}, {**rows[-1], "id": rows[-1]["id"] + 9}):
        text = "".join(json.dumps(row) + "\n" for row in [*rows[:-1], other])
        file.write_text(text)
        printed = await export()
        assert printed.status == 1
        assert "the audit log does not contain its last row" in printed.err
        assert file.read_text() == text


async def test_audit_rows_of_one_login_role_are_listed_and_exported(run: Run, api: Api, sql: Sql) -> None:
    await api.user()
    await sql.execute("SET session_replication_role = replica")
    await sql.execute("UPDATE keyproxy.audit_log SET db_role = 'app' WHERE entity = 'user'")
    for by in ("database", "api"):
        listed = json.loads((await run("audit", "list", "--db-role", "app", "--json", by=by)).out)
        exported = (await run("audit", "export", "--db-role", "app", by=by)).out.splitlines()
        assert [(row["entity_id"], row["db_role"]) for row in listed] == [("u_1", "app")]
        assert [json.loads(line)["id"] for line in exported] == [listed[0]["id"]]
        assert json.loads((await run("audit", "list", "--db-role", "other", "--json", by=by)).out) == []


async def test_an_export_from_before_rows_had_a_role_resumes(run: Run, api: Api, dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    await api.user()
    client = await asyncpg.connect(dsn)
    await client.execute("SET session_replication_role = replica; UPDATE keyproxy.audit_log SET db_role = NULL")
    await client.close()
    assert (await run("audit", "export", "--output", str(file), by="database")).status == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row.pop("db_role") for row in rows} == {None}
    file.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    await api.user("u_2")
    printed = await run("audit", "export", "--output", str(file), by="database")
    assert (printed.status, printed.err) == (0, f"keyproxy: 2 rows added to {file}\n")


async def test_an_invalid_token_is_reported_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYPROXY_ADMIN_TOKEN", "x" * 40)
    printed = await run("tenant", "list", by="api")
    assert (printed.status, printed.out, len(printed.err.splitlines())) == (1, "", 1)
    assert "token_invalid" in printed.err


@pytest.mark.parametrize("by", ["database", "api"])
async def test_keys_are_imported_and_errors_are_reported_with_their_line(
    run: Run, api: Api, tmp_path: Path, by: str
) -> None:
    await api.directory.tenants.create("acme", "")
    good, file = hashlib.sha256(b"a key").hexdigest(), tmp_path / "keys.csv"
    file.write_text(f"user,digest,name\nu_1,{good},old\nu_2,beef,short\nu_3,{good},twice\n")
    for arguments in (["--dry-run"], []):
        printed = await run("key", "import", str(file), "--tenant", "acme", "--json", *arguments, by=by)
        result = json.loads(printed.out)
        assert (printed.status, result["imported"], result["users"]) == (1, 1, 2)
        assert [problem["place"] for problem in result["problems"]] == [f"{file}:3", f"{file}:4"]
    again = await run("key", "import", str(file), "--tenant", "acme", "--json", by=by)
    assert (json.loads(again.out)["imported"], json.loads(again.out)["present"]) == (0, 1)
    (found,) = await api.directory.keys.list_by_id("", 10)
    assert (found["user"], found["name"]) == ("u_1", "old")


async def test_an_unknown_entity_is_wrong_usage_and_the_message_lists_the_entities(run: Run) -> None:
    printed = await run("audit", "list", "--entity", "tokn")
    assert printed.status == 2
    for kind in ("tenant", "user", "key", "plan", "token"):
        assert f"'{kind}'" in printed.err


async def test_ceiling_that_allows_nothing_is_printed_differently_from_no_ceiling(run: Run, key: str) -> None:
    for option, shown in (("--none", "none"), ("--no-ceiling", "-")):
        changed = await run("tenant", "set-roles", "acme", option)
        assert re.findall(r"(?m)^roles +(\S+)$", changed.out) == [shown]
        explained = await run("key", "explain", key, "--path", "/")
        assert re.findall(r"(?m)^tenant_ceiling +(\S+)$", explained.out) == [shown]

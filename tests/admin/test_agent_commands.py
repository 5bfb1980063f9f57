"""Commands on acting keys, agents and agent tokens: the same from the database and, with --admin-url, from the API."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from tests.admin.conftest import Api
from tests.admin.test_commands import Run, run
from tests.store.harness import Sql

__all__ = ["run"]

BY = pytest.mark.parametrize("by", ["database", "api"])


@pytest.fixture
async def key(api: Api) -> str:
    """A key of u_1 with the scope data:read that acts for users of acme, such as u_2."""
    await api.user("u_1", scopes=("data:read",))
    await api.user("u_2")
    (key,) = (await api.done("GET", "/v1/keys?user=u_1"))["items"]
    await api.directory.keys.change(key["id"], {"acts_for": "tenant"})
    return str(key["id"])


def _token(key: str, *more: str) -> tuple[str, ...]:
    return ("agent", "token", "--key", key, "--agent", "crawler", "--scope", "data:read", *more)


# -- keys that act


@BY
async def test_a_key_is_issued_to_act_and_changed(run: Run, api: Api, by: str) -> None:
    await api.user("u_1")
    issued = await run("key", "issue", "--user", "u_1", "--acts-for", "tenant", "--json", by=by)
    key = json.loads(issued.out)
    assert (issued.status, key["acts_for"]) == (0, "tenant")
    assert "nothing bounds its use over all users together" in issued.err
    assert issued.err.count("acts for users") == 1
    changed = await run("key", "set-acts-for", key["id"], "none", "--json", by=by)
    assert json.loads(changed.out)["acts_for"] == "none"
    assert "acts for users" not in changed.err
    listed = await run("key", "list", "--user", "u_1", by=by)
    assert "ACTS FOR" in listed.out
    wrong = await run("key", "set-acts-for", key["id"], "all", by=by)
    assert (wrong.status, wrong.out) == (2, "")
    assert (await run("key", "set-acts-for", "key_x", "tenant", by=by)).status == 1


@BY
async def test_no_warning_is_printed_if_the_key_or_the_tenant_has_a_plan(run: Run, api: Api, by: str) -> None:
    await api.user("u_1")
    await api.directory.plans.set("basic", {"concurrency": 1})
    issue = ("key", "issue", "--user", "u_1", "--acts-for", "tenant", "--json")
    assert "acts for users" not in (await run(*issue, "--plan", "basic", by=by)).err
    await api.directory.tenants.change("acme", {"plan": "basic"})
    assert "acts for users" not in (await run(*issue, by=by)).err


@BY
async def test_rotation_and_many_keys_keep_acts_for(run: Run, api: Api, tmp_path: Any, by: str) -> None:
    await api.user("u_1")
    rows = tmp_path / "keys.csv"
    rows.write_text("user,name,acts_for\nu_1,a,tenant\nu_1,b,\n")
    many = await run("key", "issue-many", str(rows), "--json", by=by)
    first, second = [json.loads(line) for line in many.out.splitlines()]
    assert (first["acts_for"], second["acts_for"]) == ("tenant", "none")
    assert many.err.count("acts for users") == 1
    rotated = await run("key", "rotate", first["id"], "--json", by=by)
    assert json.loads(rotated.out)["acts_for"] == "tenant"
    rows.write_text(f"user,digest,id,acts_for\nu_1,{'01' * 32},key_a,tenant\nu_1,{'02' * 32},key_b,\n")
    assert (await run("key", "import", str(rows), by=by)).status == 0
    shown = [json.loads((await run("key", "show", name, "--json", by=by)).out) for name in ("key_a", "key_b")]
    assert [one["acts_for"] for one in shown] == ["tenant", "none"]
    rows.write_text("user,name\nu_1,c\n")
    many = await run("key", "issue-many", str(rows), "--acts-for", "tenant", "--json", by=by)
    assert json.loads(many.out)["acts_for"] == "tenant"
    rows.write_text("user,name,acts_for\nu_1,d,everyone\n")
    wrong = await run("key", "issue-many", str(rows), by=by)
    assert (wrong.status, wrong.out) == (1, "")
    assert ":2: acts_for is none or tenant, not 'everyone'" in wrong.err


# -- minting


@BY
async def test_a_token_is_minted_with_all_options(run: Run, key: str, by: str) -> None:
    options = ("--token-budget", "10000", "--request-budget", "200", "--ttl", "15m", "--audience", "keyproxy")
    minted = await run(*_token(key, *options, "--act-for", "u_2", "--json"), by=by)
    token = json.loads(minted.out)
    assert (minted.status, minted.err) == (0, "")
    assert list(token) == [
        "id", "token", "agent", "user", "tenant", "scopes", "token_budget", "request_budget", "audience", "is_test",
        "depth", "expires_at",
    ]  # fmt: skip
    assert (token["user"], token["scopes"], token["token_budget"]) == ("u_2", ["data:read"], 10_000)
    plain = await run(*_token(key), by=by)
    assert plain.err == "keyproxy: this is the only time the token is shown\n"
    assert "eyJ" in plain.out


@BY
@pytest.mark.parametrize(
    ("more", "status", "reason"),
    [
        (("--role", "reader"), 2, "either --role or --scope"),
        (("--agent", "no spaces"), 2, "an agent's id starts with a letter or digit"),
        (("--agent", ""), 2, "an agent's id starts with a letter or digit"),
        (("--ttl", "0s"), 2, "is not a duration"),
        (("--token-budget", "-1"), 2, "--token-budget"),
        (("--request-budget", "1000000000000001"), 2, "--request-budget"),
        (("--ttl", "901s"), 1, "ttl_seconds"),
        (("--ttl", "16m"), 1, "ttl_seconds"),
        (("--audience", "another"), 1, "'audience' must be one of the configured audiences: keyproxy"),
        (("--scope", "data:write"), 1, "'scopes' has 'data:write', which the credential or the agent lacks"),
        (("--key", "key_x"), 1, "there is no key 'key_x'"),
        (("--act-for", "u_unknown"), 1, "the user or the token does not exist"),
    ],
)
async def test_a_refused_mint_prints_one_line_and_leaves_no_row(
    run: Run, sql: Sql, key: str, by: str, more: tuple[str, ...], status: int, reason: str
) -> None:
    refused = await run(*_token(key, *more), by=by)
    assert (refused.status, refused.out) == (status, "")
    assert reason in " ".join(refused.err.split())
    assert status == 2 or refused.err.count("\n") == 1
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agents") == 0


@BY
async def test_a_refused_role_has_its_cause(run: Run, key: str, by: str) -> None:
    mint = ("agent", "token", "--key", key, "--agent", "crawler", "--role")
    unknown = await run(*mint, "nope", by=by)
    assert (unknown.status, unknown.err) == (
        1, "keyproxy: 'role' grants no scope that the credential may grant: there is no such role\n",
    )  # fmt: skip
    await run("role", "set", "premium", "--scope", "model:premium")
    beyond = await run(*mint, "premium", by=by)
    assert (beyond.status, beyond.err.partition(": the credential or the agent has ")[2]) == (1, "none of its scopes\n")


@BY
async def test_a_malformed_id_of_a_token_is_named_with_the_form_of_ids(run: Run, by: str) -> None:
    refused = await run("agent", "revoke", "agt_nope", by=by)
    assert refused.status == 2
    assert "'agt_nope' is not the id of a token, which is agt_ and 22 letters and digits" in " ".join(
        refused.err.split()
    )


async def test_the_key_of_a_command_ends_with_the_token_that_it_signed(run: Run, key: str, sql: Sql) -> None:
    before = set(await _kids(sql))
    await run(*_token(key, "--ttl", "60s"))
    (kid,) = set(await _kids(sql)) - before
    left = await sql.fetchval(
        "SELECT extract(epoch FROM ends_at - now())::float8 FROM keyproxy.signing_keys WHERE kid = $1", kid
    )
    assert 50 < left <= 60.0


async def test_a_refused_mint_of_a_command_leaves_no_live_key(run: Run, key: str, sql: Sql) -> None:
    before = set(await _kids(sql))
    await run(*_token(key, "--scope", "x"))
    assert set(await _kids(sql)) == before


async def _kids(sql: Sql) -> list[str]:
    return [row["kid"] for row in await sql.fetch("SELECT kid FROM keyproxy.signing_keys WHERE ends_at > now()")]


async def test_a_mint_of_a_command_is_audited_under_its_user(run: Run, api: Api, key: str) -> None:
    minted = json.loads((await run(*_token(key, "--json"))).out)
    (row,) = await api.audit(entity="agent_token")
    assert (row["action"], row["entity_id"]) == ("insert", minted["id"])
    assert row["actor"].startswith("cli:")
    assert minted["token"] not in json.dumps(row)


# -- agents


@BY
async def test_an_agent_is_shown_and_changed(run: Run, api: Api, key: str, by: str) -> None:
    await run(*_token(key))
    await api.directory.roles.set("reader", ["data:read"])
    await api.directory.plans.set("basic", {"concurrency": 1})
    of_user = ("--user", "u_1", "--json")
    for arguments, field, value in (
        (("set-roles", "crawler", "--role", "reader"), "roles", ["reader"]),
        (("set-roles", "crawler", "--none"), "roles", []),
        (("set-roles", "crawler", "--no-ceiling"), "roles", None),
        (("set-plan", "crawler", "basic"), "plan", "basic"),
        (("set-plan", "crawler", "--plan", "basic"), "plan", "basic"),
        (("set-plan", "crawler", "--none"), "plan", None),
        (("enable", "crawler"), "disabled_at", None),
        (("show", "crawler"), "tokens", 1),
    ):
        done = await run("agent", *arguments, *of_user, by=by)
        assert (done.status, json.loads(done.out)[field]) == (0, value), arguments
    disabled = await run("agent", "disable", "crawler", *of_user, by=by)
    assert json.loads(disabled.out)["disabled_at"] is not None
    assert (await run(*_token(key), by=by)).status == 1
    (listed,) = json.loads((await run("agent", "list", *of_user, by=by)).out)
    assert listed == json.loads(disabled.out)


@BY
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("disable", "crawler"), 2),
        (("disable", "no spaces", "--user", "u_1"), 2),
        (("set-roles", "crawler", "--user", "u_1"), 2),
        (("set-roles", "crawler", "--user", "u_1", "--none", "--no-ceiling"), 2),
        (("set-plan", "crawler", "--user", "u_1"), 2),
        (("disable", "other", "--user", "u_1"), 1),
        (("disable", "crawler", "--user", "u_2"), 1),
        (("set-roles", "crawler", "--user", "u_1", "--role", "missing"), 1),
        (("set-plan", "crawler", "missing", "--user", "u_1"), 1),
        (("list", "--user", "missing"), 1),
        (("revoke", "crawler"), 2),
        (("revoke", "agt_short"), 2),
        (("revoke", "no spaces", "--user", "u_1"), 2),
        (("revoke", "other", "--user", "u_1"), 1),
        (("revoke", "agt_" + "0" * 22), 1),
        (("explain", "agt_" + "0" * 22), 1),
        (("explain", "agt_" + "0" * 22, "--tokens", "5"), 2),
    ],
)
async def test_wrong_commands_change_nothing_and_have_the_right_status(
    run: Run, sql: Sql, key: str, by: str, arguments: tuple[str, ...], status: int
) -> None:
    await run(*_token(key))
    before = await sql.fetch("SELECT * FROM keyproxy.agents")
    wrong = await run("agent", *arguments, by=by)
    assert (wrong.status, wrong.out) == (status, "")
    assert wrong.err
    assert await sql.fetch("SELECT * FROM keyproxy.agents") == before
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agent_tokens WHERE revoked_at IS NOT NULL") == 0


@BY
async def test_one_token_or_all_of_an_agent_are_revoked_without_a_question(
    run: Run, sql: Sql, key: str, by: str
) -> None:
    ids = [json.loads((await run(*_token(key, "--json"))).out)["id"] for _ in range(3)]
    one = await run("agent", "revoke", ids[0], "--reason", "seen in a log", "--json", by=by)
    revoked = json.loads(one.out)
    assert (one.status, revoked["id"], revoked["revoke_reason"]) == (0, ids[0], "seen in a log")
    every = await run("agent", "revoke", "crawler", "--user", "u_1", "--json", by=by)
    assert (every.status, json.loads(every.out)) == (0, {"agent": "crawler", "user": "u_1", "revoked": 2})
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agent_tokens WHERE revoked_at IS NULL") == 0


# -- leaks and explanations


@BY
@pytest.mark.parametrize("command", ["report-leaked", "whose -"])
async def test_a_token_on_stdin_is_found(
    run: Run, sql: Sql, key: str, monkeypatch: pytest.MonkeyPatch, by: str, command: str
) -> None:
    minted = json.loads((await run(*_token(key, "--json"))).out)
    text = f"GET / HTTP/1.1\r\nAuthorization: Bearer {minted['token']}\r\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    found = await run("key", *command.split(), "--json", by=by)
    assert found.status == 0
    if command == "report-leaked":
        assert json.loads(found.out) == {
            "found": [{"agent_token": minted["id"], "key": key, "user": "u_1", "tenant": "acme", "revoked_now": True}],
            "incomplete": 0, "unknown": 0,
        }  # fmt: skip
    else:
        assert [one["id"] for one in json.loads(found.out)["keys"]] == [key]
    count = await sql.fetchval("SELECT count(*) FROM keyproxy.agent_tokens WHERE revoked_at IS NOT NULL")
    assert count == (command == "report-leaked")
    assert minted["token"] not in found.out + found.err


@BY
async def test_an_explanation_prints_user_actor_scopes_and_code(run: Run, key: str, by: str) -> None:
    minted = json.loads((await run(*_token(key, "--act-for", "u_2", "--json"))).out)
    for arguments in (("key", "explain", key, "--act-for", "u_2"), ("agent", "explain", minted["id"])):
        explained = json.loads((await run(*arguments, "--json", by=by)).out)
        assert {name: explained[name] for name in ("key", "user", "actor", "effective_scopes", "code", "allowed")} == {
            "key": key, "user": "u_2", "actor": "u_1", "effective_scopes": ["data:read"], "code": None, "allowed": True,
        }  # fmt: skip
    assert (explained["agent"], explained["agent_token"]) == ("crawler", minted["id"])
    printed = await run("agent", "explain", minted["id"], by=by)
    assert f"crawler  {minted['id']}" in printed.out
    refused = await run("key", "explain", key, "--act-for", "u_unknown", by=by)
    assert refused.status == 0
    assert "delegation_refused" in refused.out
    assert "does not exist, is disabled, or belongs to another tenant" in refused.out

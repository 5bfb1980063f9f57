"""The lifecycle by commands: plans, rotation, revocation, leaks, the audit log. In this process, for speed."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from keyproxy import cli
from keyproxy.auth.api_key import KeyFormat
from tests.acceptance.conftest import Output, Site


class _Terminal(io.TextIOWrapper):
    """A stdin that is a terminal."""

    def isatty(self) -> bool:
        return True


class Shell:
    """Runs commands in this process, as `main` does when stdin is not a terminal."""

    def __init__(self, config: Path, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._config = config
        self._capture = capture
        self._monkeypatch = monkeypatch
        self.is_terminal = False

    def run(self, *arguments: str, stdin: str = "") -> Output:
        """Run one command."""
        typed = _Terminal if self.is_terminal else io.TextIOWrapper
        self._monkeypatch.setattr(sys, "stdin", typed(io.BytesIO(stdin.encode())))
        status = cli.main([*arguments, "--config", str(self._config)])
        out, err = self._capture.readouterr()
        return Output(status, out, err)

    def run_json(self, *arguments: str, stdin: str = "") -> Any:
        """Run one command that must succeed and print only its JSON."""
        output = self.run(*arguments, "--json", stdin=stdin)
        assert (output.status, output.err) == (0, "")
        return output.json

    def refused(self, *arguments: str, status: int = 1, stdin: str = "") -> str:
        """Run one command that must fail with one line of error; returns the line."""
        output = self.run(*arguments, stdin=stdin)
        assert (output.status, output.out) == (status, "")
        if status == 1:
            (line,) = output.err.splitlines()
            assert line.startswith("keyproxy: ")
            return line.removeprefix("keyproxy: ")
        return output.err


@pytest.fixture
def shell(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell over this test's database."""
    for name in [name for name in site.environment if name.startswith("KEYPROXY_")]:
        monkeypatch.delenv(name)
    return Shell(site.config, capsys, monkeypatch)


@pytest.fixture
def key(shell: Shell) -> dict[str, Any]:
    """A key of user u_42 of tenant acme."""
    shell.run_json("tenant", "create", "acme")
    shell.run_json("user", "create", "u_42", "--tenant", "acme", "--no-key")
    key: dict[str, Any] = shell.run_json("key", "issue", "--user", "u_42", "--scope", "jobs:write", "--name", "n")
    return key


def _seconds_until(text: str) -> float:
    return (datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds()


# -- plans


def test_a_plan_is_set_shown_listed_and_deleted(shell: Shell) -> None:
    made = shell.run_json(
        "plan",
        "set",
        "basic",
        "--rate",
        "3000/min",
        "--burst",
        "100",
        "--concurrency",
        "8",
        "--requests-per-day",
        "10",
        "--requests-per-month",
        "20",
        "--tokens-per-request",
        "30",
        "--tokens-per-day",
        "40",
        "--tokens-per-month",
        "50",
    )
    limits = {
        "rate": 50.0, "burst": 100, "concurrency": 8, "requests_per_day": 10, "requests_per_month": 20,
        "tokens_per_request": 30, "tokens_per_day": 40, "tokens_per_month": 50,
    }  # fmt: skip
    assert (made["id"], made["limits"]) == ("basic", limits)
    assert shell.run_json("plan", "show", "basic")["limits"] == limits
    assert shell.run_json("plan", "set", "basic", "--replace", "--requests-per-day", "0")["limits"] == {
        "requests_per_day": 0
    }
    assert [plan["id"] for plan in shell.run_json("plan", "list")] == ["basic"]
    assert re.search(r"(?m)^requests/day +0$", shell.run("plan", "show", "basic").out)
    assert shell.run_json("plan", "delete", "basic", "--yes") == {"id": "basic", "deleted": True}
    assert shell.run_json("plan", "list") == []


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("plan", "set", "p", "--rate", "fast"), 2, "is no rate"),
        (("plan", "set", "p", "--burst", "5"), 1, "burst: means nothing without a rate"),
        (("plan", "set", "p", "--requests-per-day", "-1"), 2, "requests-per-day"),
        (("plan", "set", "two words"), 1, "an id starts with"),
        (("plan", "show", "p"), 1, "there is no plan 'p'"),
        (("plan", "delete", "p", "--yes"), 1, "there is no plan 'p'"),
        (("key", "issue", "--user", "u_42", "--plan", "p"), 1, "there is no plan 'p'"),
        (("user", "create", "u_1", "--tenant", "acme", "--plan", "p"), 1, "there is no plan 'p'"),
        (("tenant", "create", "other", "--plan", "p"), 1, "there is no plan 'p'"),
        (("tenant", "set-plan", "acme", "p"), 1, "there is no plan 'p'"),
        (("user", "set-plan", "u_42", "p", "--none"), 2, "pass one plan"),
        (("user", "set-plan", "u_42"), 2, "pass one plan"),
        (("user", "set-plan", "nobody", "--none"), 1, "there is no user 'nobody'"),
        (("tenant", "disable", "nobody"), 1, "there is no tenant 'nobody'"),
        (("key", "rotate", "key_x"), 1, "there is no key 'key_x'"),
        (("key", "rotate", "key_x", "--grace", "soon"), 2, "not a duration"),
        (("key", "list", "--state", "lost"), 2, "lost"),
        (("key", "stale"), 2, "--unused"),
        (("key", "report-leaked", "--digest", "xyz"), 2, "hexadecimal"),
        (("key", "report-leaked", "--digest", "00"), 1, "32 bytes"),
        (("key", "report-leaked", "--digest", "00" * 32), 1, "there is no such key"),
        (("key", "report-leaked"), 1, "stdin is empty"),
        (("key", "report-leaked", "-"), 1, "stdin is empty"),
        (("key", "report-leaked", "found.txt"), 2, "reads stdin"),
        (("key", "report-leaked", "-", "--digest", "00" * 32), 2, "either - or --digest"),
        (("key", "import", "-", "--map", "-"), 2, "only one of FILE and --map"),
        (("key", "whose", "key_x"), 1, "there is no such key"),
        (("key", "set-scopes", "key_x", "--scope", "a"), 1, "there is no key 'key_x'"),
        (("key", "set-scopes", "key_x"), 2, "--none"),
        (("plan", "set", "p", "--tokens-per-day", "9" * 30), 2, "the number is too large"),
        (("plan", "set", "p", "--tokens-per-day", str(10**15)), 2, "the number is too large"),
        (("plan", "set", "p", "--rate", "9" * 30), 2, "too large a rate"),
        (("plan", "set", "p", "--limit", "tokens"), 2, "write a limit as tokens/day=1000000, spend/month=50.00"),
        (("plan", "set", "p", "--limit", "weather/day=1"), 2, "there are requests, tokens, spend"),
        (("plan", "set", "p", "--limit", "tokens/year=1"), 2, "must be per minute, hour, day, week, month, request"),
        (("plan", "set", "p", "--limit", "tokens/day=1.5"), 2, "'1.5' is neither a whole number"),
        (
            ("plan", "set", "p", "--limit", "tokens/day@color:red=1"),
            2,
            "a selector is model:NAME, route:NAME, mode:live",
        ),
        (("plan", "set", "p", "--limit", "spend/day=0.0000001"), 2, "up to six places, such as 50.00"),
        (("plan", "set", "p", "--limit", "tokens/day=1", "--tokens-per-day", "2"), 2, "tokens/day is given twice"),
        (("plan", "set", "p", "--limit", "tokens/day=1", "--limit", "tokens/day=none"), 2, "is given twice"),
        (("key", "stale", "--unused", "9" * 30 + "d"), 2, "is too long"),
        (("key", "stale", "--unused", "999999999d"), 2, "is too long"),
        (("audit", "list", "--since", "yesterday"), 2, "is not a time"),
    ],
)
@pytest.mark.usefixtures("key")
def test_errors_have_a_message_and_an_exit_status(
    shell: Shell, arguments: tuple[str, ...], status: int, sentence: str
) -> None:
    assert sentence in shell.refused(*arguments, status=status)


@pytest.mark.usefixtures("key")
def test_plans_are_assigned_and_removed_and_one_in_use_cannot_be_deleted(shell: Shell, key: dict[str, Any]) -> None:
    for name in ("basic", "sandbox"):
        shell.run_json("plan", "set", name)
    assert shell.run_json("tenant", "set-plan", "acme", "basic")["plan"] == "basic"
    assert shell.run_json("tenant", "set-plan", "acme", "--plan", "sandbox", "--test")["test_plan"] == "sandbox"
    user = shell.run_json("user", "set-plan", "u_42", "sandbox", "--test")
    assert (user["plan"], user["test_plan"]) == (None, "sandbox")
    assert shell.run_json("user", "set-plan", "u_42", "basic")["plan"] == "basic"
    assert shell.run_json("key", "set-plan", key["id"], "basic")["plan"] == "basic"
    assert "assigned to 1 tenant and 1 user and 1 key" in shell.refused("plan", "delete", "basic", "--yes")
    for arguments in (("tenant", "set-plan", "acme"), ("user", "set-plan", "u_42"), ("key", "set-plan", key["id"])):
        assert shell.run_json(*arguments, "--none")["plan"] is None
    shell.run_json("plan", "delete", "basic", "--yes")


@pytest.mark.usefixtures("key")
def test_objects_created_with_a_plan_have_it(shell: Shell) -> None:
    shell.run_json("plan", "set", "basic", "--requests-per-day", "5")
    assert shell.run_json("tenant", "create", "other", "--plan", "basic")["plan"] == "basic"
    assert shell.run_json("user", "create", "u_1", "--tenant", "acme", "--plan", "basic")["plan"] == "basic"
    assert shell.run_json("key", "issue", "--user", "u_42", "--plan", "basic")["plan"] == "basic"


# -- disabled, rotated, revoked


def test_a_disabled_user_can_be_enabled(shell: Shell, key: dict[str, Any]) -> None:
    for kind, name in (("tenant", "acme"), ("user", "u_42")):
        assert shell.run_json(kind, "disable", name)["disabled_at"] is not None
        assert shell.run_json("key", "show", key["id"])["state"] == "disabled"
        assert shell.run_json(kind, "enable", name)["disabled_at"] is None
        assert shell.run_json("key", "show", key["id"])["state"] == "active"


def test_a_key_is_rotated_with_grace(shell: Shell, key: dict[str, Any]) -> None:
    new = shell.run_json("key", "rotate", key["id"], "--grace", "2h")
    assert (new["replaces"], new["scopes"], new["name"]) == (key["id"], ["jobs:write"], "n")
    assert new["secret"].startswith("kp_live_")
    assert abs(_seconds_until(new["old_expires_at"]) - 7200) < 60
    assert abs(_seconds_until(new["expires_at"]) - 90 * 86_400) < 60
    assert [one["id"] for one in shell.run_json("key", "list", "--state", "retiring")] == [key["id"]]
    assert f"was rotated already: '{new['id']}' replaces it" in shell.refused("key", "rotate", key["id"])
    last = shell.run_json("key", "rotate", new["id"], "--grace", "0s", "--expires-in", "7d")
    assert abs(_seconds_until(last["expires_at"]) - 7 * 86_400) < 60
    assert "has expired" in shell.refused("key", "rotate", new["id"])
    shell.run_json("key", "revoke", last["id"], "--reason", "done")
    assert "was revoked" in shell.refused("key", "rotate", last["id"])


def test_the_default_grace_is_a_day(shell: Shell, key: dict[str, Any]) -> None:
    assert abs(_seconds_until(shell.run_json("key", "rotate", key["id"])["old_expires_at"]) - 86_400) < 60


# -- a leak


@pytest.mark.parametrize("by", ["key", "key on stdin by name", "digest on stdin", "digest"])
def test_a_leaked_key_is_revoked_and_its_owner_printed(shell: Shell, key: dict[str, Any], by: str) -> None:
    digest = hashlib.sha256(key["secret"].encode()).hexdigest()
    stdin = "" if by == "digest" else digest.upper() if by == "digest on stdin" else key["secret"] + "\n"
    options = {"digest": ("--digest", digest), "key on stdin by name": ("-",)}.get(by, ())
    shown = shell.run_json("key", "report-leaked", "--reason", "on a page", *options, stdin=stdin)
    found = {"key": key["id"], "user": "u_42", "tenant": "acme", "revoked_now": True}
    assert shown == {"found": [found], "incomplete": 0, "unknown": 0}
    shown = shell.run_json("key", "show", key["id"])
    assert (shown["state"], shown["revoke_reason"]) == ("revoked", "on a page")


@pytest.mark.usefixtures("key")
def test_no_key_an_incomplete_one_and_an_unknown_one_are_distinguished_and_never_repeated(shell: Shell) -> None:
    unknown = KeyFormat().make(bytes(32), is_test=False).reveal().decode()
    cases = (
        ("nothing of interest here", 0, 0, "there is no key in this text"),
        ("", 0, 0, "there is no key in this text: stdin is empty"),
        (unknown[:-1], 1, 0, "1 key is incomplete or mistyped"),
        ("kp_live_" + "x" * 49, 1, 0, "1 key is incomplete or mistyped"),
        (unknown, 0, 1, "there is no such key"),
        (f"KEY={unknown}\nOTHER='{unknown[:20]}'", 0, 1, "there is no such key"),
        ("Authorization: Bearer abcdEFGH.0123456789abcdefABCDEF0123456789", 0, 1, "there is no such key"),
        ("abcdEFGH.0123456789abcdefABCDEF0123456789", 0, 1, "there is no such key"),
    )
    for text, incomplete, absent, sentence in cases:
        output = shell.run("key", "report-leaked", "--json", stdin=text)
        assert (output.status, len(output.err.splitlines())) == (1, 1)
        assert sentence in output.err
        if text:
            assert output.json == {"found": [], "incomplete": incomplete, "unknown": absent}
            assert text not in output.out + output.err


def test_every_key_of_a_pasted_text_is_revoked_and_one_revoked_before_is_marked(
    shell: Shell, key: dict[str, Any]
) -> None:
    more = [shell.run_json("key", "issue", "--user", "u_42") for _ in range(3)]
    header, quoted, wrapped = (one["secret"] for one in more)
    text = (
        f'Authorization: Api-Key {header}\nexport KEY="{quoted}";\n> {wrapped[:30]}=\n> {wrapped[30:]}\n{key["hint"]}'
    )
    shell.run_json("key", "revoke", more[0]["id"])
    output = shell.run("key", "report-leaked", "--json", stdin=text)
    assert output.status == 0
    assert {one["key"]: one["revoked_now"] for one in output.json["found"]} == {
        one["id"]: one is not more[0] for one in more
    }
    assert output.json["incomplete"] == 1
    assert "1 key is incomplete" in output.err
    assert {one["id"]: one["state"] for one in shell.run_json("key", "list")} == {
        key["id"]: "active",
        **{one["id"]: "revoked" for one in more},
    }
    too_long = shell.refused("key", "report-leaked", stdin="x" * (1 << 20))
    assert "512 KiB" in too_long


def test_whose_shows_the_owner_of_a_key_without_revoking_it(shell: Shell, key: dict[str, Any]) -> None:
    other = shell.run_json("key", "issue", "--user", "u_42", "--name", "nightly", "--test")
    cut = key["secret"][:20]
    for text, stdin, found in (
        ("-", f"X-Api-Key: {key['secret']}\n{other['secret']}", {key["id"], other["id"]}),
        (key["hint"], "", {key["id"]}),
        (key["hint"].replace("…", "..."), "", {key["id"]}),
        ("…" + key["hint"][-4:], "", {key["id"]}),
        ("-", cut, {key["id"]}),
        (key["id"], "", {key["id"]}),
        ("nightly", "", {other["id"]}),
    ):
        shown = shell.run_json("key", "whose", text, stdin=stdin)
        assert {one["id"] for one in shown["keys"]} == found
        assert all((one["user"], one["tenant"], one["state"]) == ("u_42", "acme", "active") for one in shown["keys"])
    seen = shell.run("key", "whose", key["secret"], "--json")
    assert [one["id"] for one in seen.json["keys"]] == [key["id"]]
    assert "can be seen by other users" in seen.err
    assert key["secret"] not in seen.out + seen.err
    for nothing in ("kp_live_", "…", "no such name"):
        absent = shell.run("key", "whose", nothing, "--json")
        assert (absent.status, absent.json) == (1, {"keys": []})


# -- scopes that change


def test_scopes_of_a_key_are_replaced_and_logged(shell: Shell, key: dict[str, Any]) -> None:
    shown = shell.run_json("key", "set-scopes", key["id"], "--scope", "a", "--scope", "b", "--scope", "a")
    assert shown["scopes"] == ["a", "b"]
    (row,) = shell.run_json("audit", "list", "--entity", "key", "--id", key["id"], "--action", "update")
    assert (row["changed"], row["after"]["scopes"]) == (["scopes"], ["a", "b"])
    assert shell.run_json("key", "set-scopes", key["id"], "--none")["scopes"] == []


# -- roles, ceilings and owned ids


def test_a_role_is_set_shown_listed_and_deleted(shell: Shell) -> None:
    made = shell.run_json("role", "set", "reader", "--scope", "jobs:read", "--scope", "models:read")
    assert (made["id"], made["scopes"], made["created"]) == ("reader", ["jobs:read", "models:read"], True)
    assert shell.run_json("role", "set", "reader", "--scope", "jobs:read")["scopes"] == ["jobs:read"]
    assert shell.run_json("role", "set", "nothing", "--none")["scopes"] == []
    assert [one["id"] for one in shell.run_json("role", "list")] == ["nothing", "reader"]
    assert shell.run_json("role", "show", "reader")["keys"] == 0
    assert "--scope" in shell.refused("role", "set", "reader", status=2)
    assert "Reader" in shell.refused("role", "set", "Reader", "--none", status=2)
    assert shell.refused("role", "delete", "reader") == "this cannot be undone, and stdin is not a terminal: pass --yes"
    assert shell.run_json("role", "delete", "reader", "--yes") == {"id": "reader", "deleted": True}
    assert shell.refused("role", "show", "reader") == "there is no role 'reader'"


def test_keys_users_and_tenants_get_roles(shell: Shell, key: dict[str, Any]) -> None:
    shell.run_json("role", "set", "reader", "--scope", "jobs:read")
    shell.run_json("role", "set", "writer", "--scope", "jobs:write")
    issued = shell.run_json("key", "issue", "--user", "u_42", "--role", "reader", "--role", "writer")
    assert (issued["scopes"], issued["roles"]) == ([], ["reader", "writer"])
    assert shell.run_json("key", "show", issued["id"])["roles"] == ["reader", "writer"]
    assert {one["id"]: one["roles"] for one in shell.run_json("key", "list")} == {
        key["id"]: [], issued["id"]: ["reader", "writer"],
    }  # fmt: skip
    assert "reader writer" in shell.run("key", "list").out
    assert shell.run_json("key", "rotate", issued["id"])["roles"] == ["reader", "writer"]
    assert shell.run_json("key", "set-roles", key["id"], "--role", "reader")["roles"] == ["reader"]
    assert shell.run_json("key", "set-roles", key["id"], "--none")["roles"] == []
    for group, name in (("user", "u_42"), ("tenant", "acme")):
        assert shell.run_json(group, "set-roles", name, "--role", "reader", "--role", "writer")["roles"] == [
            "reader", "writer",
        ]  # fmt: skip
        assert shell.run_json(group, "show", name)["roles"] == ["reader", "writer"]
        assert shell.run_json(group, "set-roles", name, "--none")["roles"] == []
        assert shell.run_json(group, "set-roles", name, "--no-ceiling")["roles"] is None
        shell.refused(group, "set-roles", name, status=2)
        shell.refused(group, "set-roles", name, "--none", "--no-ceiling", status=2)
        assert shell.refused(group, "set-roles", name, "--role", "x") == "there is no role 'x': create it first"
    assert shell.refused("key", "issue", "--user", "u_42", "--role", "x") == "there is no role 'x': create it first"
    assert shell.refused("key", "set-roles", key["id"], "--role", "x") == "there is no role 'x': create it first"
    shell.refused("key", "set-roles", key["id"], status=2)
    assert shell.refused("role", "delete", "reader", "--yes") == (
        "role 'reader' is assigned to 2 keys: assign other roles first"
    )


def test_many_keys_get_roles_from_the_table_or_the_option(shell: Shell, key: dict[str, Any]) -> None:
    del key
    shell.run_json("role", "set", "reader", "--scope", "a")
    shell.run_json("role", "set", "writer", "--scope", "b")
    table = "user,name,roles\nu_42,one,reader writer\nu_42,two,\n"
    lines = shell.run("key", "issue-many", "-", "--role", "reader", "--json", stdin=table).out.splitlines()
    assert [json.loads(line)["roles"] for line in lines] == [["reader", "writer"], ["reader"]]
    digests = f"user,digest,id,roles\nu_42,{'01' * 32},k1,writer\nu_42,{'02' * 32},k2,\nu_42,{'03' * 32},k3,missing\n"
    printed = shell.run("key", "import", "-", "--role", "reader", "--json", stdin=digests)
    assert printed.status == 1
    assert [one["problem"] for one in printed.json["problems"]] == ["there is no role 'missing'"]
    assert [shell.run_json("key", "show", name)["roles"] for name in ("k1", "k2")] == [["writer"], ["reader"]]


def test_scopes_above_a_ceiling_are_warned_of(shell: Shell, key: dict[str, Any]) -> None:
    shell.run_json("role", "set", "reader", "--scope", "jobs:read")
    shell.run_json("tenant", "set-roles", "acme", "--role", "reader")
    warning = "keyproxy: warning: above the ceiling of tenant 'acme' and without effect: jobs:write\n"
    for arguments in (
        ("key", "set-scopes", key["id"], "--scope", "jobs:write"),
        ("key", "issue", "--user", "u_42", "--scope", "jobs:write"),
        ("user", "create", "u_43", "--tenant", "acme", "--scope", "jobs:write"),
    ):
        printed = shell.run(*arguments, "--json")
        assert (printed.status, printed.err) == (0, warning)
        assert "warnings" not in printed.json
    assert shell.run("key", "set-scopes", key["id"], "--scope", "jobs:read").err == ""


def test_a_token_for_a_tenant_without_a_ceiling_is_warned_of(shell: Shell, key: dict[str, Any]) -> None:
    del key
    arguments = ("admin", "token", "create", "--scope", "keys:write", "--scope", "tenant:acme", "--json")
    printed = shell.run(*arguments)
    assert printed.status == 0
    assert printed.err.startswith("keyproxy: warning: tenant 'acme' has no ceiling")
    assert "warnings" not in printed.json
    shell.run_json("tenant", "set-roles", "acme", "--none")
    assert shell.run(*arguments).err == ""
    assert shell.run("admin", "token", "create", "--scope", "keys:write", "--json").err == ""


def test_a_token_that_issues_no_keys_is_not_warned_of_a_missing_ceiling(shell: Shell, key: dict[str, Any]) -> None:
    del key
    scopes = ("--scope", "approvals:read", "--scope", "approvals:write", "--scope", "tenant:acme")
    printed = shell.run("admin", "token", "create", *scopes, "--json")
    assert (printed.status, printed.err) == (0, "")


def test_owned_ids_are_added_listed_and_removed(shell: Shell, key: dict[str, Any]) -> None:
    del key
    shell.run_json("tenant", "create", "globex")
    made = shell.run_json("owned", "add", "collection", "acme/docs", "--tenant", "acme")
    assert (made["kind"], made["id"], made["tenant"], made["created"]) == ("collection", "acme/docs", "acme", True)
    shell.run_json("owned", "add", "model", "ft:1", "--tenant", "globex")
    assert [(one["kind"], one["id"]) for one in shell.run_json("owned", "list")] == [
        ("collection", "acme/docs"), ("model", "ft:1"),
    ]  # fmt: skip
    assert [one["id"] for one in shell.run_json("owned", "list", "--tenant", "globex")] == ["ft:1"]
    assert [one["id"] for one in shell.run_json("owned", "list", "--kind", "collection")] == ["acme/docs"]
    assert shell.run_json("owned", "show", "model", "ft:1")["tenant"] == "globex"
    for command in ("add", "remove"):
        assert shell.refused("owned", command, "model", "ft:1", "--tenant", "acme") == (
            "model 'ft:1' belongs to tenant 'globex'"
        )
    assert "segments" in shell.refused("owned", "add", "model", "a/../b", "--tenant", "acme")
    assert shell.run_json("owned", "remove", "model", "ft:1", "--tenant", "globex")["deleted"] is True
    assert shell.refused("owned", "remove", "model", "ft:1", "--tenant", "globex") == "there is no owned model 'ft:1'"


def test_explain_shows_roles_and_ceilings(shell: Shell, key: dict[str, Any]) -> None:
    shell.run_json("role", "set", "reader", "--scope", "jobs:read")
    shell.run_json("key", "set-roles", key["id"], "--role", "reader")
    shell.run_json("tenant", "set-roles", "acme", "--role", "reader")
    shown = shell.run_json("key", "explain", key["id"], "--path", "/v1/ai/jobs")
    assert (shown["key_scopes"], shown["roles"]) == (["jobs:write"], ["reader"])
    assert (shown["user_ceiling"], shown["tenant_ceiling"]) == (None, ["jobs:read"])
    assert shown["effective_scopes"] == ["jobs:read"]


# -- plans that change


def test_a_plan_keeps_the_limits_that_are_not_named_unless_it_is_replaced(shell: Shell) -> None:
    first = shell.run_json("plan", "set", "p", "--rate", "50/s", "--burst", "100", "--tokens-per-day", "7")
    assert (first["created"], first["changed"]["burst"]) == (True, {"old": None, "new": 100})
    second = shell.run_json("plan", "set", "p", "--burst", "200", "--concurrency", "3")
    assert second["limits"] == {"rate": 50.0, "burst": 200, "concurrency": 3, "tokens_per_day": 7}
    assert (second["created"], second["changed"]) == (
        False,
        {"burst": {"old": 100, "new": 200}, "concurrency": {"old": None, "new": 3}},
    )
    third = shell.run_json("plan", "set", "p", "--tokens-per-day", "none")
    assert third["changed"] == {"tokens_per_day": {"old": 7, "new": None}}
    assert "burst: means nothing without a rate" in shell.refused("plan", "set", "p", "--rate", "none")
    again = shell.run("plan", "set", "p", "--burst", "200")
    assert (again.status, again.err) == (0, "keyproxy: plan 'p' already has these limits: nothing was changed\n")
    shown = shell.run("plan", "set", "p", "--burst", "300")
    assert shown.out == "request-rate: 50/s:200 -> 50/s:300\n"
    for command in (("plan", "show", "p"), ("plan", "list")):
        assert re.search(r"request-rate[= ] *50/s:300\s", shell.run(*command).out)
    last = shell.run_json("plan", "set", "p", "--replace", "--requests-per-month", "5")
    assert last["limits"] == {"requests_per_month": 5}
    assert last["changed"]["rate"] == {"old": 50.0, "new": None}


def test_a_limit_of_any_kind_is_set_changed_and_removed_by_name(shell: Shell) -> None:
    made = shell.run(
        "plan", "set", "basic", "--limit", "tokens/day=1000000", "--limit", "spend/month=50.00", "--rate", "50/s",
    )  # fmt: skip
    assert made.out == "tokens/day: none -> 1000000\nspend/month: none -> 50.00\nrequest-rate: none -> 50/s\n"
    changed = shell.run("plan", "set", "basic", "--limit", "tokens/day=2000000")
    assert (changed.status, changed.out, changed.err) == (0, "tokens/day: 1000000 -> 2000000\n", "")
    selected = shell.run_json(
        "plan", "set", "basic", "--limit", "spend/month=none", "--limit", "tokens/week@mode:test,model:gpt-4o=7",
    )  # fmt: skip
    assert selected["limits"] == [
        {"measure": "tokens", "per": "day", "amount": 2000000},
        {"measure": "tokens", "per": "week", "amount": 7, "model": "gpt-4o", "mode": "test"},
        {"measure": "request-rate", "per": "second", "amount": 50},
    ]
    assert selected["changed"] == {
        "spend_per_month": {"old": 50_000_000, "new": None},
        "tokens_per_week@mode:test,model:gpt-4o": {"old": None, "new": 7},
    }
    shown = shell.run("plan", "show", "basic").out
    assert re.search(r"(?m)^tokens/week@mode:test,model:gpt-4o +7$", shown)
    assert "tokens/week@mode:test,model:gpt-4o=7" in shell.run("plan", "list").out
    removed = shell.run("plan", "set", "basic", "--limit", "request-rate=none", "--limit", "token-rate=6000/min:100")
    assert removed.out == "token-rate: none -> 6000/min:100\nrequest-rate: 50/s -> none\n"
    replaced = shell.run("plan", "set", "basic", "--replace", "--limit", "spend/request=0.000001")
    assert "spend/request: none -> 0.000001\n" in replaced.out
    assert shell.run_json("plan", "show", "basic")["limits"] == [{"measure": "spend", "per": "request", "amount": 1}]


def test_a_window_is_credited_and_adjusted_with_a_reason(shell: Shell, key: dict[str, Any]) -> None:
    shell.run_json("plan", "set", "p", "--limit", "tokens/day=1000", "--limit", "spend/month@model:gpt-4o=50.00")
    shell.run_json("user", "set-plan", "u_42", "p")
    credit = ("usage", "credit", "--user", "u_42", "--reason", "ticket 811")
    made = shell.run_json(*credit, "--limit", "tokens/day", "--amount", "500")
    assert (made["credited"], made["total"], made["mode"]) == (500, 1500, "live")
    adjusted = shell.run_json(
        "usage", "adjust", "--user", "u_42", "--limit", "tokens/day", "--amount", "-200", "--reason", "credited twice",
    )  # fmt: skip
    assert (adjusted["amount"], adjusted["credited"]) == (-200, 300)
    money = ("--limit", "spend/month@model:gpt-4o", "--amount", "25.5")
    assert shell.run_json(*credit, *money, "--test")["credited"] == 25_500_000
    shown = shell.run(*credit, *money)
    assert re.search(r"(?m)^total +75.50$", shown.out)
    assert "the limit is 75.50 until" in shown.err
    listed = shell.run("usage", "windows", "--user", "u_42").out
    assert re.search(r"u_42 +user.tokens_per_day +- +1000 +300 +0 +0 +0 +1300 ", listed)
    assert re.search(r"u_42 +user.spend_per_month +model:gpt-4o +50.00 +25.50 +0.00 ", listed)
    rows = shell.run_json("audit", "list", "--entity", "window")
    assert [(row["action"], row["after"]["amount"], row["after"]["reason"]) for row in rows[2:]] == [
        ("window.credit", -200, "credited twice"),
        ("window.credit", 500, "ticket 811"),
    ]
    assert rows[0]["actor"].startswith("cli:")
    for arguments, status, sentence in (
        ((*credit, "--limit", "tokens/day", "--amount", "0"), 2, "'0' must be more than 0"),
        ((*credit, "--limit", "tokens/day", "--amount", "-5"), 2, "`keyproxy usage adjust` subtracts"),
        ((*credit, "--limit", "tokens/day", "--amount", "1.5"), 2, "'1.5' is not a whole number, such as 500000"),
        ((*credit, "--limit", "spend/month", "--amount", "1e3"), 2, "is not an amount with up to six places"),
        ((*credit, "--limit", "weather", "--amount", "5"), 2, "name a limit of the plan, such as tokens/day"),
        ((*credit, "--limit", "tokens/week", "--amount", "5"), 1, "has no limit tokens/week for live traffic"),
        ((*credit, "--limit", "tokens/request", "--amount", "5"), 1, "tokens/request has no window to credit"),
        ((*credit, "--key", key["id"], "--limit", "tokens/day", "--amount", "5"), 2, "exactly one of --user, --tenant"),
        (("usage", "credit", "--user", "u_42", "--limit", "tokens/day", "--amount", "5"), 2, "--reason"),
        (("usage", "adjust", "--user", "u_42", "--limit", "tokens/day", "--amount", "-1301", "--reason", "r"), 1,
         "must stay from 0"),
    ):  # fmt: skip
        assert sentence in shell.refused(*arguments, status=status)


def test_a_limit_per_request_above_a_window_is_warned_of(shell: Shell) -> None:
    shown = shell.run("plan", "set", "p", "--tokens-per-request", "500", "--tokens-per-day", "100")
    assert shown.status == 0
    assert shown.err.splitlines()[0] == (
        "keyproxy: warning: tokens/request=500 exceeds tokens/day=100: requests that reserve all of it, such as tunnels"
        " and requests without a maximum, are always refused"
    )
    assert "warning" not in shell.run("plan", "set", "p", "--tokens-per-day", "500").err


# -- lists


def test_keys_are_listed_by_use_age_and_expiry(shell: Shell, key: dict[str, Any]) -> None:
    test = shell.run_json("key", "issue", "--user", "u_42", "--test", "--expires-in", "1d")
    listings: tuple[tuple[tuple[str, ...], list[str]], ...] = (
        (("--sort", "expires"), [test["id"], key["id"]]),
        (("--sort", "created", "--live"), [key["id"]]),
        (("--test",), [test["id"]]),
        (("--expires-within", "7d"), [test["id"]]),
        (("--older-than", "1d"), []),
    )
    for options, ids in listings:
        assert [one["id"] for one in shell.run_json("key", "list", *options)] == ids
    assert shell.run_json("key", "stale", "--unused", "30d") == []


def test_a_scope_that_no_route_requires_causes_a_warning(shell: Shell, site: Site, key: dict[str, Any]) -> None:
    with site.config.open("a", encoding="utf-8") as file:
        file.write('[[routes]]\nmatch = "POST /v1/ai/jobs"\nscopes = ["jobs:write"]\n')
    output = shell.run("key", "issue", "--user", "u_42", "--scope", "jobs:write", "--scope", "jobs:wirte", "--json")
    assert (output.status, output.json["scopes"]) == (0, ["jobs:write", "jobs:wirte"])
    assert output.err == "keyproxy: warning: no route requires the scope 'jobs:wirte'\n"
    assert key["scopes"] == ["jobs:write"]


def test_a_key_that_every_route_refuses_is_warned_of(shell: Shell, site: Site, key: dict[str, Any]) -> None:
    with site.config.open("a", encoding="utf-8") as file:
        file.write('[[routes]]\nmatch = "POST /v1/ai/jobs"\nscopes = ["jobs:write"]\n')
    rows = "user,name,scopes\nu_42,a,jobs:write\nu_42,b,\nu_42,c,\n"
    warning = (
        "keyproxy: warning: the key has no scopes and every route requires one: all its requests will be refused\n"
    )
    for arguments, stdin in (
        (("key", "issue", "--user", "u_42"), ""),
        (("user", "create", "u_7", "--tenant", "acme"), ""),
        (("key", "issue-many", "-"), rows),
        (("key", "import", "-"), f"digest,user\n{'0' * 64},u_42\n"),
        (("key", "set-scopes", key["id"], "--none"), ""),
    ):
        output = shell.run(*arguments, "--json", stdin=stdin)
        assert (output.status, output.err) == (0, warning)
    assert shell.run("user", "create", "u_8", "--tenant", "acme", "--no-key", "--json").err == ""
    assert shell.run("key", "issue", "--user", "u_42", "--scope", "jobs:write", "--json").err == ""


# -- the audit log


def test_every_act_of_the_lifecycle_is_in_the_audit_log(shell: Shell, key: dict[str, Any]) -> None:
    shell.run_json("plan", "set", "basic", "--requests-per-day", "5")
    shell.run_json("user", "set-plan", "u_42", "basic")
    shell.run_json("tenant", "disable", "acme")
    shell.run_json("tenant", "enable", "acme")
    new = shell.run_json("key", "rotate", key["id"])
    shell.run_json("key", "revoke", new["id"], "--reason", "lost")
    shell.run_json("key", "report-leaked", stdin=key["secret"])
    shell.run_json("tenant", "delete", "acme", "--yes")
    rows = shell.run_json("audit", "list", "--limit", "50")
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), reverse=True)
    shown = {(row["action"], row["entity"], row["entity_id"], *row["changed"]) for row in rows}
    assert shown >= {
        ("insert", "plan", "basic"),
        ("update", "user", "u_42", "plan_id"),
        ("update", "tenant", "acme", "disabled_at"),
        ("insert", "key", new["id"]),
        ("update", "key", key["id"], "expires_at"),
        ("update", "key", new["id"], "revoke_reason", "revoked_at"),
        ("update", "key", key["id"], "revoke_reason", "revoked_at"),
        ("delete", "tenant", "acme"),
        ("delete", "user", "u_42"),
        ("delete", "key", key["id"]),
    }
    assert all(row["actor"].startswith("cli:") and row["origin"] for row in rows)
    text = json.dumps(rows)
    assert key["secret"] not in text
    assert new["secret"][12:-4] not in text
    assert len(shell.run_json("audit", "list", "--limit", "3")) == 3
    assert {row["entity_id"] for row in shell.run_json("audit", "list", "--entity", "key", "--id", new["id"])} == {
        new["id"]
    }
    assert shell.run_json("audit", "list", "--until", "1d") == []
    assert shell.run_json("audit", "list", "--tenant", "acme", "--since", "1h", "--action", "delete") != []


def test_the_audit_log_is_exported_completely_and_resumes(shell: Shell, tmp_path: Path, key: dict[str, Any]) -> None:
    printed = shell.run("audit", "export").out.splitlines()
    assert shell.run("audit", "export", "--output", "-").out.splitlines() == printed
    assert [json.loads(line)["entity"] for line in printed] == ["tenant", "user", "key"]
    file = tmp_path / "audit.jsonl"
    assert shell.run("audit", "export", "--output", str(file)).err == f"keyproxy: 3 rows added to {file}\n"
    assert file.read_text("utf-8").splitlines() == printed
    shell.run_json("key", "revoke", key["id"])
    # The previous run was interrupted while it wrote the last row.
    with file.open("a", encoding="utf-8") as cut_off:
        cut_off.write('{"id":99,"at"')
    assert shell.run("audit", "export", "--output", str(file)).status == 0
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [row["action"] for row in rows] == ["insert", "insert", "insert", "update"]
    assert shell.run("audit", "export", "--after", str(rows[-1]["id"])).out == ""


@pytest.mark.parametrize("content", ["notes\n", "no newline", '{"id":1}\nnotes'])
def test_a_file_that_is_not_an_export_is_left_unchanged(shell: Shell, tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes"
    file.write_text(content)
    assert "not an audit log row" in shell.refused("audit", "export", "--output", str(file))
    assert file.read_text() == content


# -- for people


def test_completion_scripts_are_printed_for_each_shell(shell: Shell) -> None:
    for name in ("bash", "zsh", "fish"):
        output = cli.main(["completion", name])
        assert output == 0


def test_people_see_secrets_once_and_on_stdout_alone(shell: Shell, key: dict[str, Any]) -> None:
    output = shell.run("key", "rotate", key["id"])
    secret = next(line.split()[-1] for line in output.out.splitlines() if line.startswith("secret "))
    assert secret.startswith("kp_live_")
    assert secret not in output.err
    assert "only time" in output.err
    for arguments in (("key", "list"), ("audit", "list"), ("plan", "list"), ("tenant", "list"), ("user", "list")):
        listed = shell.run(*arguments)
        assert (listed.status, listed.err) == (0, "")
        assert secret not in listed.out


# -- many keys


@pytest.mark.usefixtures("key")
def test_many_keys_are_issued_from_a_table_and_a_second_run_issues_only_missing_ones(
    shell: Shell, tmp_path: Path
) -> None:
    shell.run_json("user", "create", "u_7", "--tenant", "acme", "--no-key")
    table = tmp_path / "wanted.csv"
    table.write_text("user,name,scopes,test\nu_42,nightly,,\nu_7,nightly,a b,true\n")
    output = shell.run("key", "issue-many", str(table), "--scope", "jobs:write", "--expires-in", "7d", "--json")
    assert (output.status, output.err) == (0, "")
    keys = [json.loads(line) for line in output.out.splitlines()]
    assert [(key["user"], key["scopes"], key["is_test"], key["secret"][:8]) for key in keys] == [
        ("u_42", ["jobs:write"], False, "kp_live_"),
        ("u_7", ["a", "b"], True, "kp_test_"),
    ]
    again = shell.run("key", "issue-many", "-", stdin=table.read_text() + "u_7,weekly,,\n")
    assert again.out.count("kp_live_") == 1
    assert "1 key issued, 2 already existed; this is the only time the secrets are shown" in again.err
    nothing = shell.run("key", "issue-many", str(table))
    assert (nothing.status, nothing.out) == (0, "")
    assert "0 keys issued, 2 already existed; if their secrets were lost: --reissue-unseen" in nothing.err
    assert "wanted.csv:2: the row has no user" in _refused_table(shell, table, "user,name\n,x\n")
    assert "there is no user 'nobody'" in _refused_table(shell, table, '{"user": "nobody"}\n')


def _refused_table(shell: Shell, table: Path, content: str) -> str:
    table.write_text(content)
    return shell.refused("key", "issue-many", str(table))


def test_keys_are_revoked_in_bulk_after_a_look_at_how_many(shell: Shell, key: dict[str, Any]) -> None:
    shell.run_json("user", "create", "u_7", "--tenant", "acme")
    assert shell.run_json("key", "revoke-all", "--tenant", "acme", "--dry-run")["would_revoke"] == 2
    assert shell.run_json("key", "revoke-all", "--tenant", "acme", "--older-than", "1d", "--yes") == {"revoked": 0}
    assert shell.run_json("key", "revoke-all", "--user", "u_42", "--reason", "laptop stolen", "--yes") == {"revoked": 1}
    assert shell.run_json("key", "show", key["id"])["revoke_reason"] == "laptop stolen"
    assert shell.run_json("key", "revoke-all", "--tenant", "acme", "--yes") == {"revoked": 1}
    assert "select the keys to revoke" in shell.refused("key", "revoke-all", status=2)
    assert "there is no user 'nobody'" in shell.refused("key", "revoke-all", "--user", "nobody")


@pytest.mark.usefixtures("key")
def test_the_table_of_djangorestframework_api_key_is_taken_over_after_a_dry_run(shell: Shell, tmp_path: Path) -> None:
    hashed = "sha512$$" + hashlib.sha512(b"Ab3dE6gH.secretsecret").hexdigest()
    table, owners = tmp_path / "keys.csv", tmp_path / "owners.csv"
    table.write_text(
        "id,created,name,revoked,expiry_date,hashed_key,prefix\n"
        f"Ab3dE6gH.{hashed},2024-01-02 03:04:05+00,worker,f,,{hashed},Ab3dE6gH\n"
        f"Zz3dE6gH.{hashed},2024-01-02 03:04:05+00,nobody's,f,,{hashed},Zz3dE6gH\n"
    )
    owners.write_text("worker,u_new\n")
    arguments = ("key", "import", str(table), "--map", str(owners), "--tenant", "acme", "--scope", "jobs:write")
    from_stdin = (*arguments[:4], "-", *arguments[5:], "--dry-run", "--json")
    assert shell.run(*from_stdin, stdin=owners.read_text()).json["imported"] == 1
    dry = shell.run(*arguments, "--dry-run", "--json")
    assert dry.status == 1
    problem = {"place": f"{table}:3", "problem": "the row has no user"}
    assert dry.json == {"dry_run": True, "imported": 1, "present": 0, "users": 1, "problems": [problem]}
    assert f"{table}:3: the row has no user" in dry.err
    assert len(shell.run_json("key", "list")) == 1
    table.write_text("\n".join(table.read_text().splitlines()[:2]) + "\n")
    assert shell.run_json(*arguments) == {"dry_run": False, "imported": 1, "present": 0, "users": 1, "problems": []}
    assert shell.run_json(*arguments)["present"] == 1
    (key,) = shell.run_json("key", "list", "--user", "u_new")
    assert (key["name"], key["created_at"], key["scopes"]) == ("worker", "2024-01-02T03:04:05Z", ["jobs:write"])
    (leaked,) = shell.run_json(
        "key", "report-leaked", stdin="curl -H 'Authorization: Api-Key Ab3dE6gH.secretsecret'\n"
    )["found"]
    assert (leaked["user"], leaked["key"], leaked["revoked_now"]) == ("u_new", key["id"], True)


@pytest.mark.usefixtures("key")
def test_digests_are_imported_from_json_lines_and_django_dumps(shell: Shell) -> None:
    lines = "".join(json.dumps({"digest": f"{n:064x}", "user": "u_42", "scopes": ["a"]}) + "\n" for n in range(3))
    assert shell.run_json("key", "import", "-", stdin=lines)["imported"] == 3
    dump = json.dumps([{"model": "x.apikey", "pk": "a$b", "fields": {"digest": "ab" * 32, "owner": "u_42"}}])
    assert shell.run_json("key", "import", "-", "--user-column", "owner", stdin=dump)["imported"] == 1
    for wrong in ("{not json", "user\n\x00\n", ""):
        output = shell.run("key", "import", "-", stdin=wrong)
        assert "Traceback" not in output.err


@pytest.mark.usefixtures("key")
def test_destructive_commands_without_a_terminal_need_yes(shell: Shell, key: dict[str, Any]) -> None:
    shell.run_json("plan", "set", "p")
    commands = (
        ("tenant", "delete", "acme"), ("user", "delete", "u_42"), ("key", "delete", key["id"]), ("plan", "delete", "p"),
        ("key", "revoke-all", "--user", "u_42"),
    )  # fmt: skip
    for command in commands:
        assert "pass --yes" in shell.refused(*command)
    assert [one["state"] for one in shell.run_json("key", "list")] == ["active"]
    assert shell.run_json("key", "revoke-all", "--user", "u_42", "--dry-run") == {"revoked": 0, "would_revoke": 1}


def test_files_without_valid_rows_are_refused_with_the_line_number(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "rows"
    cases = (
        ("", "1: the file is empty"),
        (" \n\n", "1: the file is empty"),
        ("user,name\n", "1: there are no rows below the header line"),
        ("\nDate,Amount\n2026,5\n", "2: the header line has no column"),
        ("user;name\nu_1;n\n", "1: the header line is separated by semicolons"),
        ("user,user\nu_1,u_2\n", "1: the header line names 'user' twice"),
        ("user,name\nu_42,a\nu_42,b,c\n", "3: the row has 3 fields, but the header line has 2"),
        ('user,name\nu_42,"a\n', "2: this is not valid CSV"),
        ('{"user": "u_42"}\n{"user" "u_42"}\n', "2: this is not valid JSON"),
        ('{"user": "u_42"}\n[1]\n', "2: this is not a JSON object"),
        ('[{"user": "u_42"}, 5]', "2: this is not a JSON object"),
        ("[]", "1: there are no rows"),
    )
    for text, sentence in cases:
        file.write_text(text)
        for command in ("issue-many", "import"):
            if command == "import" and "row has" in sentence:
                continue
            shown = shell.refused("key", command, str(file))
            assert f"{file}:" in shown
            if command == "issue-many":
                assert f"{file}:{sentence}" in shown
    file.write_bytes(b"user\nu_\xff\n")
    assert f"{file}:2: this is not UTF-8 text" in shell.refused("key", "issue-many", str(file))
    secret = KeyFormat().make(bytes(32), is_test=False).reveal().decode()
    file.write_text(f"{secret},a@b.c\n")
    assert secret[9:] not in shell.refused("key", "issue-many", str(file))
    good, owners = tmp_path / "good", tmp_path / "owners"
    good.write_text(f"digest\n{'0' * 64}\n")
    owners.write_text("nightly,u_42\nweekly\n")
    assert f"{owners}:2: expected lines of" in shell.refused("key", "import", str(good), "--map", str(owners))
    assert f"{tmp_path / 'none'}" in shell.refused(
        "key", "import", str(good), "--map", str(tmp_path / "none"), status=2
    )
    assert "no column `owner`" in shell.refused("key", "import", str(good), "--user-column", "owner")


@pytest.mark.parametrize("group", [[], ["key"], ["plan"]])
def test_help_is_shown_once_if_there_is_no_command(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(group) == 2
    out, err = capsys.readouterr()
    assert (out + err).count("Usage:") == 1
    assert "Error" not in out + err


def test_deletion_is_confirmed_on_a_terminal_and_requires_yes_elsewhere(
    shell: Shell, key: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []
    monkeypatch.setattr("keyproxy.cli.context.click.confirm", lambda question, **_: questions.append(question))
    shell.is_terminal = True
    shell.run("key", "revoke", key["id"])
    assert questions == []
    shell.run("user", "delete", "u_42", "--yes")
    assert questions == []
    shell.run("key", "revoke-all", "--tenant", "acme")
    shell.run("tenant", "delete", "acme")
    assert questions == ["Revoke 0 keys? This cannot be undone.", "Delete tenant acme with all its users and keys?"]


def test_roles_are_created_once_and_named(shell: Shell) -> None:
    prefix = f"kp_{secrets.token_hex(4)}"
    names = [f"{prefix}_proxy", f"{prefix}_admin", f"{prefix}_authorize", f"{prefix}_app"]
    assert shell.run_json("migrate", "--roles", prefix)["roles_made"] == names
    again = shell.run_json("migrate", "--roles", prefix)
    assert (again["roles"], again["roles_made"]) == (names, [])
    assert "not a valid prefix for roles" in shell.refused("migrate", "--roles", "Two Words")
    assert "--status" in shell.refused("migrate", "--roles", prefix, "--status", status=2)


def test_role_of_the_authorization_server_may_create_users_if_that_is_configured(
    shell: Shell, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"kp_{secrets.token_hex(4)}"

    async def may_insert() -> bool:
        connection = await asyncpg.connect(site.dsn)
        query = "SELECT has_table_privilege($1, 'keyproxy.users', 'INSERT')"
        found: bool = await connection.fetchval(query, f"{prefix}_authorize")
        await connection.close()
        return found

    for provision in ("create", "link"):
        monkeypatch.setenv("KEYPROXY_OAUTH__LOGIN__PROVISION", provision)
        shell.run_json("migrate", "--roles", prefix)
        assert asyncio.run(may_insert()) is (provision == "create")

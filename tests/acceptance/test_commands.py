"""The commands, for people and for programs."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path

import pytest

from tests.acceptance.conftest import Configure, Site
from tests.rawhttp import free_port


@pytest.fixture
def commands() -> None:
    """Each command is a process of its own, as users run it."""


async def test_provisioning_prints_the_documented_members(site: Site) -> None:
    assert (await site.run_json("tenant", "create", "acme"))["id"] == "acme"
    user = await site.run_json("user", "create", "u_42", "--tenant", "acme")
    assert (user["id"], user["tenant"]) == ("u_42", "acme")
    assert user["key"]["id"].startswith("key_")
    assert user["key"]["secret"].startswith("kp_live_")
    again = await site.run_json("user", "create", "u_42", "--tenant", "acme")
    assert (again["id"], again["key"]) == ("u_42", None)
    assert len(await site.run_json("key", "list", "--user", "u_42")) == 1
    key = await site.run_json(
        "key", "issue", "--user", "u_42", "--test", "--scope", "a:b", "--scope", "c", "--name", "n"
    )
    assert key["secret"].startswith("kp_test_")
    assert (key["scopes"], key["is_test"], key["name"]) == (["a:b", "c"], True, "n")
    assert key["expires_at"] is not None
    assert key["hint"][:8] == "kp_test_"
    assert key["hint"][-4:] == key["secret"][-4:]
    shown = await site.run_json("key", "show", key["id"])
    assert "secret" not in shown
    revoked = await site.run_json("key", "revoke", key["id"], "--reason", "leaked")
    assert revoked["revoked_at"] is not None
    assert revoked["revoke_reason"] == "leaked"
    assert (await site.run_json("key", "revoke", key["id"], "--reason", "again"))["revoke_reason"] == "leaked"
    assert (await site.run_json("user", "delete", "u_42", "--yes")) == {"id": "u_42", "deleted": True}
    assert await site.run_json("key", "list") == []
    assert [one["id"] for one in await site.run_json("tenant", "list")] == ["acme"]
    assert await site.run_json("user", "list", "--tenant", "acme") == []
    assert (await site.run_json("tenant", "delete", "acme", "--yes"))["deleted"] is True


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("user", "create", "u", "--tenant", "nobody"), 1, "there is no tenant 'nobody'"),
        (("key", "issue", "--user", "nobody"), 1, "there is no user 'nobody'"),
        (("key", "show", "key_x"), 1, "there is no key 'key_x'"),
        (("key", "revoke", "key_x"), 1, "there is no key 'key_x'"),
        (("tenant", "delete", "nobody", "--yes"), 1, "there is no tenant 'nobody'"),
        (("tenant", "create", "two words"), 1, "id"),
        (("key", "issue", "--user", "u", "--scope", "jobs:*"), 2, "not a scope"),
        (("key", "issue", "--user", "u", "--expires-in", "soon"), 2, "not a duration"),
        (("key", "issue"), 2, "--user"),
        (("tenants",), 2, "No such command"),
    ],
)
async def test_errors_go_to_stderr_with_their_exit_status(
    site: Site, arguments: tuple[str, ...], status: int, sentence: str
) -> None:
    output = await site.run(*arguments)
    assert (output.status, output.out) == (status, "")
    assert sentence in output.err
    assert "Traceback" not in output.err
    if status == 1:
        assert len(output.err.splitlines()) == 1


async def test_people_get_tables_and_the_secret_once(site: Site) -> None:
    await site.run("tenant", "create", "acme")
    made = await site.run("user", "create", "u_1", "--tenant", "acme")
    assert made.out.count("kp_live_") == 2  # the hint and the secret
    listed = await site.run("key", "list")
    assert listed.out.splitlines()[0].split()[:3] == ["ID", "USER", "TENANT"]
    secret = next(line.split()[-1] for line in made.out.splitlines() if line.startswith("secret"))
    assert secret not in listed.out + listed.err + made.err


async def test_migrate_prints_applied_and_pending_migrations(configure: Configure, empty_dsn: str) -> None:
    site = configure(empty_dsn)
    before = await site.run_json("migrate", "--status")
    assert before["applied"] == []
    assert before["pending"]
    assert (await site.run_json("migrate"))["done"] == before["pending"]
    after = await site.run_json("migrate", "--status")
    assert (after["applied"], after["pending"]) == (before["pending"], [])


async def test_config_show_prints_every_value_with_its_origin_and_no_password(configure: Configure) -> None:
    site = configure("postgresql://kp:hunter2@db/kp", cache={"fresh_seconds": 5})
    site.environment["KEYPROXY_LOG__LEVEL"] = "debug"
    output = await site.run("config", "show")
    assert "hunter2" not in output.out + output.err
    assert f"cache.fresh_seconds                 = 5.0  # {site.config}" in output.out
    assert '= "debug"  # KEYPROXY_LOG__LEVEL' in output.out
    assert "= 600.0  # default" in output.out
    shown = await site.run_json("config", "show")
    assert shown["store.dsn"]["value"] == "postgresql://kp:***@db/kp"
    assert (await site.run("config", "check", "--offline")).out == "ok\n"


async def test_help_has_examples(site: Site) -> None:
    expected = ((("serve", "--help"), "SIGTERM"), (("key", "issue", "--help"), "--test --expires-in 7d"))
    for arguments, text in expected:
        output = await site.run(*arguments)
        assert output.status == 0
        assert text in output.out


async def test_created_objects_are_shown_listed_and_deleted(site: Site) -> None:
    await site.run_json("tenant", "create", "acme", "--name", "Acme Ltd")
    bare = await site.run_json("user", "create", "u_1", "--tenant", "acme", "--no-key")
    assert (bare["key"], bare["tenant"]) == (None, "acme")
    scoped = await site.run_json(
        "user", "create", "u_2", "--tenant", "acme", "--scope", "a", "--scope", "b", "--scope", "a"
    )
    key = scoped["key"]
    assert (key["scopes"], key["is_test"]) == (["a", "b"], False)
    tenant = await site.run_json("tenant", "show", "acme")
    assert (tenant["name"], tenant["users"]) == ("Acme Ltd", 2)
    assert (await site.run_json("user", "show", "u_2"))["keys"] == 1
    listings = [
        (("user", "list"), ["u_1", "u_2"]),
        (("key", "list", "--tenant", "acme"), [key["id"]]),
        (("key", "list", "--user", "u_1"), []),
    ]
    for arguments, ids in listings:
        assert [one["id"] for one in await site.run_json(*arguments)] == ids
    assert (await site.run_json("key", "delete", key["id"], "--yes")) == {"id": key["id"], "deleted": True}
    again = await site.run("key", "delete", key["id"], "--yes")
    assert (again.status, again.out, again.err) == (1, "", f"keyproxy: there is no key '{key['id']}'\n")


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ((), 90 * 86_400),
        (("--expires-in", "24h"), 86_400),
        (("--expires-in", "never"), None),
    ],
)
async def test_a_key_has_the_requested_lifetime(site: Site, arguments: tuple[str, ...], seconds: int | None) -> None:
    await site.key()
    key = await site.run_json("key", "issue", "--user", "u_42", *arguments)
    if seconds is None:
        assert key["expires_at"] is None
        return
    created, expires = (datetime.fromisoformat(key[name]) for name in ("created_at", "expires_at"))
    # One time is by the database's clock, the other by this machine's.
    assert abs((expires - created).total_seconds() - seconds) <= 5


async def test_json_output_is_one_line_on_stdout(site: Site) -> None:
    await site.key()
    for arguments in (("key", "issue", "--user", "u_42"), ("key", "list"), ("tenant", "show", "acme"), ("migrate",)):
        output = await site.run(*arguments, "--json")
        assert (output.status, output.err) == (0, "")
        assert len(output.out.splitlines()) == 1
        assert isinstance(output.json, dict | list)


async def test_pending_migrations_are_listed_as_text(configure: Configure, empty_dsn: str) -> None:
    site = configure(empty_dsn)
    for state in ("pending", "applied"):
        status = await site.run("migrate", "--status")
        assert (status.status, status.err) == (0, "")
        assert {line.split()[0] for line in status.out.splitlines()} == {state}
        await site.run("migrate")


@pytest.mark.parametrize("arguments", [("tenant", "create", "acme"), ("key", "list"), ("migrate", "--status")])
async def test_an_unreachable_database_is_reported_in_one_line_without_its_password(
    configure: Configure, arguments: tuple[str, ...]
) -> None:
    port = free_port()
    output = await configure(f"postgresql://kp:hunter2@127.0.0.1:{port}/kp").run(*arguments, "--json")
    assert (output.status, output.out) == (1, "")
    assert len(output.err.splitlines()) == 1
    start = f"keyproxy: the database is unavailable: cannot connect to 127.0.0.1:{port}, database 'kp': "
    assert output.err.startswith(start)
    assert "refused" in output.err.removeprefix(start)
    assert "hunter2" not in output.err


@pytest.mark.parametrize("arguments", [("tenant", "list"), ("usage", "show")])
async def test_an_unreachable_admin_api_is_reported_as_such_and_not_as_the_database(
    configure: Configure, dsn: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    token, url = tmp_path / "token", f"http://127.0.0.1:{free_port()}"
    token.write_text("x")
    output = await configure(dsn).run(*arguments, "--admin-url", url, "--admin-token-file", str(token))
    assert (output.status, output.out) == (1, "")
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("keyproxy: the admin API does not respond: ")


@pytest.mark.parametrize("arguments", [("tenant", "list"), ("migrate", "--status"), ("config", "check"), ("serve",)])
async def test_every_configuration_error_is_reported_on_its_own_line(
    configure: Configure, arguments: tuple[str, ...]
) -> None:
    site = configure("embedded", cache={"fresh": 5}, listen={"workers": -1})
    output = await site.run(*arguments)
    assert (output.status, output.out) == (2, "")
    lines = output.err.splitlines()
    assert len(lines) == 2
    for line, key in zip(sorted(lines), ("cache.fresh", "listen.workers"), strict=True):
        assert line.startswith(f"keyproxy: {key}: ")


async def test_a_missing_configuration_file_is_a_configuration_error(site: Site) -> None:
    site.config.unlink()
    output = await site.run("config", "show")
    assert (output.status, output.out) == (2, "")
    assert str(site.config) in output.err
    assert len(output.err.splitlines()) == 1


async def test_the_embedded_store_needs_a_directory_and_persists_data(configure: Configure) -> None:
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        site = configure("embedded", store={"embedded_dir": directory})
        assert (await site.run_json("migrate"))["pending"] == []
        assert (await site.run_json("tenant", "create", "acme"))["created"]
        assert not Path(directory, "pgdata", "postmaster.pid").exists()
        assert [one["id"] for one in await site.run_json("tenant", "list")] == ["acme"]
        assert not Path(directory, "pgdata", "postmaster.pid").exists()

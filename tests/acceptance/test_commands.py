"""The commands, as people and programs call them."""

from __future__ import annotations

import pytest

from tests.acceptance.conftest import Configure, Site


async def test_provisioning_says_what_the_contract_says(site: Site) -> None:
    assert (await site.told("tenant", "create", "acme"))["id"] == "acme"
    user = await site.told("user", "create", "u_42", "--tenant", "acme")
    assert (user["id"], user["tenant"]) == ("u_42", "acme")
    assert user["key"]["id"].startswith("key_")
    assert user["key"]["secret"].startswith("kp_live_")
    again = await site.told("user", "create", "u_42", "--tenant", "acme")
    assert (again["id"], again["key"]) == ("u_42", None)
    assert len(await site.told("key", "list", "--user", "u_42")) == 1
    key = await site.told("key", "issue", "--user", "u_42", "--test", "--scope", "a:b", "--scope", "c", "--name", "n")
    assert key["secret"].startswith("kp_test_")
    assert (key["scopes"], key["is_test"], key["name"]) == (["a:b", "c"], True, "n")
    assert key["expires_at"] is not None
    assert key["hint"][:8] == "kp_test_"
    assert key["hint"][-4:] == key["secret"][-4:]
    shown = await site.told("key", "show", key["id"])
    assert "secret" not in shown
    revoked = await site.told("key", "revoke", key["id"], "--reason", "leaked")
    assert revoked["revoked_at"] is not None
    assert revoked["revoke_reason"] == "leaked"
    assert (await site.told("key", "revoke", key["id"], "--reason", "again"))["revoke_reason"] == "leaked"
    assert (await site.told("user", "delete", "u_42")) == {"id": "u_42", "deleted": True}
    assert await site.told("key", "list") == []
    assert [one["id"] for one in await site.told("tenant", "list")] == ["acme"]
    assert await site.told("user", "list", "--tenant", "acme") == []
    assert (await site.told("tenant", "delete", "acme"))["deleted"] is True


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("user", "create", "u", "--tenant", "nobody"), 1, "there is no tenant 'nobody'"),
        (("key", "issue", "--user", "nobody"), 1, "there is no user 'nobody'"),
        (("key", "show", "key_x"), 1, "there is no key 'key_x'"),
        (("key", "revoke", "key_x"), 1, "there is no key 'key_x'"),
        (("tenant", "delete", "nobody"), 1, "there is no tenant 'nobody'"),
        (("tenant", "create", "two words"), 1, "id"),
        (("key", "issue", "--user", "u", "--scope", "jobs:*"), 2, "no scope"),
        (("key", "issue", "--user", "u", "--expires-in", "soon"), 2, "no duration"),
        (("key", "issue"), 2, "--user"),
        (("tenants",), 2, "No such command"),
    ],
)
async def test_what_cannot_be_done_is_told_on_stderr_with_its_status(
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


async def test_migrate_says_what_it_did_and_what_is_pending(configure: Configure, empty_dsn: str) -> None:
    site = configure(empty_dsn)
    before = await site.told("migrate", "--status")
    assert before["applied"] == []
    assert before["pending"]
    assert (await site.told("migrate"))["done"] == before["pending"]
    after = await site.told("migrate", "--status")
    assert (after["applied"], after["pending"]) == (before["pending"], [])


async def test_config_show_tells_every_value_its_origin_and_no_password(configure: Configure) -> None:
    site = configure("postgresql://kp:hunter2@db/kp", cache={"fresh_seconds": 5})
    site.environment["KEYPROXY_LOG__LEVEL"] = "debug"
    output = await site.run("config", "show")
    assert "hunter2" not in output.out + output.err
    assert f"cache.fresh_seconds                 = 5.0  # {site.config}" in output.out
    assert '= "debug"  # KEYPROXY_LOG__LEVEL' in output.out
    assert "= 600.0  # default" in output.out
    shown = await site.told("config", "show")
    assert shown["store.dsn"]["value"] == "postgresql://kp:***@db/kp"
    assert (await site.run("config", "check")).out == "ok\n"


async def test_help_has_examples(site: Site) -> None:
    expected = ((("serve", "--help"), "SIGTERM"), (("key", "issue", "--help"), "--test --expires-in 7d"))
    for arguments, text in expected:
        output = await site.run(*arguments)
        assert output.status == 0
        assert text in output.out

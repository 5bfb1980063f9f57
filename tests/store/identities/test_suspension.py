"""A suspended key is refused with all that was cut from it, until it is resumed."""

from __future__ import annotations

import pytest

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.model import Identity
from keyproxy.reasons import Reason
from keyproxy.store.directory.directory import Actor, Directory
from keyproxy.store.directory.errors import Conflict
from tests.store.harness import Rig, Sql, add_key, add_user

SUSPEND = "UPDATE keyproxy.api_keys SET suspended_at = now(), suspend_reason = 'x' WHERE id = 'key_1'"
RESUME = "UPDATE keyproxy.api_keys SET suspended_at = NULL, suspend_reason = NULL WHERE id = 'key_1'"


@pytest.fixture
async def secret(rig: Rig) -> SecretKey:
    """A key of u_42 that acts for its tenant, which also has u_7."""
    await add_user(rig.sql)
    await add_user(rig.sql, "u_7")
    secret = await add_key(rig.sql)
    await rig.sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant'")
    return secret


async def standing(rig: Rig, secret: SecretKey, acting_for: str | None = None) -> Reason | None:
    """The standing of the credential after all changes were delivered."""
    await rig.feed.poll()
    who = await rig.resolve(secret, acting_for)
    assert isinstance(who, Identity)
    return who.standing


@pytest.mark.parametrize("acting_for", [None, "u_7"])
async def test_suspension_and_its_end_by_any_sql_client_reach_every_request_of_a_key(
    rig: Rig, secret: SecretKey, acting_for: str | None
) -> None:
    assert await standing(rig, secret, acting_for) is None
    await rig.sql.execute(SUSPEND)
    await rig.feed.poll()
    assert rig.hot(secret, acting_for) is None
    assert await standing(rig, secret, acting_for) is Reason.KEY_SUSPENDED
    await rig.sql.execute(RESUME)
    assert await standing(rig, secret, acting_for) is None


async def test_suspended_key_is_not_served_while_the_store_is_down(rig: Rig, secret: SecretKey) -> None:
    assert await standing(rig, secret) is None
    await rig.sql.execute(SUSPEND)
    await rig.feed.poll()
    await rig.goes_down()
    assert not rig.is_served(secret)
    await rig.comes_back()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE keyproxy.api_keys SET revoked_at = now()", Reason.KEY_REVOKED),
        ("UPDATE keyproxy.users SET disabled_at = now()", Reason.ACCOUNT_DISABLED),
        ("UPDATE keyproxy.tenants SET disabled_at = now()", Reason.ACCOUNT_DISABLED),
    ],
)
async def test_key_is_refused_for_its_revocation_or_owner_before_its_suspension(
    rig: Rig, secret: SecretKey, change: str, reason: Reason
) -> None:
    await rig.sql.execute(SUSPEND)
    await rig.sql.execute(change)
    assert await standing(rig, secret) is reason


async def test_tokens_of_a_suspended_key_change_with_it(sql: Sql) -> None:
    from tests.store.agent_rows import add_agent_token

    await add_agent_token(sql)
    await sql.execute("TRUNCATE keyproxy.changes")
    for change in (SUSPEND, RESUME):
        await sql.execute(change)
        subjects = await sql.fetch(
            "DELETE FROM keyproxy.changes WHERE kind = 'key' RETURNING (SELECT 1 FROM keyproxy.agent_tokens AS t"
            " WHERE encode(t.digest, 'hex') = subject) AS is_token"
        )
        assert sorted(bool(row["is_token"]) for row in subjects) == [False, True]


async def test_suspended_key_mints_no_tokens(sql: Sql) -> None:
    await add_user(sql)
    await add_key(sql)
    ask = "SELECT refusal FROM keyproxy.minting_authority('key_1', NULL, NULL, 'crawler')"
    assert await sql.fetchval(ask) is None
    await sql.execute(SUSPEND)
    assert await sql.fetchval(ask) == "the key is suspended"


async def test_suspension_is_idempotent_and_keeps_the_first_reason(rig: Rig, secret: SecretKey) -> None:
    keys = Directory(rig.door, KeyFormat(), Actor("ann", "local")).keys
    first = await keys.suspend("key_1", "used from two countries")
    assert (first["state"], first["suspend_reason"]) == ("suspended", "used from two countries")
    assert await keys.suspend("key_1", "another") == first
    resumed = await keys.resume("key_1")
    assert (resumed["state"], resumed["suspended_at"], resumed["suspend_reason"]) == ("active", None, None)
    assert await keys.resume("key_1") == resumed
    assert await standing(rig, secret) is None


@pytest.mark.parametrize("end", ["revoked_at = now()", "expires_at = now()"])
async def test_key_that_has_ended_cannot_be_suspended(rig: Rig, secret: SecretKey, end: str) -> None:
    await rig.sql.execute(f"UPDATE keyproxy.api_keys SET {end}")
    keys = Directory(rig.door, KeyFormat(), Actor("ann", "local")).keys
    with pytest.raises(Conflict, match="cannot be suspended"):
        await keys.suspend("key_1", "")
    assert secret is not None

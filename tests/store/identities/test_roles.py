"""Effective scopes: what roles grant, what ceilings exclude, and how fast a change of either takes effect."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Cache
from keyproxy.model import Identity
from keyproxy.platform import clock
from keyproxy.reasons import Reason
from keyproxy.store.identities.identity_rows import EFFECTIVE_SCOPES_MAX
from keyproxy.store.postgres import queries
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, Sql, add_key, add_user
from tests.waiting import until


async def scopes_of(rig: Rig, secret: SecretKey) -> frozenset[str]:
    """The scopes of a request with this key, after all changes were delivered."""
    await rig.feed.poll()
    who = await rig.resolve(secret)
    assert isinstance(who, Identity)
    field = next(line for line in who.header_block.split(b"\r\n") if line.startswith(b"X-Keyproxy-Scope: "))
    assert frozenset(field.partition(b": ")[2].decode().split()) == who.scopes
    return who.scopes


@pytest.fixture
async def secret(rig: Rig) -> SecretKey:
    """A key with the scope own:x; and the roles reader (a, b), writer (b, c) and empty."""
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.sql.execute(
        "UPDATE keyproxy.api_keys SET scopes = '{own:x}';"
        "INSERT INTO keyproxy.roles (id, scopes) VALUES ('reader', '{a,b}'), ('writer', '{b,c}'), ('empty', '{}')"
    )
    return secret


#: (roles of the key, ceiling of the user, ceiling of the tenant, effective scopes)
CASES = [
    ("{}", None, None, "own:x"),
    ("{reader}", None, None, "own:x a b"),
    ("{reader,writer}", None, None, "own:x a b c"),
    ("{reader,reader}", None, None, "own:x a b"),
    ("{reader,unknown}", None, None, "own:x a b"),
    ("{unknown}", None, None, "own:x"),
    ("{empty}", None, None, "own:x"),
    ("{reader}", "{writer}", None, "b"),
    ("{reader}", None, "{writer}", "b"),
    ("{reader,writer}", "{reader}", "{writer}", "b"),
    ("{reader}", "{reader,writer}", "{reader}", "a b"),
    ("{reader}", "{}", None, ""),
    ("{reader}", None, "{}", ""),
    ("{reader}", "{unknown}", None, ""),
    ("{reader}", "{empty}", None, ""),
    ("{}", "{reader}", None, ""),
]


@pytest.mark.parametrize(("roles", "user", "tenant", "expected"), CASES)
async def test_roles_add_scopes_and_ceilings_exclude_them(
    rig: Rig, secret: SecretKey, roles: str, user: str | None, tenant: str | None, expected: str
) -> None:
    await rig.sql.execute("UPDATE keyproxy.api_keys SET roles = $1::text::text[]", roles)
    await rig.sql.execute("UPDATE keyproxy.users SET roles = $1::text::text[]", user)
    await rig.sql.execute("UPDATE keyproxy.tenants SET roles = $1::text::text[]", tenant)
    assert await scopes_of(rig, secret) == frozenset(expected.split())


async def test_scopes_of_roles_are_sorted_so_that_every_proxy_sends_the_same_header(
    rig: Rig, secret: SecretKey
) -> None:
    await rig.sql.execute("UPDATE keyproxy.api_keys SET roles = '{writer,reader}', scopes = '{z,B,b}'")
    await rig.feed.poll()
    who = await rig.resolve(secret)
    assert isinstance(who, Identity)
    assert b"X-Keyproxy-Scope: B a b c z\r\n" in who.header_block


# -- no chain widens

SCOPES = [f"s:{number}" for number in range(6)]
ROLES = [f"r{number}" for number in range(4)]
_sets = st.lists(st.sampled_from(SCOPES), max_size=6, unique=True)
_roles = st.lists(st.sampled_from([*ROLES, "unknown"]), max_size=4)
_ceilings = st.none() | _roles


def union(table: dict[str, list[str]], roles: Iterable[str]) -> set[str]:
    """The scopes of these roles."""
    return set().union(*(table.get(role, ()) for role in roles))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.dictionaries(st.sampled_from(ROLES), _sets),
    own=_sets, key=_roles, user=_ceilings, tenant=_ceilings,
)  # fmt: skip
async def test_no_chain_of_roles_and_ceilings_widens(
    sql: Sql,
    table: dict[str, list[str]],
    own: list[str],
    key: list[str],
    user: list[str] | None,
    tenant: list[str] | None,
) -> None:
    transaction = sql.transaction()
    await transaction.start()
    try:
        await sql.executemany("INSERT INTO keyproxy.roles (id, scopes) VALUES ($1, $2)", list(table.items()))
        await sql.execute("INSERT INTO keyproxy.tenants (id, roles) VALUES ('acme', $1)", tenant)
        await sql.execute("INSERT INTO keyproxy.users (id, tenant_id, roles) VALUES ('u_42', 'acme', $1)", user)
        digest = bytes(32)
        await sql.execute(
            "INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes, roles) VALUES ('key', 'u_42', $1, $2, $3)",
            digest, own, key,
        )  # fmt: skip
        (row,) = await sql.fetch(queries.load()["identities_by_digest"], [digest])
        found: Sequence[str] = row["scopes"]
    finally:
        await transaction.rollback()
    nominal = set(own) | union(table, key)
    ceilings = [union(table, roles) for roles in (user, tenant) if roles is not None]
    assert set(found) <= nominal
    assert all(set(found) <= ceiling for ceiling in ceilings)
    # And nothing is lost that all of them allow.
    assert set(found) == functools.reduce(set.intersection, ceilings, nominal)
    assert len(found) == len(set(found))


# -- the bound


async def test_too_many_effective_scopes_count_as_none_and_the_log_names_the_key(
    rig: Rig, secret: SecretKey, caplog: pytest.LogCaptureFixture
) -> None:
    names = [[f"s{group}:{number}" for number in range(64)] for group in range(2)]
    for group, scopes in enumerate(names):
        await rig.sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ($1, $2)", f"wide{group}", scopes)
    await rig.sql.execute("UPDATE keyproxy.api_keys SET roles = '{wide0,wide1}', scopes = '{}'")
    assert len(await scopes_of(rig, secret)) == EFFECTIVE_SCOPES_MAX
    assert "key_1" not in caplog.text
    await rig.sql.execute("UPDATE keyproxy.api_keys SET scopes = '{one:more}'")
    assert await scopes_of(rig, secret) == frozenset()
    assert "key key_1 has 129 effective scopes" in caplog.text
    await rig.sql.execute("UPDATE keyproxy.tenants SET roles = '{wide0}'")
    assert await scopes_of(rig, secret) == frozenset(names[0]), "the bound applies to what a ceiling leaves"


BAD_ROWS = [
    "INSERT INTO keyproxy.roles (id, scopes) VALUES ('Reader', '{}')",
    "INSERT INTO keyproxy.roles (id, scopes) VALUES ('', '{}')",
    "INSERT INTO keyproxy.roles (id, scopes) VALUES (repeat('a', 65), '{}')",
    "INSERT INTO keyproxy.roles (id, scopes) VALUES ('r', '{a b}')",
    "INSERT INTO keyproxy.roles (id, scopes) VALUES ('r', '{*}')",
    "INSERT INTO keyproxy.roles (id, scopes) VALUES ('r', '{NULL}')",
    "INSERT INTO keyproxy.roles (id, scopes) VALUES ('r', ARRAY(SELECT 's' || n FROM generate_series(1, 65) AS n))",
    "UPDATE keyproxy.api_keys SET roles = '{Reader}'",
    "UPDATE keyproxy.api_keys SET roles = '{NULL}'",
    "UPDATE keyproxy.api_keys SET roles = ARRAY(SELECT 'r' || n FROM generate_series(1, 17) AS n)",
    "UPDATE keyproxy.users SET roles = '{Reader}'",
    "UPDATE keyproxy.users SET roles = ARRAY(SELECT 'r' || n FROM generate_series(1, 17) AS n)",
    "UPDATE keyproxy.tenants SET roles = '{NULL}'",
    "UPDATE keyproxy.tenants SET roles = ARRAY(SELECT 'r' || n FROM generate_series(1, 17) AS n)",
]


@pytest.mark.parametrize("statement", BAD_ROWS)
async def test_tables_refuse_roles_of_another_form_or_number(rig: Rig, secret: SecretKey, statement: str) -> None:
    del secret
    with pytest.raises(asyncpg.CheckViolationError):
        await rig.sql.execute(statement)


async def test_tables_accept_the_largest_values(rig: Rig, secret: SecretKey) -> None:
    del secret
    await rig.sql.execute(
        "INSERT INTO keyproxy.roles (id, scopes)"
        " SELECT repeat('a', 64), ARRAY(SELECT 's' || n FROM generate_series(1, 64) AS n);"
        "UPDATE keyproxy.api_keys SET roles = ARRAY(SELECT 'r' || n FROM generate_series(1, 16) AS n);"
        "UPDATE keyproxy.users SET roles = ARRAY(SELECT 'r' || n FROM generate_series(1, 16) AS n)"
    )


# -- changes by any SQL client

CHANGES = [
    ("UPDATE keyproxy.api_keys SET roles = '{}'", "own:x"),
    ("UPDATE keyproxy.api_keys SET roles = '{writer}'", "own:x b c"),
    ("UPDATE keyproxy.roles SET scopes = '{a,new}' WHERE id = 'reader'", "own:x a new"),
    ("UPDATE keyproxy.roles SET id = 'renamed' WHERE id = 'reader'", "own:x"),
    ("DELETE FROM keyproxy.roles WHERE id = 'reader'", "own:x"),
    ("TRUNCATE keyproxy.roles", "own:x"),
    ("UPDATE keyproxy.users SET roles = '{writer}'", "b"),
    ("UPDATE keyproxy.tenants SET roles = '{writer}'", "b"),
    ("UPDATE keyproxy.tenants SET roles = '{}'", ""),
    ("INSERT INTO keyproxy.roles (id, scopes) VALUES ('late', '{later}')", "own:x a b later"),
]


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize(("statement", "expected"), CHANGES)
async def test_change_of_roles_and_ceilings_is_delivered_by_the_feed(
    rig: Rig, secret: SecretKey, statement: str, expected: str, role: str
) -> None:
    await rig.sql.execute("UPDATE keyproxy.api_keys SET roles = '{reader,late}'")
    assert await scopes_of(rig, secret) == {"own:x", "a", "b"}
    await rig.sql.execute(f"SET session_replication_role = {role}")
    await rig.sql.execute(statement)
    assert await scopes_of(rig, secret) == frozenset(expected.split())


@pytest.mark.parametrize("statement", [statement for statement, _ in CHANGES])
async def test_change_of_roles_or_ceilings_is_not_ignored_in_an_outage_right_after_it(
    rig: Rig, secret: SecretKey, statement: str
) -> None:
    await rig.sql.execute("UPDATE keyproxy.api_keys SET roles = '{reader,late}'")
    await scopes_of(rig, secret)
    await rig.sql.execute(statement)
    await rig.feed.poll()
    await rig.goes_down()
    assert rig.hot(secret) is Reason.STORE_UNAVAILABLE


async def test_rows_of_a_poll_after_a_changed_role_are_applied_too(rig: Rig, secret: SecretKey) -> None:
    await rig.sql.execute("INSERT INTO keyproxy.owned (kind, id, tenant_id) VALUES ('collection', 'docs', 'acme')")
    await rig.feed.poll()
    now = rig.clock()
    with pytest.raises(Exception, match="ownership") as error:
        rig.owned.is_owned("collection", "docs", "acme", now)
    await error.value.fetch_missing()  # type: ignore[attr-defined]
    assert rig.owned.is_owned("collection", "docs", "acme", now)
    async with rig.sql.transaction():
        await rig.sql.execute("UPDATE keyproxy.roles SET scopes = '{x}' WHERE id = 'reader'")
        await rig.sql.execute("DELETE FROM keyproxy.owned")
    await rig.feed.poll()
    with pytest.raises(Exception, match="ownership"):
        rig.owned.is_owned("collection", "docs", "acme", now)
    assert rig.hot(secret) is None


@pytest.mark.parametrize("listener", [None, "real"], ids=["polling", "listening"])
@pytest.mark.parametrize(("statement", "expected"), CHANGES[2:9])
async def test_change_of_roles_and_ceilings_takes_effect_within_a_second(
    make_rig: MakeRig, statement: str, expected: str, listener: str | None
) -> None:
    rig = await make_rig(listener=listener, now=clock.now, cache=Cache(fresh_seconds=300))
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.sql.execute(
        "INSERT INTO keyproxy.roles (id, scopes) VALUES ('reader', '{a,b}'), ('writer', '{b,c}');"
        "UPDATE keyproxy.api_keys SET scopes = '{own:x}', roles = '{reader}'"
    )
    rig.feed.start()
    await until(rig.feed.is_current, "the feed polls")

    async def has(scopes: frozenset[str]) -> bool:
        who = await rig.resolve(secret)
        return isinstance(who, Identity) and who.scopes == scopes

    assert await has(frozenset({"own:x", "a", "b"}))
    await rig.sql.execute(statement)
    await until(lambda: has(frozenset(expected.split())), "the change takes effect", seconds=1.0)


# -- the cost of a lookup


async def test_look_up_of_a_key_without_roles_and_ceilings_calls_no_function(rig: Rig, secret: SecretKey) -> None:
    await rig.sql.execute("SET track_functions = 'all'")
    statement = queries.load()["identities_by_digest"]

    async def calls() -> int:
        await rig.sql.fetch(statement, [secret.digest()])
        await rig.sql.execute("SELECT pg_stat_force_next_flush()")
        count = await rig.sql.fetchval(
            "SELECT coalesce(sum(calls), 0)::int FROM pg_stat_user_functions WHERE funcname = 'effective_scopes'"
        )
        assert isinstance(count, int)
        return count

    before = await calls()
    assert await calls() == before
    await rig.sql.execute("UPDATE keyproxy.tenants SET roles = '{reader}'")
    assert await calls() > before


async def test_look_ups_use_indexes_and_are_not_jit_compiled(sql: Sql) -> None:
    await add_user(sql)
    await sql.execute(
        "INSERT INTO keyproxy.roles (id, scopes) SELECT 'r' || n, '{a,b}' FROM generate_series(1, 20) AS n;"
        "UPDATE keyproxy.tenants SET roles = '{r1,r2}'; SET session_replication_role = replica;"
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, roles)"
        " SELECT 'key_' || n, 'u_42', sha256(n::text::bytea), '{r1,r2}' FROM generate_series(1, 20000) AS n;"
        "ANALYZE keyproxy.api_keys; ANALYZE keyproxy.users; ANALYZE keyproxy.tenants; ANALYZE keyproxy.roles"
    )
    await sql.execute(f"PREPARE look (bytea[]) AS {queries.load()['identities_by_digest']}")
    digests = "{" + ",".join(f'"\\\\x{bytes([n] * 32).hex()}"' for n in range(20)) + "}"
    for _ in range(7):
        rows = await sql.fetch(f"EXPLAIN EXECUTE look ('{digests}')")
        plan = "\n".join(row[0] for row in rows)
        assert "api_keys_digest_key" in plan
        assert "JIT" not in plan

"""The cache of ownership: which entries are served, when the store is queried, and what the change feed does to them."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from keyproxy.ai.access.object_ids import is_object_id
from keyproxy.config.schema import Cache
from keyproxy.model import Missing, TimeBudget
from keyproxy.platform import clock
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.postgres import queries
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, Sql, add_owned, add_tenant
from tests.waiting import until

QUERY = "owners_by_id"
FRESH, STALE, UNKNOWN = 30.0, 600.0, 5.0


def look(rig: Rig, object_id: str, tenant: str = "acme", kind: str = "collection") -> bool | Reason | None:
    """The immediate result of the cache; None if a lookup is needed."""
    try:
        return rig.owned.is_owned(kind, object_id, tenant, rig.clock())
    except Missing:
        return None
    except Refusal as refusal:
        return refusal.reason


async def resolve(rig: Rig, object_id: str, tenant: str = "acme", kind: str = "collection") -> bool | Reason:
    """The result of a request, with the lookups that the gateway would do."""
    for _ in range(4):
        try:
            return rig.owned.is_owned(kind, object_id, tenant, rig.clock(), is_first_lookup=False)
        except Missing as missing:
            failure = await missing.failure(TimeBudget())
            if failure is not None:
                return failure.reason
        except Refusal as refusal:
            return refusal.reason
    raise AssertionError("the value stays missing")


@pytest.fixture
async def owning(rig: Rig) -> Rig:
    """A rig in which acme owns `docs` and `plans`, and globex owns `other`. `docs` is in the cache."""
    for object_id, tenant in (("docs", "acme"), ("plans", "acme"), ("other", "globex")):
        await add_owned(rig.sql, object_id, tenant)
    await rig.feed.poll()
    assert await resolve(rig, "docs") is True
    return rig


async def test_cached_ids_cause_no_look_up_whether_owned_or_not(owning: Rig) -> None:
    assert await resolve(owning, "other") is False
    before = owning.door.queries[QUERY]
    for _ in range(3):
        assert (look(owning, "docs"), look(owning, "other")) == (True, False)
    assert owning.door.queries[QUERY] == before


async def test_tenant_that_owns_nothing_of_a_kind_causes_one_look_up_for_all_ids(owning: Rig) -> None:
    before = owning.door.queries[QUERY]
    assert await resolve(owning, "id-0", "globex", "model") is False
    for number in range(1, 50):
        assert look(owning, f"id-{number}", "globex", "model") is False
    assert owning.door.queries[QUERY] == before + 1
    # It still holds while the store is down, and longer than an id that is not owned is remembered.
    owning.clock.advance(UNKNOWN + 1)
    await owning.goes_down()
    assert look(owning, "id-99", "globex", "model") is False


async def test_concurrent_requests_share_one_look_up(rig: Rig) -> None:
    await add_owned(rig.sql, "docs")
    await add_owned(rig.sql, "plans")
    await rig.feed.poll()
    hold = rig.door.hold(QUERY)
    waiting = [asyncio.create_task(resolve(rig, name)) for name in ("docs", "plans", "x", "docs", "plans") * 20]
    await hold.arrived.wait()
    hold.release()
    assert await asyncio.gather(*waiting) == [True, True, False, True, True] * 20
    assert rig.door.queries[QUERY] <= 3


async def test_id_that_is_not_owned_is_looked_up_again_after_unknown_seconds(owning: Rig) -> None:
    assert await resolve(owning, "x") is False
    owning.clock.advance(UNKNOWN - 0.1)
    assert look(owning, "x") is False
    owning.clock.advance(0.2)
    assert look(owning, "x") is None


async def test_stale_id_is_served_while_the_feed_is_current_and_refreshed(owning: Rig) -> None:
    before = owning.door.queries[QUERY]
    owning.clock.advance(FRESH + 1)
    assert look(owning, "docs") is None, "the feed is not current"
    await owning.feed.poll()
    assert look(owning, "docs") is True
    await until(lambda: owning.owned.sizes()["looking_up"] == 0, "the refresh ends")
    assert owning.door.queries[QUERY] == before + 1


async def test_id_is_served_during_an_outage_for_stale_seconds(owning: Rig) -> None:
    await owning.goes_down()
    owning.clock.advance(STALE - 1)
    assert look(owning, "docs") is True
    assert look(owning, "plans") is Reason.STORE_UNAVAILABLE
    owning.clock.advance(2)
    assert look(owning, "docs") is Reason.STORE_UNAVAILABLE


#: (a change by any SQL client, what acme owns afterwards of docs, plans, new)
CHANGES = [
    ("DELETE FROM keyproxy.owned WHERE id = 'docs'", (False, True, False)),
    ("INSERT INTO keyproxy.owned (kind, id, tenant_id) VALUES ('collection', 'new', 'acme')", (True, True, True)),
    ("UPDATE keyproxy.owned SET tenant_id = 'globex' WHERE id = 'docs'", (False, True, False)),
    ("UPDATE keyproxy.owned SET tenant_id = 'acme'", (True, True, False)),
    ("UPDATE keyproxy.owned SET id = 'new' WHERE id = 'docs'", (False, True, True)),
    ("UPDATE keyproxy.owned SET kind = 'model' WHERE id = 'docs'", (False, True, False)),
    ("DELETE FROM keyproxy.owned", (False, False, False)),
    ("TRUNCATE keyproxy.owned", (False, False, False)),
    ("DELETE FROM keyproxy.tenants WHERE id = 'acme'", (False, False, False)),
    ("UPDATE keyproxy.tenants SET id = 'acme_2' WHERE id = 'acme'", (False, False, False)),
    ("UPDATE keyproxy.owned SET created_at = now()", (True, True, False)),
]


@pytest.mark.parametrize(
    ("statement", "expected", "role"),
    # Foreign keys do not cascade in a replica session.
    [
        (*change, role)
        for change in CHANGES
        for role in ("origin", "replica")
        if role == "origin" or "tenants" not in change[0]
    ],
)
async def test_change_by_any_sql_client_is_delivered_by_the_feed(
    owning: Rig, statement: str, expected: tuple[bool, bool, bool], role: str
) -> None:
    for name in ("docs", "plans", "new"):
        await resolve(owning, name)
    await owning.sql.execute(f"SET session_replication_role = {role}")
    await owning.sql.execute(statement)
    await owning.feed.poll()
    assert tuple([await resolve(owning, name) for name in ("docs", "plans", "new")]) == expected


async def test_first_id_of_a_kind_ends_the_knowledge_that_there_is_none(owning: Rig) -> None:
    assert await resolve(owning, "ft:1", kind="model") is False
    await add_owned(owning.sql, "ft:1", kind="model")
    await owning.feed.poll()
    assert await resolve(owning, "ft:1", kind="model") is True


async def test_change_of_one_id_leaves_the_others_in_the_cache(owning: Rig) -> None:
    assert await resolve(owning, "other", "globex") is True
    await owning.sql.execute("DELETE FROM keyproxy.owned WHERE id = 'docs'")
    await owning.feed.poll()
    assert (look(owning, "docs"), look(owning, "other", "globex")) == (None, True)


async def test_lost_ownership_is_not_served_in_an_outage_right_after_it(owning: Rig) -> None:
    await owning.sql.execute("DELETE FROM keyproxy.owned WHERE id = 'docs'")
    await owning.feed.poll()
    await owning.goes_down()
    assert look(owning, "docs") is Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize(
    ("wanted", "kind"), [("docs", "collection"), ("new", "collection"), ("ft:1", "model")], ids=["lost", "won", "first"]
)
async def test_change_during_a_look_up_is_in_its_result(owning: Rig, wanted: str, kind: str) -> None:
    owning.clock.advance(FRESH + 1)
    hold = owning.door.hold(QUERY)
    waiting = asyncio.create_task(resolve(owning, wanted, kind=kind))
    await hold.arrived.wait()
    if wanted == "docs":
        await owning.sql.execute("DELETE FROM keyproxy.owned WHERE id = 'docs'")
    else:
        await add_owned(owning.sql, wanted, kind=kind)
    await owning.feed.poll()
    hold.release()
    assert await waiting is (wanted != "docs")


@pytest.mark.parametrize("listener", [None, "real"], ids=["polling", "listening"])
async def test_change_of_ownership_takes_effect_within_a_second(make_rig: MakeRig, listener: str | None) -> None:
    rig = await make_rig(listener=listener, now=clock.now, cache=Cache(fresh_seconds=300))
    await add_owned(rig.sql, "docs")
    await add_owned(rig.sql, "plans")
    rig.feed.start()
    await until(rig.feed.is_current, "the feed polls")

    async def owned(name: str) -> bool:
        while True:
            try:
                return rig.owned.is_owned("collection", name, "acme", clock.now())
            except Missing as missing:
                await missing.fetch_missing()

    assert (await owned("docs"), await owned("new")) == (True, False)
    await rig.sql.execute("DELETE FROM keyproxy.owned WHERE id = 'docs'")
    await add_owned(rig.sql, "new")

    async def has_changed() -> bool:
        return (await owned("docs"), await owned("new")) == (False, True)

    await until(has_changed, "both changes take effect", seconds=1.0)


async def test_tables_are_bounded(make_rig: MakeRig) -> None:
    rig = await make_rig(cache=Cache(entries_max=5, unknown_entries_max=5))
    await rig.feed.poll()
    for number in range(10):
        await add_owned(rig.sql, f"docs-{number}")
    await rig.feed.poll()
    for number in range(10):
        assert await resolve(rig, f"docs-{number}") is True
        assert await resolve(rig, f"x-{number}") is False
        assert await resolve(rig, "x", f"tenant-{number}") is False
    assert rig.owned.sizes() == {"owned": 5, "not_owned": 5, "nothing": 5, "looking_up": 0}


IDS = ["docs", "acme/docs", "a", "a" * 256, "v1.2", "...", "a/...", "-", "x=1,y~2!$", "ft:gpt@acme|1+2"]
NO_IDS = [
    "", "a" * 257, "/docs", "docs/", "a//b", ".", "..", "a/./b", "a/../b", "../b", "a/..", "a b", "a\n", "a\x00", "é",
    "a%2Fb", "a?b", "a#b", "a\\b", "a;b", "\ud800", "a*",
]  # fmt: skip


async def test_ids_have_the_same_form_in_the_table_and_in_the_program(owning: Rig) -> None:
    for good in IDS:
        assert is_object_id(good), good
        await add_owned(owning.sql, good, kind="other")
    for bad in NO_IDS:
        assert not is_object_id(bad), bad
        with pytest.raises((asyncpg.CheckViolationError, asyncpg.DataError, UnicodeEncodeError)):
            await add_owned(owning.sql, bad, kind="other")


async def test_text_that_is_no_id_is_owned_by_no_tenant_without_a_look_up(owning: Rig) -> None:
    for bad in NO_IDS:
        assert look(owning, bad) is False
    await owning.goes_down()
    assert look(owning, "a\x00") is False


async def test_look_ups_need_no_statistics_and_read_only_the_rows_of_the_ids(sql: Sql) -> None:
    await add_tenant(sql)
    await sql.execute(
        "INSERT INTO keyproxy.owned (kind, id, tenant_id) SELECT 'collection', 'id-' || n, 'acme'"
        " FROM generate_series(1, 20000) AS n"
    )
    columns = (["collection"] * 100, [f"id-{number}" for number in range(100)], ["acme"] * 100)
    kinds, ids, tenants = ("{" + ",".join(column) + "}" for column in columns)
    await sql.execute(f"PREPARE look (text[], text[], text[]) AS {queries.load()[QUERY]}")
    for _ in range(7):
        rows = await sql.fetch(f"EXPLAIN EXECUTE look ('{kinds}', '{ids}', '{tenants}')")
        plan = "\n".join(row[0] for row in rows)
        assert "Seq Scan on owned" not in plan, plan

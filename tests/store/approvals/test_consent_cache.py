"""The cache of consents: which are served, when the store is queried, and what the change feed does to them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest

from keyproxy.config.schema import Cache
from keyproxy.model import AgentToken, Identity, Missing, TimeBudget
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.approvals.consent_cache import ConsentCache
from keyproxy.store.identities.change_feed import ChangeFeed
from tests import fakes
from tests.store.harness import Rig, Sql, add_user
from tests.waiting import until

QUERY = "consents_of_users"
FRESH, STALE = 30.0, 600.0


def caller(agent: str | None = None, user: str = "u_42") -> Identity:
    """The identity of a user's key, or of a token of this agent."""
    token = None if agent is None else AgentToken("agt_", (agent, "parent"), 1)
    return dataclasses.replace(fakes.identity(user), agent_token=token)


async def grant(sql: Sql, number: int = 1, agent: str | None = None, *, lasts: str = "1 day") -> None:
    """Insert a consent of u_42 to `pay`."""
    await sql.execute(
        "INSERT INTO keyproxy.consents (id, user_id, tool, agent_id, granted_by, expires_at)"
        f" VALUES ('cns_' || lpad($1::int::text, 22, '0'), 'u_42', 'pay', $2, 'ann', now() + interval '{lasts}')",
        number, agent,
    )  # fmt: skip


class Consents:
    """The cache over the rig's database, and a feed that it follows."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.cache = ConsentCache(rig.door, rig.door, Cache(), feed=rig.state, now=rig.clock)
        self.feed = ChangeFeed(rig.door, None, rig.cache, rig.state, rig.clock, followers={"consent": self.cache})

    def look(self, identity: Identity | None = None, tool: str = "pay") -> bool | Reason | None:
        """The immediate result; None if a lookup is needed."""
        try:
            return self.cache.has_consent(identity or caller(), tool, self.rig.clock())
        except Missing:
            return None
        except Refusal as refusal:
            return refusal.reason

    async def resolve(self, identity: Identity | None = None, tool: str = "pay") -> bool | Reason:
        """The result of a request, with the lookups that the gateway does."""
        for _ in range(4):
            try:
                return self.cache.has_consent(identity or caller(), tool, self.rig.clock(), is_first_lookup=False)
            except Missing as missing:
                failure = await missing.failure(TimeBudget())
                if failure is not None:
                    return failure.reason
            except Refusal as refusal:
                return refusal.reason
        raise AssertionError("the value stays missing")


@pytest.fixture
async def consents(rig: Rig) -> AsyncIterator[Consents]:
    """The cache, u_42 and u_2 in the database, and a feed that has polled."""
    rig.clock.wall_seconds = float(await rig.sql.fetchval("SELECT extract(epoch FROM now())"))
    for user in ("u_42", "u_2"):
        await add_user(rig.sql, user)
    made = Consents(rig)
    await made.feed.poll()
    yield made
    await made.cache.close()


async def test_consent_holds_for_its_user_tool_and_agent_only(consents: Consents) -> None:
    await grant(consents.rig.sql, agent="crawler")
    assert await consents.resolve(caller("crawler")) is True
    others = [caller("other"), caller(), caller("parent"), caller("crawler", "u_2")]
    assert [await consents.resolve(one) for one in others] == [False] * 4
    assert await consents.resolve(caller("crawler"), "other") is False


async def test_consent_without_an_agent_holds_for_any_agent_and_none(consents: Consents) -> None:
    await grant(consents.rig.sql)
    assert [await consents.resolve(one) for one in (caller(), caller("crawler"), caller("other"))] == [True] * 3


async def test_consents_of_a_user_are_looked_up_once_also_if_there_are_none(consents: Consents) -> None:
    for tool in ("pay", "other", "third"):
        assert await consents.resolve(tool=tool) is False
    assert consents.rig.door.queries[QUERY] == 1


async def test_consent_ends_at_its_expiry_without_a_lookup(consents: Consents) -> None:
    await grant(consents.rig.sql, lasts="20 seconds")
    assert await consents.resolve() is True
    consents.rig.clock.advance(21.0)
    assert consents.look() is False


CHANGES = [
    ("UPDATE keyproxy.consents SET revoked_at = now()", False),
    ("DELETE FROM keyproxy.consents", False),
    ("TRUNCATE keyproxy.consents", False),
    ("UPDATE keyproxy.consents SET user_id = 'u_2'", False),
    ("UPDATE keyproxy.consents SET tool = 'other'", False),
    ("UPDATE keyproxy.consents SET agent_id = 'crawler'", False),
    ("UPDATE keyproxy.consents SET expires_at = now() + interval '1 second', created_at = now()", True),
    ("UPDATE keyproxy.consents SET granted_by = 'bob'", True),
]


@pytest.mark.parametrize(
    ("statement", "expected", "role"), [(*change, role) for change in CHANGES for role in ("origin", "replica")]
)
async def test_change_by_any_sql_client_is_delivered_by_the_feed(
    consents: Consents, statement: str, expected: bool, role: str
) -> None:
    await grant(consents.rig.sql)
    assert await consents.resolve() is True
    await consents.rig.sql.execute(f"SET session_replication_role = {role}")
    await consents.rig.sql.execute(statement)
    await consents.feed.poll()
    assert await consents.resolve() is expected


async def test_new_consent_is_used_after_the_next_poll_of_the_feed(consents: Consents) -> None:
    assert await consents.resolve() is False
    await grant(consents.rig.sql)
    await consents.feed.poll()
    assert await consents.resolve() is True


async def test_change_of_one_user_leaves_the_others_and_all_keys_in_the_cache(consents: Consents) -> None:
    assert await consents.resolve(caller(user="u_2")) is False
    before = consents.rig.door.queries[QUERY]
    await grant(consents.rig.sql)
    await consents.feed.poll()
    assert consents.look(caller(user="u_2")) is False
    assert consents.rig.door.queries[QUERY] == before


async def test_cached_consent_is_served_during_an_outage_for_stale_seconds(consents: Consents) -> None:
    await grant(consents.rig.sql)
    assert await consents.resolve() is True
    await consents.rig.goes_down()
    consents.rig.clock.advance(STALE - 1)
    assert consents.look() is True
    assert consents.look(caller(user="u_2")) is Reason.APPROVALS_UNAVAILABLE
    consents.rig.clock.advance(2)
    assert consents.look() is Reason.APPROVALS_UNAVAILABLE


async def test_consent_that_has_changed_is_not_served_during_an_outage(consents: Consents) -> None:
    await grant(consents.rig.sql)
    assert await consents.resolve() is True
    await consents.rig.sql.execute("UPDATE keyproxy.consents SET revoked_at = now()")
    await consents.feed.poll()
    await consents.rig.goes_down()
    assert consents.look() is Reason.APPROVALS_UNAVAILABLE


async def test_stale_consent_is_served_while_the_feed_is_current_and_refreshed(consents: Consents) -> None:
    await grant(consents.rig.sql)
    await consents.feed.poll()
    assert await consents.resolve() is True
    consents.rig.clock.advance(FRESH + 1)
    assert consents.look() is None, "the feed is not current"
    await consents.feed.poll()
    assert consents.look() is True
    await until(lambda: consents.rig.door.queries[QUERY] == 2, "the refresh")


async def test_failed_lookup_is_unavailable_and_not_a_missing_consent(consents: Consents) -> None:
    await consents.rig.relay.cut()
    assert await consents.resolve() is Reason.APPROVALS_UNAVAILABLE
    await consents.rig.relay.mend()


async def test_number_of_users_in_memory_is_bounded(rig: Rig) -> None:
    cache = ConsentCache(rig.door, rig.door, Cache(entries_max=2), feed=rig.state, now=rig.clock)
    for user in ("u_1", "u_2", "u_3"):
        with pytest.raises(Missing) as missing:
            cache.has_consent(caller(user=user), "pay", rig.clock())
        await missing.value.fetch_missing()
        assert cache.has_consent(caller(user=user), "pay", rig.clock()) is False
    assert len(cache) == 2
    await cache.close()

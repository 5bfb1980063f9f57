"""The functions that proxies call: an approval is used once, whatever happens to a claim on its way."""

from __future__ import annotations

import asyncio
import collections
import random
import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from keyproxy.store.postgres.failures import NO_RESPONSE
from tests.store.approvals.approval_rows import (
    DIGEST,
    add_owner,
    approve,
    claim,
    decide,
    expire,
    new_claim,
    release,
    states,
)
from tests.store.harness import Sql, add_user, until_blocked

_CLIENTS = 16


@pytest.fixture
async def owner(sql: Sql) -> Sql:
    """The database with u_42 of acme, and their key."""
    await add_owner(sql)
    return sql


@pytest.fixture
async def clients(dsn: str, owner: Sql) -> AsyncIterator[list[Sql]]:
    """Connections of several proxies."""
    del owner
    made = [await asyncpg.connect(dsn) for _ in range(_CLIENTS)]
    yield made
    for one in made:
        one.terminate()


# -- one claim after another


async def test_first_claim_requests_an_approval_and_repeated_ones_report_the_same(owner: Sql) -> None:
    first = await claim(owner)
    assert (first["outcome"], first["waited_seconds"]) == ("pending", None)
    again = await claim(owner)
    assert tuple(again)[:3] == tuple(first)[:3]
    assert await states(owner) == ["pending"]


async def test_approved_call_is_used_once_and_then_needs_another_approval(owner: Sql) -> None:
    approval = await approve(owner)
    used = await claim(owner)
    assert (used["outcome"], used["approval_id"]) == ("used", approval)
    assert used["waited_seconds"] >= 0
    after = await claim(owner)
    assert after["outcome"] == "pending"
    assert after["approval_id"] != approval
    assert await states(owner) == ["used", "pending"]


async def test_approval_is_of_one_call_only(owner: Sql) -> None:
    await approve(owner)
    assert (await claim(owner, b"e" * 32))["outcome"] == "pending"
    assert await states(owner) == ["approved"]


async def test_denied_call_is_refused_until_the_denial_expires(owner: Sql) -> None:
    await claim(owner)
    denied = await decide(owner, "denied")
    assert tuple(await claim(owner))[:2] == ("denied", denied)
    await expire(owner, denied)
    assert (await claim(owner))["outcome"] == "pending"
    assert await states(owner) == ["expired", "pending"]


@pytest.mark.parametrize("state", ["pending", "approved", "denied"])
async def test_expired_approval_of_any_state_is_neither_used_nor_an_obstacle(owner: Sql, state: str) -> None:
    first = (await claim(owner))["approval_id"]
    if state != "pending":
        await decide(owner, state)
    await expire(owner, first)
    after = await claim(owner)
    assert after["outcome"] == "pending"
    assert after["approval_id"] != first
    assert await states(owner) == ["expired", "pending"]


async def test_repeated_claim_has_the_same_outcome_and_uses_nothing_more(owner: Sql) -> None:
    approval, value = await approve(owner), new_claim()
    for _ in range(3):
        assert tuple(await claim(owner, claim=value))[:2] == ("used", approval)
    assert await states(owner) == ["used"]


async def test_claim_for_a_user_that_is_gone_or_of_another_tenant_makes_no_row(owner: Sql) -> None:
    await add_user(owner, "u_9", "other")
    for tenant, user in (("acme", "u_1"), ("acme", "u_9"), ("other", "u_42"), ("none", "u_42")):
        assert (await claim(owner, tenant=tenant, user=user))["outcome"] == "gone"
    assert await owner.fetchval("SELECT count(*) FROM keyproxy.approvals") == 0


async def test_summary_gets_the_hint_of_the_key(owner: Sql) -> None:
    await claim(owner)
    assert await owner.fetchval("SELECT summary ->> 'key_hint' FROM keyproxy.approvals") == "kp_live_…aaaa"
    await claim(owner, b"e" * 32, key="key_unknown")
    assert await owner.fetchval("SELECT summary ->> 'key_hint' FROM keyproxy.approvals WHERE key_id <> 'key_1'") is None


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_snapshot_of_an_earlier_moment_uses_nothing(owner: Sql, level: str) -> None:
    await approve(owner)
    for attempt in (lambda: claim(owner), lambda: release(owner, new_claim())):
        await owner.execute(f"BEGIN ISOLATION LEVEL {level}")
        with pytest.raises(asyncpg.PostgresError, match="read committed"):
            await attempt()
        await owner.execute("ROLLBACK")
    assert await states(owner) == ["approved"]


# -- many claims at the same time


async def test_of_many_concurrent_claims_of_one_approval_one_succeeds(owner: Sql, clients: list[Sql]) -> None:
    for _ in range(20):
        digest = secrets.token_bytes(32)
        await approve(owner, digest)
        found = await asyncio.gather(*(claim(one, digest) for one in clients))
        assert collections.Counter(row["outcome"] for row in found) == {"used": 1, "pending": _CLIENTS - 1}
        assert await states(owner, digest) == ["used", "pending"]
        await owner.execute("DELETE FROM keyproxy.approvals")


async def test_concurrent_first_claims_of_one_call_make_one_approval_and_one_event(
    owner: Sql, clients: list[Sql]
) -> None:
    found = await asyncio.gather(*(claim(one) for one in clients))
    assert {row["outcome"] for row in found} == {"pending"}
    assert len({row["approval_id"] for row in found}) == 1
    assert await owner.fetchval("SELECT count(*) FROM keyproxy.events WHERE kind = 'approval.requested'") == 1


async def test_user_has_exactly_the_maximum_of_pending_approvals_after_concurrent_claims(
    owner: Sql, clients: list[Sql]
) -> None:
    await add_user(owner, "u_2")
    claims = [claim(one, secrets.token_bytes(32), pending_max=5) for one in clients]
    others = [await claim(owner, secrets.token_bytes(32), user="u_2", pending_max=5)]
    found = await asyncio.gather(*claims)
    assert collections.Counter(row["outcome"] for row in found) == {"pending": 5, "limit": _CLIENTS - 5}
    assert {row["approval_id"] for row in found if row["outcome"] == "limit"} == {None}
    assert [row["outcome"] for row in others] == ["pending"], "the bound is per user"
    pending = await owner.fetchval("SELECT count(*) FROM keyproxy.approvals WHERE user_id = 'u_42'")
    assert pending == 5


async def test_decided_and_expired_approvals_do_not_count_as_pending(owner: Sql) -> None:
    await approve(owner, b"a" * 32, pending_max=1)
    second = await claim(owner, b"b" * 32, pending_max=1)
    assert (await claim(owner, b"c" * 32, pending_max=1))["outcome"] == "limit"
    assert (await claim(owner, b"b" * 32, pending_max=1))["outcome"] == "pending", "it is reported at the bound too"
    assert (await claim(owner, b"a" * 32, pending_max=1))["outcome"] == "used"
    await expire(owner, second["approval_id"])
    assert (await claim(owner, b"c" * 32, pending_max=1))["outcome"] == "pending"


async def test_claims_of_a_user_that_is_deleted_meanwhile_make_no_row_and_no_deadlock(
    owner: Sql, clients: list[Sql]
) -> None:
    begun = asyncio.Event()

    async def claims(client: Sql) -> set[str]:
        outcomes: set[str] = set()
        while "gone" not in outcomes:
            outcomes.add((await claim(client, secrets.token_bytes(32), pending_max=100))["outcome"])
            begun.set()
        return outcomes

    async def deletes() -> None:
        await begun.wait()
        await owner.execute("DELETE FROM keyproxy.tenants WHERE id = 'acme'")

    *found, _ = await asyncio.gather(*(claims(one) for one in clients), deletes())
    assert set().union(*(one for one in found if one)) <= {"pending", "limit", "gone"}
    assert await owner.fetchval("SELECT count(*) FROM keyproxy.approvals") == 0


async def test_claim_does_not_wait_for_a_locked_user_longer_than_a_second(owner: Sql, clients: list[Sql]) -> None:
    async with owner.transaction():
        await owner.execute("UPDATE keyproxy.users SET plan_id = NULL")
        async with asyncio.timeout(3):
            assert (await claim(clients[0]))["outcome"] == "busy"


# -- giving back


async def test_given_back_approval_is_used_again_by_the_next_claim_with_its_old_expiry(owner: Sql) -> None:
    approval, value = await approve(owner), new_claim()
    before = await owner.fetchval("SELECT expires_at FROM keyproxy.approvals")
    await claim(owner, claim=value)
    assert await release(owner, value) == "released"
    assert await states(owner) == ["approved"]
    assert tuple(await claim(owner))[:3] == ("used", approval, before)


async def test_giving_back_again_changes_nothing(owner: Sql) -> None:
    await approve(owner)
    value, later = new_claim(), new_claim()
    await claim(owner, claim=value)
    assert [await release(owner, value) for _ in range(3)] == ["released", "gone", "gone"]
    await claim(owner, claim=later)
    assert await release(owner, value) == "gone"
    assert await states(owner) == ["used"], "the claim of another request is not given back"


async def test_claim_value_alone_authorises_giving_back(owner: Sql) -> None:
    await approve(owner)
    await claim(owner)
    for digest in (None, DIGEST):
        assert await release(owner, new_claim(), digest) == "gone"
    assert await states(owner) == ["used"]


async def test_expired_approval_is_not_given_back(owner: Sql) -> None:
    approval, value = await approve(owner), new_claim()
    await claim(owner, claim=value)
    await expire(owner, approval)
    assert await release(owner, value) == "gone"
    assert await states(owner) == ["used"]


async def test_giving_back_replaces_a_pending_request_for_the_same_call(owner: Sql) -> None:
    await approve(owner)
    value = new_claim()
    await claim(owner, claim=value)
    assert (await claim(owner))["outcome"] == "pending"
    assert await release(owner, value) == "released"
    assert await states(owner) == ["approved", "expired"]
    assert [(await claim(owner))["outcome"] for _ in range(2)] == ["used", "pending"]


async def test_two_approvals_of_one_call_are_used_one_after_the_other(owner: Sql) -> None:
    await approve(owner)
    value = new_claim()
    await claim(owner, claim=value)
    await approve(owner)
    assert await release(owner, value) == "waiting"
    assert await states(owner) == ["used", "approved"]
    assert (await claim(owner))["outcome"] == "used"
    assert await release(owner, value) == "released"
    assert [(await claim(owner))["outcome"] for _ in range(2)] == ["used", "pending"]


async def test_denial_meanwhile_withdraws_an_approval_that_is_given_back(owner: Sql) -> None:
    await approve(owner)
    value = new_claim()
    await claim(owner, claim=value)
    await claim(owner)
    await decide(owner, "denied")
    assert await release(owner, value) == "gone"
    assert await states(owner) == ["expired", "denied"]
    assert (await claim(owner))["outcome"] == "denied"


async def test_expired_denial_or_approval_does_not_stop_giving_back(owner: Sql) -> None:
    for state in ("denied", "approved"):
        digest, value = secrets.token_bytes(32), new_claim()
        await approve(owner, digest)
        await claim(owner, digest, claim=value)
        second = (await claim(owner, digest))["approval_id"]
        await decide(owner, state, digest)
        await expire(owner, second)
        assert await release(owner, value) == "released"
        assert await states(owner, digest) == ["approved", "expired"]


# -- claims whose reply was lost


async def test_claim_that_arrives_after_it_was_given_back_fails(owner: Sql) -> None:
    value = new_claim()
    await claim(owner)
    assert await release(owner, value, DIGEST) == "gone"
    await decide(owner, "approved")
    with pytest.raises(asyncpg.PostgresError, match="given back already"):
        await claim(owner, claim=value)
    assert await states(owner) == ["approved"]
    assert (await claim(owner))["outcome"] == "used"


async def test_claim_that_is_not_committed_yet_is_given_back_once_it_is(owner: Sql, clients: list[Sql]) -> None:
    await approve(owner)
    value = new_claim()
    claiming = owner.transaction()
    await claiming.start()
    assert (await claim(owner, claim=value))["outcome"] == "used"
    releasing = asyncio.create_task(release(clients[0], value, DIGEST))
    await until_blocked(clients[1], "release_approval")
    await claiming.commit()
    assert await releasing == "released"
    assert await states(owner) == ["approved"]


async def test_claim_that_waits_for_its_own_release_fails(owner: Sql, clients: list[Sql]) -> None:
    await approve(owner)
    value = new_claim()
    releasing = owner.transaction()
    await releasing.start()
    await release(owner, value, DIGEST)
    claiming = asyncio.create_task(claim(clients[0], claim=value))
    await until_blocked(clients[1], "claim_approval")
    await releasing.commit()
    with pytest.raises(asyncpg.PostgresError, match="given back already"):
        await claiming
    assert await states(owner) == ["approved"]


class Client:
    """A proxy that claims, and executes what it was granted, gives it back, or loses its connection in between."""

    def __init__(self, dsn: str, chance: random.Random) -> None:
        self._dsn = dsn
        self._chance = chance
        self._sql: Sql | None = None
        self.executions = self.released = self.lost = 0

    async def connection(self) -> Sql:
        """Its connection, a new one if the last one was lost."""
        if self._sql is None or self._sql.is_closed():
            self._sql = await asyncpg.connect(self._dsn)
        return self._sql

    async def run(self, digests: list[bytes], is_over: asyncio.Event) -> None:
        """Claim approvals of these calls."""
        while not is_over.is_set():
            digest, value = self._chance.choice(digests), new_claim()
            try:
                outcome = (await claim(await self.connection(), digest, claim=value))["outcome"]
            except NO_RESPONSE:
                self.lost += 1
                self.end()
                await self._gives_back(value, digest)
                continue
            if outcome != "used":
                await asyncio.sleep(0.005)
            elif self._chance.random() < 0.5:
                await self._gives_back(value, None)
            else:
                self.executions += 1
        self.end()

    def end(self) -> None:
        """Close its connection."""
        if self._sql is not None:
            self._sql.terminate()

    async def _gives_back(self, value: bytes, digest: bytes | None) -> None:
        while True:
            try:
                outcome = await release(await self.connection(), value, digest)
            except NO_RESPONSE:
                self.end()
                continue
            self.released += outcome == "released"
            if outcome != "busy":
                return


async def test_executions_never_exceed_approvals_over_many_clients_and_killed_backends(dsn: str, owner: Sql) -> None:
    chance, is_over, approvals = random.Random(7), asyncio.Event(), 0
    digests = [secrets.token_bytes(32) for _ in range(3)]
    clients = [Client(dsn, chance) for _ in range(8)]
    async with asyncio.TaskGroup() as group:
        for one in clients:
            group.create_task(one.run(digests, is_over))
        for _ in range(60):
            approvals += len(
                await owner.fetch(
                    "UPDATE keyproxy.approvals SET state = 'approved', decided_at = now() WHERE id = ANY (ARRAY("
                    "SELECT id FROM keyproxy.approvals WHERE state = 'pending' ORDER BY id FOR UPDATE)) RETURNING id"
                )
            )
            await owner.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND"
                " query LIKE '%claim_approval%' AND datname = current_database() ORDER BY random() LIMIT 1"
            )
            await asyncio.sleep(0.01)
        is_over.set()
    executions = sum(one.executions for one in clients)
    used = await owner.fetchval("SELECT count(*) FROM keyproxy.approvals WHERE state = 'used'")
    # A claim is given back once its own approval is the only live one of the call, so some may wait.
    assert executions <= used <= approvals
    assert min(approvals, executions, sum(one.released for one in clients), sum(one.lost for one in clients)) > 0

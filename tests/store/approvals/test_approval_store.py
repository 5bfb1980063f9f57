"""What a proxy does with approvals: refusals name the approval, and a claim whose reply is lost burns none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from keyproxy.ai.tools.tool_call import ToolClaim
from keyproxy.config.schema import Cache
from keyproxy.config.tools.tool_settings import ApprovalSettings
from keyproxy.model import TimeBudget
from keyproxy.platform import clock
from keyproxy.ports.tools import ApprovalRequest
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.approvals.approval_store import ApprovalStore
from keyproxy.store.approvals.cleanup import ApprovalCleanup
from keyproxy.store.approvals.consent_cache import ConsentCache
from keyproxy.store.identities.cache import FeedState
from tests import fakes
from tests.store.approvals.approval_rows import DIGEST, add_owner, claim, decide, expire, states
from tests.store.harness import Relay, Sql, StatementRunner, until_blocked
from tests.waiting import until


def request(digest: bytes = DIGEST, *, kind: str = "human") -> ApprovalRequest:
    """The call of a tool that needs an approval."""
    return ApprovalRequest(digest, fakes.identity(), "pay", kind, b'{"tool": "pay"}', "192.0.2.1")


class Proxy:
    """The approvals of one proxy, whose connections lead through a relay."""

    def __init__(self, dsn: str) -> None:
        self.main = StatementRunner(dsn, pool_size_max=1, statement_timeout_seconds=1.0)
        self.door = StatementRunner(dsn, pool_size_max=2, statement_timeout_seconds=1.0)
        consents = ConsentCache(self.door, self.main, Cache(), feed=FeedState(), now=clock.now)
        self.approvals = ApprovalStore(self.door, self.main, consents, clock.now)

    async def claim(self, digest: bytes = DIGEST) -> ToolClaim | Refusal:
        """The result of a claim."""
        try:
            return await self.approvals.claim(request(digest), TimeBudget())
        except Refusal as refusal:
            return refusal

    async def refusal(self, digest: bytes = DIGEST) -> Refusal:
        """The refusal of a claim."""
        refused = await self.claim(digest)
        assert isinstance(refused, Refusal)
        return refused

    async def granted(self, digest: bytes = DIGEST) -> ToolClaim:
        """A claim that succeeds."""
        granted = await self.claim(digest)
        assert isinstance(granted, ToolClaim)
        return granted


@pytest.fixture
async def proxy(relay: Relay, sql: Sql) -> AsyncIterator[Proxy]:
    """A running proxy, and u_42 of acme in the database."""
    await add_owner(sql)
    proxy = Proxy(relay.dsn)
    await proxy.main.open()
    await proxy.door.open()
    proxy.approvals.start()
    yield proxy
    await proxy.approvals.close()
    await proxy.door.close()
    await proxy.main.close()


async def test_refusal_names_the_approval_its_state_and_its_expiry(proxy: Proxy, sql: Sql) -> None:
    refused = await proxy.refusal()
    row = await sql.fetchrow("SELECT * FROM keyproxy.approvals")
    assert row is not None
    assert (refused.reason, refused.retry_after_seconds) == (Reason.APPROVAL_REQUIRED, 5)
    expiry = row["expires_at"].strftime("%Y-%m-%dT%H:%M:%SZ")
    assert refused.members == {
        "approval_id": row["id"], "approval_state": "pending", "approval_expires_at": expiry,
    }  # fmt: skip
    assert (row["user_id"], row["key_id"], row["agent_id"], row["client"]) == ("u_42", "key_of_u_42", None, "192.0.2.1")
    await decide(sql, "denied")
    refused = await proxy.refusal()
    assert refused.reason is Reason.APPROVAL_DENIED
    assert refused.members is not None
    assert (refused.members["approval_id"], refused.members["approval_state"]) == (row["id"], "denied")


async def test_refusal_at_the_bound_names_no_approval(proxy: Proxy) -> None:
    proxy.approvals.rules = ApprovalSettings(pending_max=1)
    await proxy.refusal()
    refused = await proxy.refusal(b"e" * 32)
    assert (refused.reason, refused.members) == (Reason.APPROVAL_REQUIRED, {"approval_state": "limit"})


async def test_approved_call_is_claimed_once_and_each_claim_has_its_own_value(proxy: Proxy, sql: Sql) -> None:
    await proxy.refusal()
    approval = await decide(sql, "approved")
    first = await proxy.granted()
    assert (first.approval_id, len(first.value)) == (approval, 16)
    assert (await proxy.refusal()).reason is Reason.APPROVAL_REQUIRED
    await decide(sql, "approved")
    assert (await proxy.granted()).value != first.value


async def test_claim_is_one_statement(proxy: Proxy, sql: Sql) -> None:
    await proxy.refusal()
    await decide(sql, "approved")
    await proxy.granted()
    assert proxy.door.queries == {"claim_approval": 2}


async def test_given_back_approval_is_approved_again(proxy: Proxy, sql: Sql) -> None:
    await proxy.refusal()
    await decide(sql, "approved")
    proxy.approvals.give_back(await proxy.granted())
    await until(lambda: proxy.approvals.releases.released == 1, "the approval is given back")
    assert await states(sql) == ["approved"]
    await proxy.granted()


async def test_approval_whose_claim_lost_its_reply_is_given_back(proxy: Proxy, relay: Relay, sql: Sql) -> None:
    await proxy.refusal()
    approval = await decide(sql, "approved")
    hold = proxy.door.hold("claim_approval")
    claiming = asyncio.create_task(proxy.claim())
    await hold.arrived.wait()
    assert await states(sql) == ["used"], "the server has executed the claim"
    claiming.cancel()
    await asyncio.wait([claiming])
    hold.release()
    await until(lambda: len(proxy.approvals.releases) == 0, "it is given back")
    assert await states(sql) == ["approved"]
    assert (await proxy.granted()).approval_id == approval


async def test_approval_is_not_burnt_by_a_network_that_stops_during_the_claim(
    proxy: Proxy, relay: Relay, sql: Sql
) -> None:
    await proxy.refusal()
    await decide(sql, "approved")
    relay.freeze()
    refused = await proxy.refusal()
    assert (refused.reason, refused.retry_after_seconds) == (Reason.APPROVALS_UNAVAILABLE, 2)
    # The claim may arrive now, before or after it is given back.
    relay.thaw()
    await until(lambda: len(proxy.approvals.releases) == 0, "it is given back", seconds=20)
    await until(lambda: _is_approved(sql), "the approval can be used", seconds=5)
    await proxy.granted()


async def _is_approved(sql: Sql) -> bool:
    return await states(sql) == ["approved"]


async def test_approval_is_not_burnt_by_a_killed_backend(proxy: Proxy, sql: Sql) -> None:
    await proxy.refusal()
    await decide(sql, "approved")
    async with sql.transaction():
        await sql.execute("SELECT FROM keyproxy.approvals FOR UPDATE")
        claiming = asyncio.create_task(proxy.refusal())
        await until_blocked(sql, "claim_approval")
        await sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%claim_approval%'"
            " AND pid <> pg_backend_pid() AND datname = current_database()"
        )
        assert (await claiming).reason is Reason.APPROVALS_UNAVAILABLE
    await until(lambda: len(proxy.approvals.releases) == 0, "it is given back", seconds=20)
    await proxy.granted()


async def test_while_the_store_is_down_nothing_is_claimed_and_what_is_to_be_given_back_waits(
    proxy: Proxy, relay: Relay, sql: Sql
) -> None:
    await proxy.refusal()
    await decide(sql, "approved")
    granted = await proxy.granted()
    await relay.cut()
    proxy.approvals.give_back(granted)
    assert (await proxy.refusal(b"e" * 32)).reason is Reason.APPROVALS_UNAVAILABLE
    assert await states(sql) == ["used"], "it stays used until the release is written"
    await relay.mend()
    await until(lambda: len(proxy.approvals.releases) == 0, "everything is given back", seconds=20)
    assert await states(sql) == ["approved"]


async def test_known_outage_refuses_at_once_without_a_statement(proxy: Proxy) -> None:
    proxy.main.is_down = True
    assert (await proxy.refusal()).reason is Reason.APPROVALS_UNAVAILABLE
    assert proxy.door.queries == {}
    assert len(proxy.approvals.releases) == 0


async def test_claim_of_a_locked_user_is_refused_as_unavailable(proxy: Proxy, sql: Sql) -> None:
    async with sql.transaction():
        await sql.execute("UPDATE keyproxy.users SET plan_id = NULL")
        assert (await proxy.refusal()).reason is Reason.APPROVALS_UNAVAILABLE
    assert (await proxy.refusal()).reason is Reason.APPROVAL_REQUIRED


async def test_closing_gives_back_what_is_waiting(proxy: Proxy, sql: Sql) -> None:
    await proxy.refusal()
    await decide(sql, "approved")
    granted = await proxy.granted()
    await proxy.approvals.releases.lasting.end()
    proxy.approvals.give_back(granted)
    await proxy.approvals.close()
    assert await states(sql) == ["approved"]


async def test_store_that_was_replaced_by_a_reload_hands_over_what_is_given_back(
    proxy: Proxy, relay: Relay, sql: Sql
) -> None:
    await proxy.refusal()
    await decide(sql, "approved")
    granted = await proxy.granted()
    after = Proxy(relay.dsn)
    await after.door.open()
    after.approvals.start()
    after.approvals.continue_from(proxy.approvals)
    await proxy.approvals.close()
    proxy.approvals.give_back(granted)
    await until(lambda: after.approvals.releases.released == 1, "the approval is given back")
    await after.approvals.close()
    await after.door.close()
    assert await states(sql) == ["approved"]


async def test_time_of_a_claim_is_deducted_from_the_patience_of_the_request(proxy: Proxy, relay: Relay) -> None:
    await proxy.refusal()
    patience = TimeBudget()
    patience.seconds_left = 0.3
    relay.freeze()
    with pytest.raises(Refusal) as refused:
        await proxy.approvals.claim(request(), patience)
    assert refused.value.reason is Reason.APPROVALS_UNAVAILABLE
    assert patience.seconds_left < 0.05
    relay.thaw()


async def test_ended_rows_are_kept_for_30_days_and_deleted_in_portions(proxy: Proxy, sql: Sql) -> None:
    cleanup = ApprovalCleanup(proxy.door)
    for number in range(5):
        await claim(sql, bytes([number]) * 32)
    await sql.execute(
        "UPDATE keyproxy.approvals SET expires_at = now() - interval '29 days' WHERE call_digest < '\\x03';"
        "UPDATE keyproxy.approvals SET expires_at = now() - interval '31 days' WHERE call_digest >= '\\x03';"
        "UPDATE keyproxy.events SET expires_at = now() - interval '31 days'"
        " WHERE id IN (SELECT id FROM keyproxy.events LIMIT 2);"
        "INSERT INTO keyproxy.consents (id, user_id, tool, granted_by, created_at, expires_at, revoked_at) SELECT"
        " 'cns_' || lpad(d::text, 22, '0'), 'u_42', 'pay', 'x', now() - interval '40 days', now() + interval '1 day',"
        " now() - d * interval '1 day' FROM unnest(ARRAY[29, 31]) AS d;"
        "INSERT INTO keyproxy.released_claims VALUES ('\\x00112233445566778899aabbccddeeff', now() - interval '2 days')"
    )
    audited = await sql.fetchval("SELECT count(*) FROM keyproxy.audit_log")
    while await cleanup.tend(1):
        pass
    counts = {
        table: await sql.fetchval(f"SELECT count(*) FROM keyproxy.{table}")
        for table in ("approvals", "consents", "events", "released_claims")
    }
    assert counts == {"approvals": 3, "consents": 1, "events": 3, "released_claims": 0}
    assert {row["state"] for row in await sql.fetch("SELECT state FROM keyproxy.approvals")} == {"expired"}
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.audit_log") == audited, "cleanup is no change by anyone"


async def test_give_back_of_an_expired_approval_ends(proxy: Proxy, sql: Sql) -> None:
    await proxy.refusal()
    approval = await decide(sql, "approved")
    granted = await proxy.granted()
    await expire(sql, approval)
    proxy.approvals.give_back(granted)
    await until(lambda: len(proxy.approvals.releases) == 0, "it is not retried")
    assert await states(sql) == ["used"]

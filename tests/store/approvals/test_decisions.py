"""Operators decide on approvals, and grant and revoke consents, each within its tenant."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.tools.tool_settings import ApprovalSettings
from keyproxy.store.directory.directory import (
    Actor,
    ApprovalFilter,
    Conflict,
    ConsentFilter,
    Directory,
    Invalid,
    NotFound,
    NotPermitted,
)
from keyproxy.store.postgres.database import Database
from tests.store.approvals.approval_rows import DIGEST, add_owner, claim, expire, release
from tests.store.harness import Sql, add_user

RULES = ApprovalSettings(pending_seconds=700, use_seconds=200)


@pytest.fixture
async def directory(database: Database, sql: Sql) -> Directory:
    """The directory, with u_42 of acme and u_9 of other."""
    await add_owner(sql)
    await add_user(sql, "u_9", "other")
    return Directory(database, KeyFormat(), Actor("ann", "desk"), approvals=RULES)


@pytest.fixture
def bound(database: Database) -> Directory:
    """The directory of tenant acme."""
    return Directory(database, KeyFormat(), Actor("token:t", "desk"), tenant_id="acme", approvals=RULES)


async def ask(sql: Sql, digest: bytes = DIGEST, **changes: object) -> str:
    """Ask for an approval, and return its id."""
    approval: str = (await claim(sql, digest, **changes))["approval_id"]
    return approval


async def seconds_left(sql: Sql) -> float:
    """The remaining lifetime of the only approval."""
    return float(
        await sql.fetchval("SELECT extract(epoch FROM expires_at - clock_timestamp()) FROM keyproxy.approvals")
    )


async def test_approval_can_be_used_within_use_seconds_after_the_decision(directory: Directory, sql: Sql) -> None:
    approval = await directory.approvals.approve(await ask(sql), reason="looks right")
    assert approval["state"] == "approved"
    assert (approval["decided_by"], approval["reason"], approval["kind"]) == ("ann", "looks right", "human")
    assert approval["summary"] == {"tool": "pay", "key_hint": "kp_live_…aaaa"}
    assert approval["call_digest"] == DIGEST.hex()
    assert 198 < await seconds_left(sql) <= 200
    assert (await claim(sql))["outcome"] == "used"


async def test_denial_holds_for_pending_seconds(directory: Directory, sql: Sql) -> None:
    assert (await directory.approvals.deny(await ask(sql)))["state"] == "denied"
    assert 698 < await seconds_left(sql) <= 700
    assert (await claim(sql))["outcome"] == "denied"


@pytest.mark.parametrize("decision", ["approve", "deny"])
async def test_same_decision_again_changes_nothing(directory: Directory, sql: Sql, decision: str) -> None:
    approval = await ask(sql)
    first = await getattr(directory.approvals, decision)(approval, reason="a")
    rows = await sql.fetchval("SELECT count(*) FROM keyproxy.audit_log")
    assert await getattr(directory.approvals, decision)(approval, reason="b") == first
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.audit_log") == rows
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.events WHERE kind = 'approval.decided'") == 1


async def test_denial_withdraws_an_unused_approval(directory: Directory, sql: Sql) -> None:
    approval = await ask(sql)
    await directory.approvals.approve(approval)
    assert (await directory.approvals.deny(approval))["state"] == "denied"
    assert (await claim(sql))["outcome"] == "denied"


async def test_every_other_decision_is_a_conflict(directory: Directory, sql: Sql) -> None:
    denied = await ask(sql, b"1" * 32)
    await directory.approvals.deny(denied)
    with pytest.raises(Conflict, match="is denied and cannot be approved"):
        await directory.approvals.approve(denied)
    used = await ask(sql, b"2" * 32)
    await directory.approvals.approve(used)
    await claim(sql, b"2" * 32)
    expired = await ask(sql, b"3" * 32)
    await expire(sql, expired)
    for approval in (used, expired):
        for decide in (directory.approvals.approve, directory.approvals.deny):
            with pytest.raises(Conflict):
                await decide(approval)


async def test_of_concurrent_decisions_and_claims_at_most_one_call_runs(
    directory: Directory, sql: Sql, dsn: str
) -> None:
    other: Sql = await asyncpg.connect(dsn)
    for number in range(20):
        digest = bytes([number]) * 32
        approval = await ask(sql, digest)
        await directory.approvals.approve(approval)
        used, denied = await asyncio.gather(
            claim(other, digest), directory.approvals.deny(approval), return_exceptions=True
        )
        assert not isinstance(used, BaseException)
        # Either the call runs, or the denial withdraws it.
        assert (used["outcome"] == "used") is isinstance(denied, Conflict)
    await other.close()


async def test_unknown_approval_is_not_found(directory: Directory) -> None:
    for act in (directory.approvals.get, directory.approvals.approve, directory.approvals.deny):
        with pytest.raises(NotFound):
            await act("apr_" + "0" * 22)


async def test_bound_directory_sees_and_decides_the_approvals_of_its_tenant_only(
    directory: Directory, bound: Directory, sql: Sql
) -> None:
    own, other = await ask(sql), await ask(sql, b"e" * 32, user="u_9", tenant="other")
    assert (await bound.approvals.approve(own))["state"] == "approved"
    for act in (bound.approvals.get, bound.approvals.approve, bound.approvals.deny):
        with pytest.raises(NotFound):
            await act(other)
    assert [row["id"] for row in (await bound.approvals.list_page(None, 9)).items] == [own]
    assert (await bound.approvals.list_page(None, 9, ApprovalFilter(tenant="other"))).items == []
    assert (await directory.approvals.get(other))["state"] == "pending"


async def test_bound_directory_decides_no_approvals_of_kind_admin(
    directory: Directory, bound: Directory, sql: Sql
) -> None:
    approval = await ask(sql, kind="admin")
    assert (await bound.approvals.get(approval))["kind"] == "admin"
    for decide in (bound.approvals.approve, bound.approvals.deny):
        with pytest.raises(NotPermitted):
            await decide(approval)
    assert (await directory.approvals.approve(approval))["state"] == "approved"


async def test_lists_are_paged_newest_first_and_filtered_by_the_state_as_of_now(directory: Directory, sql: Sql) -> None:
    ids = [await ask(sql, bytes([number]) * 32) for number in range(5)]
    await expire(sql, ids[0])
    await directory.approvals.approve(ids[1])
    found, cursor = [], None
    while True:
        page = await directory.approvals.list_page(cursor, 2)
        found += [row["id"] for row in page.items]
        if (cursor := page.next) is None:
            break
    assert found == ids[::-1]
    states = {"pending": 3, "approved": 1, "expired": 1, "used": 0, "denied": 0}
    for state, count in states.items():
        assert len((await directory.approvals.list_page(None, 9, ApprovalFilter(state))).items) == count
    assert (await directory.approvals.list_page(None, 9, ApprovalFilter(user="u_9"))).items == []
    for wrong in (ApprovalFilter("unknown"), ApprovalFilter()):
        with pytest.raises(Invalid):
            await directory.approvals.list_page("x" if wrong.state is None else None, 9, wrong)


async def test_reason_of_a_decision_has_at_most_500_characters(directory: Directory, sql: Sql) -> None:
    approval = await ask(sql)
    with pytest.raises(Invalid, match="500 characters"):
        await directory.approvals.deny(approval, reason="x" * 501)
    assert (await directory.approvals.deny(approval, reason="x" * 500))["reason"] == "x" * 500


async def test_every_step_of_an_approval_is_in_the_audit_log_without_summary_and_claim(
    directory: Directory, sql: Sql
) -> None:
    value = b"c" * 16
    await directory.approvals.approve(await ask(sql, kind="admin", summary='{"arguments": "visible"}'))
    await claim(sql, claim=value)
    await release(sql, value)
    rows = await sql.fetch(
        "SELECT action, actor, tenant_id, after ->> 'state' AS state, before::text || after::text AS text"
        " FROM keyproxy.audit_log WHERE entity = 'approval' ORDER BY id"
    )
    assert [tuple(row)[:4] for row in rows] == [
        ("insert", "key:key_1", "acme", "pending"),
        ("update", "ann", "acme", "approved"),
        ("update", "key:key_1", "acme", "used"),
        ("update", "key:key_1", "acme", "approved"),
    ]
    for row in rows[1:]:
        assert "visible" not in row["text"]
        assert value.hex() not in row["text"]
        assert DIGEST.hex() in row["text"]


# -- consents


async def test_approval_of_kind_consent_can_grant_a_consent_too(directory: Directory, sql: Sql) -> None:
    approval = await directory.approvals.approve(await ask(sql, kind="consent"), consent_for=timedelta(days=30))
    consent = approval["consent"]
    assert {name: consent[name] for name in ("state", "user", "tenant", "tool", "agent", "granted_by")} == {
        "state": "live", "user": "u_42", "tenant": "acme", "tool": "pay", "agent": "crawler", "granted_by": "ann",
    }  # fmt: skip
    other = await ask(sql, b"e" * 32)
    with pytest.raises(Invalid, match="no consent is possible"):
        await directory.approvals.approve(other, consent_for=timedelta(days=30))
    assert (await directory.approvals.get(other))["state"] == "pending"


async def test_revoked_consent_stays_revoked(directory: Directory) -> None:
    consent = await directory.consents.grant("u_42", "pay", expires_in=timedelta(days=1))
    revoked = await directory.consents.revoke(consent["id"])
    assert revoked["state"] == "revoked"
    assert await directory.consents.revoke(consent["id"]) == revoked
    assert await directory.consents.get(consent["id"]) == revoked


async def test_new_consent_takes_the_place_of_the_live_one(directory: Directory) -> None:
    first = await directory.consents.grant("u_42", "pay", expires_in=timedelta(days=1))
    agent = await directory.consents.grant("u_42", "pay", expires_in=timedelta(days=1), agent="crawler")
    second = await directory.consents.grant("u_42", "pay", expires_in=timedelta(days=2))
    live = await directory.consents.list_page(None, 9, ConsentFilter("live"))
    assert {one["id"] for one in live.items} == {agent["id"], second["id"]}
    assert (await directory.consents.get(first["id"]))["state"] == "revoked"


@pytest.mark.parametrize(
    ("tool", "agent", "days"),
    [("", None, 1), ("a b", None, 1), ("a" * 129, None, 1), ("pay", "a b", 1), ("pay", None, 0), ("pay", None, 367)],
)
async def test_invalid_consent_is_refused(directory: Directory, tool: str, agent: str | None, days: int) -> None:
    with pytest.raises(Invalid):
        await directory.consents.grant("u_42", tool, expires_in=timedelta(days=days), agent=agent)
    assert (await directory.consents.list_page(None, 9)).items == []


async def test_consent_of_366_days_is_the_longest(directory: Directory, sql: Sql) -> None:
    await directory.consents.grant("u_42", "pay", expires_in=timedelta(days=366))
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute("UPDATE keyproxy.consents SET expires_at = created_at + interval '366 days 1 second'")


async def test_user_has_at_most_64_live_consents_after_concurrent_grants(directory: Directory, sql: Sql) -> None:
    grants = [directory.consents.grant("u_42", f"tool_{number}", expires_in=timedelta(days=1)) for number in range(70)]
    results = await asyncio.gather(*grants, return_exceptions=True)
    refused = [one for one in results if isinstance(one, BaseException)]
    assert len(refused) == 6
    assert all(isinstance(one, Conflict) for one in refused)
    live = (await directory.consents.list_page(None, 100, ConsentFilter("live"))).items
    assert len(live) == 64
    await directory.consents.revoke(live[0]["id"])
    await directory.consents.grant("u_42", "one_more", expires_in=timedelta(days=1))
    with pytest.raises(asyncpg.CheckViolationError, match="64 live consents"):
        await sql.execute("UPDATE keyproxy.consents SET revoked_at = NULL")


async def test_bound_directory_grants_and_sees_consents_of_its_tenant_only(
    directory: Directory, bound: Directory
) -> None:
    other = await directory.consents.grant("u_9", "pay", expires_in=timedelta(days=1))
    own = await bound.consents.grant("u_42", "pay", expires_in=timedelta(days=1))
    with pytest.raises(NotFound):
        await bound.consents.grant("u_9", "pay", expires_in=timedelta(days=1))
    for act in (bound.consents.get, bound.consents.revoke):
        with pytest.raises(NotFound):
            await act(other["id"])
    assert [one["id"] for one in (await bound.consents.list_page(None, 9)).items] == [own["id"]]


async def test_deleting_a_user_deletes_its_approvals_and_consents(directory: Directory, sql: Sql) -> None:
    await ask(sql)
    await directory.consents.grant("u_42", "pay", expires_in=timedelta(days=1))
    await directory.users.delete("u_42")
    for table in ("approvals", "consents"):
        assert await sql.fetchval(f"SELECT count(*) FROM keyproxy.{table}") == 0
    rows = await sql.fetch("SELECT entity, tenant_id FROM keyproxy.audit_log WHERE action = 'delete'")
    assert {("approval", "acme"), ("consent", "acme")} <= {tuple(row) for row in rows}

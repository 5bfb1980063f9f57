"""The authorization server deletes what has ended, and reports when it cannot."""

from __future__ import annotations

from keyproxy.authorize.endpoints import parts_of
from keyproxy.authorize.metrics import EXPIRED
from keyproxy.process.ops_listener import Verdict
from keyproxy.process.store_health import check_chores
from tests.authorize.authority import Authority
from tests.store.harness import Sql
from tests.store.oauth_rows import add_session


async def test_expired_sessions_are_deleted_and_counted_and_a_failure_is_reported(
    authority: Authority, sql: Sql
) -> None:
    parts = parts_of(authority.context)
    assert "oauth_cleanup" in parts.tasks
    await add_session(sql, expires="now() - interval '1 hour'")
    assert await parts.cleanup.tending.advance(parts.cleanup.tend) is False
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_sessions") == 0
    assert authority.counts.sessions_ended[EXPIRED] == 1
    assert check_chores([parts.cleanup.tending]).verdict is Verdict.OK
    await sql.execute("ALTER FUNCTION keyproxy.tend_oauth RENAME TO gone")
    try:
        await parts.cleanup.tending.advance(parts.cleanup.tend)
    finally:
        await sql.execute("ALTER FUNCTION keyproxy.gone RENAME TO tend_oauth")
    assert check_chores([parts.cleanup.tending]).verdict is Verdict.DEGRADED

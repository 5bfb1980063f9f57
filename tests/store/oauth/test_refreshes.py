"""Refresh tokens in the store: each verdict has its effect, whatever happens at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from keyproxy.model import Identity, Moment
from keyproxy.oauth.client import Client
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.reasons import Reason
from keyproxy.store.identities.identity_rows import TokenResources
from keyproxy.store.oauth.token_values import IssuedTokens, RefreshExchange
from keyproxy.store.oauth.tokens import SESSION_TOKENS_MAX, TokenStore
from keyproxy.store.postgres.database import Database, StoreUnavailable, Transaction
from tests.store.conftest import MakeRig
from tests.store.harness import Relay, Sql, until_blocked, until_row
from tests.store.oauth.token_requests import (
    CLIENT,
    OTHER_CLIENT,
    WallClock,
    error_of,
    exchange,
    outcomes,
    refreshed,
    token_store,
)
from tests.store.oauth_rows import RESOURCE, TEST_RESOURCE, add_code

SESSIONS = "SELECT count(*) FROM keyproxy.oauth_sessions"


@pytest.fixture
def clock() -> WallClock:
    return WallClock()


@pytest.fixture
def tokens(database: Database, clock: WallClock) -> TokenStore:
    return token_store(database, clock)


@pytest.fixture
async def issued(tokens: TokenStore, sql: Sql) -> IssuedTokens:
    return await tokens.redeem(CLIENT, exchange(await add_code(sql)))


async def test_refresh_issues_new_tokens_and_keeps_the_session(
    tokens: TokenStore, sql: Sql, issued: IssuedTokens
) -> None:
    again = await tokens.refresh(CLIENT, refreshed(issued))
    assert (again.session_id, again.scopes, again.expires_in) == (issued.session_id, issued.scopes, 900)
    assert again.refresh_token is not None
    assert issued.refresh_token is not None
    follows = "SELECT follows FROM keyproxy.oauth_refresh_tokens WHERE digest = $1"
    assert await sql.fetchval(follows, again.refresh_token.digest()) == issued.refresh_token.digest()


async def test_later_use_with_a_used_successor_ends_only_this_session(
    tokens: TokenStore, sql: Sql, clock: WallClock, issued: IssuedTokens
) -> None:
    other_device = await tokens.redeem(CLIENT, exchange(await add_code(sql, 2)))
    await tokens.refresh(CLIENT, refreshed(await tokens.refresh(CLIENT, refreshed(issued))))
    clock.advance(60.000001)
    with pytest.raises(OAuthError) as refusal:
        await tokens.refresh(CLIENT, refreshed(issued))
    assert (refusal.value.code, refusal.value.status) == ("invalid_grant", 400)
    assert [row["id"] for row in await sql.fetch("SELECT id FROM keyproxy.oauth_sessions")] == [other_device.session_id]
    deleted = await sql.fetchrow("SELECT actor, entity_id FROM keyproxy.audit_log WHERE action = 'delete'")
    assert deleted is not None
    assert tuple(deleted) == ("oauth:reuse", issued.session_id)


async def test_use_within_the_grace_issues_a_successor_beside_the_first(
    tokens: TokenStore, clock: WallClock, issued: IssuedTokens
) -> None:
    first = await tokens.refresh(CLIENT, refreshed(issued))
    await tokens.refresh(CLIENT, refreshed(first))
    clock.advance(60)
    second = await tokens.refresh(CLIENT, refreshed(issued))
    assert await error_of(tokens.refresh(CLIENT, refreshed(second))) == ""


async def test_later_use_without_a_used_successor_replaces_the_successors(
    tokens: TokenStore, sql: Sql, clock: WallClock, issued: IssuedTokens
) -> None:
    lost = await tokens.refresh(CLIENT, refreshed(issued))
    clock.advance(3600)
    found = await tokens.refresh(CLIENT, refreshed(issued))
    assert await error_of(tokens.refresh(CLIENT, refreshed(found))) == ""
    assert await error_of(tokens.refresh(CLIENT, refreshed(lost))) == "invalid_grant"
    assert await sql.fetchval(SESSIONS) == 0


async def test_two_processes_that_repeat_a_lost_use_together_both_continue(
    tokens: TokenStore, clock: WallClock, issued: IssuedTokens
) -> None:
    await tokens.refresh(CLIENT, refreshed(issued))
    clock.advance(3600)
    both = [await tokens.refresh(CLIENT, refreshed(issued)) for _ in range(2)]
    assert await outcomes(*(tokens.refresh(CLIENT, refreshed(one)) for one in both)) == ["", ""]


async def test_ninth_successor_is_refused_and_the_session_lives(
    tokens: TokenStore, sql: Sql, clock: WallClock, issued: IssuedTokens
) -> None:
    for _ in range(8):
        await tokens.refresh(CLIENT, refreshed(issued))
    with pytest.raises(OAuthError) as refusal:
        await tokens.refresh(CLIENT, refreshed(issued))
    assert (refusal.value.code, refusal.value.status) == ("temporarily_unavailable", 429)
    assert await sql.fetchval(SESSIONS) == 1
    clock.advance(61)
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == "invalid_grant"
    assert await sql.fetchval(SESSIONS) == 0


async def test_without_a_grace_the_second_use_ends_the_session(
    database: Database, sql: Sql, clock: WallClock, issued: IssuedTokens
) -> None:
    tokens = token_store(database, clock, refresh_grace_seconds=0)
    assert await outcomes(*(tokens.refresh(CLIENT, refreshed(issued)) for _ in range(2))) == ["", "invalid_grant"]
    assert await sql.fetchval(SESSIONS) == 0


async def test_two_processes_at_once_both_get_tokens_that_work(
    tokens: TokenStore, database: Database, clock: WallClock, issued: IssuedTokens
) -> None:
    other_process = token_store(database, clock)
    both = await asyncio.gather(*(one.refresh(CLIENT, refreshed(issued)) for one in (tokens, other_process)))
    assert len({one.access_token.digest() for one in both}) == 2
    assert await outcomes(*(tokens.refresh(CLIENT, refreshed(one)) for one in both)) == ["", ""]


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"resource": TEST_RESOURCE}, "invalid_target"), ({"scopes": frozenset({"jobs:read"})}, "invalid_scope")],
)
async def test_refused_request_uses_nothing(
    tokens: TokenStore, sql: Sql, issued: IssuedTokens, changes: dict[str, Any], error: str
) -> None:
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued, **changes))) == error
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_refresh_tokens WHERE used_at IS NULL") == 1


@pytest.mark.parametrize(
    "other", [OTHER_CLIENT, dataclasses.replace(CLIENT, client_id="listed:Acme")], ids=["another id", "another row"]
)
async def test_refresh_token_of_another_client_is_refused_without_effect(
    tokens: TokenStore, issued: IssuedTokens, other: Client
) -> None:
    assert await error_of(tokens.refresh(other, refreshed(issued))) == "invalid_grant"
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == ""


async def test_narrower_scopes_hold_for_one_access_token_alone(tokens: TokenStore, sql: Sql) -> None:
    await tokens.redeem(CLIENT, exchange(await add_code(sql)))
    await sql.execute("UPDATE keyproxy.oauth_grants SET scopes = '{jobs:read,jobs:write}'")
    digest = await add_code(sql, 2, scopes=("jobs:read", "jobs:write"))
    issued = await tokens.redeem(CLIENT, exchange(digest))
    narrow = await tokens.refresh(CLIENT, refreshed(issued, scopes=frozenset({"jobs:read", "other"})))
    assert narrow.scopes == ("jobs:read",)
    assert (await tokens.refresh(CLIENT, refreshed(narrow))).scopes == ("jobs:read", "jobs:write")


@pytest.mark.parametrize(("days", "error"), [(29.99, ""), (30.0, "invalid_grant")])
async def test_refresh_token_expires_when_it_was_not_used_for_its_time(
    tokens: TokenStore, sql: Sql, clock: WallClock, issued: IssuedTokens, days: float, error: str
) -> None:
    clock.advance(days * 86_400)
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == error
    assert await sql.fetchval(SESSIONS) == 1


async def test_session_ends_at_its_time_however_often_it_is_refreshed(
    tokens: TokenStore, clock: WallClock, issued: IssuedTokens
) -> None:
    for _ in range(4):
        clock.advance(22 * 86_400)
        issued = await tokens.refresh(CLIENT, refreshed(issued))
    clock.advance(2 * 86_400 - 100)
    issued = await tokens.refresh(CLIENT, refreshed(issued))
    assert issued.expires_in == 100
    clock.advance(100)
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == "invalid_grant"


@pytest.mark.parametrize("table", ["users", "tenants"])
async def test_disabled_account_refreshes_again_once_it_is_enabled(
    tokens: TokenStore, sql: Sql, issued: IssuedTokens, table: str
) -> None:
    await sql.execute(f"UPDATE keyproxy.{table} SET disabled_at = now()")
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == "invalid_grant"
    await sql.execute(f"UPDATE keyproxy.{table} SET disabled_at = NULL")
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == ""


async def test_session_has_at_most_64_access_tokens_and_the_oldest_goes(
    tokens: TokenStore, sql: Sql, clock: WallClock, issued: IssuedTokens
) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.oauth_access_tokens (digest, session_id, scopes, issued_at, expires_at)"
        " SELECT sha256(n::text::bytea), $1, '{}', $2::timestamptz + n * interval '1 ms', $2 + n * interval '1 ms'"
        "   + interval '900 s' FROM generate_series(2, $3) AS n",
        issued.session_id, clock.time, SESSION_TOKENS_MAX,
    )  # fmt: skip
    count = "SELECT count(*) FROM keyproxy.oauth_access_tokens WHERE expires_at > $1"
    assert await sql.fetchval(count, clock.time) == SESSION_TOKENS_MAX
    clock.advance(1)
    again = await tokens.refresh(CLIENT, refreshed(issued))
    assert await sql.fetchval(count, clock.time) == SESSION_TOKENS_MAX
    left = {row["digest"] for row in await sql.fetch("SELECT digest FROM keyproxy.oauth_access_tokens")}
    assert again.access_token.digest() in left
    assert issued.access_token.digest() not in left


async def test_outage_uses_no_refresh_token(relay: Relay, sql: Sql, issued: IssuedTokens, clock: WallClock) -> None:
    database = Database(relay.dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    tokens = token_store(database, clock)
    await relay.cut()
    with pytest.raises(StoreUnavailable):
        await tokens.refresh(CLIENT, refreshed(issued))
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_refresh_tokens WHERE used_at IS NULL") == 1
    await relay.mend()
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == ""
    await database.close()


async def test_proxies_refuse_every_access_token_of_a_session_that_a_stolen_token_has_ended(
    make_rig: MakeRig, tokens: TokenStore, clock: WallClock, issued: IssuedTokens
) -> None:
    rig = await make_rig(
        resources=TokenResources(RESOURCE, TEST_RESOURCE), now=lambda: Moment(clock.time.timestamp(), 5_000.0)
    )
    await rig.feed.poll()
    second = await tokens.refresh(CLIENT, refreshed(issued))
    third = await tokens.refresh(CLIENT, refreshed(second))
    secrets = [one.access_token for one in (issued, second, third)]
    for secret in secrets:
        found = await rig.resolve(secret)
        assert isinstance(found, Identity)
        assert found.key_id == issued.session_id
    clock.advance(61)
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == "invalid_grant"
    await rig.feed.poll()
    assert [await rig.resolve(secret) for secret in secrets] == [Reason.KEY_INVALID] * 3


class _LosingDatabase(Database):
    """A database whose reply to the end of a transaction is lost."""

    def __init__(self, relay: Relay) -> None:
        super().__init__(relay.dsn, pool_size_max=1, statement_timeout_seconds=5.0)
        self._relay = relay

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with super().transaction() as begun:
            yield begun
            self._relay.loses_replies = True


async def test_refresh_whose_reply_is_lost_can_be_repeated(
    relay: Relay, sql: Sql, tokens: TokenStore, issued: IssuedTokens, clock: WallClock
) -> None:
    losing = _LosingDatabase(relay)
    await losing.open()
    with pytest.raises(StoreUnavailable):
        await token_store(losing, clock).refresh(CLIENT, refreshed(issued))
    await until_row(sql, "SELECT FROM keyproxy.oauth_refresh_tokens WHERE used_at IS NOT NULL")
    clock.advance(3600)
    assert await error_of(tokens.refresh(CLIENT, refreshed(issued))) == ""
    await losing.close()


_PROGRAM = """
import asyncio, sys
from keyproxy.store.postgres.database import Database
from tests.store.oauth.token_requests import CLIENT, WallClock, token_store
from keyproxy.store.oauth.token_values import RefreshExchange

async def main():
    database = Database(sys.argv[1], pool_size_max=1, statement_timeout_seconds=60.0)
    await database.open()
    await token_store(database, WallClock()).refresh(CLIENT, RefreshExchange(bytes.fromhex(sys.argv[2])))

asyncio.run(main())
"""


async def test_process_that_is_killed_within_a_refresh_leaves_the_token_unused(
    dsn: str, sql: Sql, tokens: TokenStore, issued: IssuedTokens
) -> None:
    shown: RefreshExchange = refreshed(issued)
    async with sql.transaction():
        await sql.execute("SELECT FROM keyproxy.oauth_refresh_tokens FOR UPDATE")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _PROGRAM, dsn, shown.digest.hex())
        await until_blocked(sql, "SET used_at")
        process.send_signal(signal.SIGKILL)
        await process.wait()
    # Waits for the session, until the server has noticed that the process is gone.
    assert await error_of(tokens.refresh(CLIENT, shown)) == ""
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_refresh_tokens") == 2

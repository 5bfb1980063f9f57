"""The transactions of the authorization server when the database aborts one of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import asyncpg
import pytest

from keyproxy.oauth.client import Client, ClientKind
from keyproxy.store.oauth.authorizations import Authorizations, ConsentingUser, NewCode
from keyproxy.store.oauth.subjects import Subjects
from keyproxy.store.postgres.database import Database, Row, StoreUnavailable, Transaction
from tests.store.harness import Sql, add_user

CLIENT = Client("https://acme.example/client", "https://acme.example/client", ClientKind.DOCUMENT, "Acme", ())
CODE = NewCode(b"d" * 32, "https://acme.example/cb", b"c" * 32, resource="https://x/mcp", is_test=False, scopes=())


class Deadlocked:
    """A database that aborts this many transactions at their end, as the victims of deadlocks."""

    def __init__(self, database: Database, times: int) -> None:
        self._database = database
        self._times = times

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        return await self._database.fetch(name, *arguments)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with self._database.transaction() as transaction:
            yield transaction
            self._times -= 1
            if self._times >= 0:
                raise asyncpg.DeadlockDetectedError("deadlock detected")


async def test_what_a_browser_login_changes_is_repeated_after_a_deadlock(database: Database, sql: Sql) -> None:
    await add_user(sql, "u_1")

    def authorizations(times: int = 1) -> Authorizations:
        return Authorizations(Deadlocked(database, times))

    with pytest.raises(StoreUnavailable):
        await authorizations(3).consent(CLIENT, ConsentingUser("u_1"), CODE)
    assert not await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients"), "no attempt leaves a trace"
    assert (await authorizations().consent(CLIENT, ConsentingUser("u_1"), CODE)).is_new_client
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_codes") == 1
    assert await authorizations().end_session("u_1", "ses_unknown", is_test=False) == 0
    await authorizations().end_grants("u_1", None, is_test=False)
    assert not await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_grants")
    subjects = Subjects(Deadlocked(database, 1))
    assert await subjects.create("https://idp.example", "s", user_id="usr_1", tenant_id="acme") is not None

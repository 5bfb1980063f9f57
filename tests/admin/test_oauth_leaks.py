"""Leaked OAuth tokens and client secrets: sessions end, clients are named, from the database and through the API."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import AsyncIterator

import pytest

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.cli.remote.admin_client import AdminClient
from keyproxy.cli.remote.remote_directory import RemoteDirectory
from keyproxy.oauth.client import row_id
from keyproxy.store.directory.interface import DirectoryOperations
from keyproxy.store.postgres.database import Database
from tests.admin.conftest import FILE_TOKEN, Api, serving
from tests.admin.test_commands import Run, run
from tests.store.harness import Sql
from tests.store.oauth_rows import CLIENT, access_token, add_access_token, add_grant, session_id

__all__ = ["run"]

FORMAT = KeyFormat()
SECRET = FORMAT.make_client_secret(bytes(32))
WORKER = row_id("worker")


def refresh_token(number: int) -> SecretKey:
    return FORMAT.make_refresh_token(hashlib.sha256(b"%d" % number).digest())


@pytest.fixture
async def api(database: Database, sql: Sql) -> AsyncIterator[Api]:
    """An admin API over three sessions of a user, and a service of hers with a secret."""
    async with serving(database) as api:
        await api.user("u_42")
        for number in (1, 2, 3):
            await add_access_token(sql, number, session=number)
            await sql.execute(
                "INSERT INTO keyproxy.oauth_refresh_tokens (digest, session_id, expires_at, used_at, replaced_at)"
                " VALUES ($1, $2, now(), now(), now())",
                refresh_token(number).digest(), session_id(number),
            )  # fmt: skip
        await sql.execute(
            "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, auth_method, secret_digest)"
            " VALUES ($1, 'worker', 'registered', 'client_secret', $2)",
            WORKER, SECRET.digest(),
        )  # fmt: skip
        await add_grant(sql, 9, client_id="worker", is_service=True)
        yield api


@pytest.fixture(params=["database", "api"])
async def operations(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[DirectoryOperations]:
    """Each implementation of the port."""
    if request.param == "database":
        yield api.directory
        return
    async with AdminClient(api.url, FILE_TOKEN) as client:
        yield RemoteDirectory(client)


async def sessions(sql: Sql) -> list[str]:
    """The sessions that have not ended."""
    return [row["id"] for row in await sql.fetch("SELECT id FROM keyproxy.oauth_sessions ORDER BY id")]


OWNER = {"user": "u_42", "tenant": "acme"}


async def test_leaked_tokens_end_their_sessions_and_a_leaked_client_secret_names_its_client(
    operations: DirectoryOperations, sql: Sql
) -> None:
    secrets = [access_token(1), refresh_token(2), refresh_token(1), SECRET, refresh_token(99)]
    text = "\n".join(f"curl -H 'Authorization: Bearer {one.reveal().decode()}'" for one in secrets)
    truncated = refresh_token(3).reveal()[:-9].decode()
    report = await operations.leaked_keys.report_text(f"{text}\n{truncated}".encode(), "in a log")
    assert report == {
        "found": [
            *({"session": session_id(n), "client": CLIENT, **OWNER, "revoked_now": True} for n in (1, 2)),
            {"client": WORKER, **OWNER, "revoked_now": False},
        ],
        "incomplete": 1,
        "unknown": 1,
    }
    assert await sessions(sql) == [session_id(3)]
    assert not await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients WHERE disabled_at IS NOT NULL")
    again = await operations.leaked_keys.report_text(text.encode(), "")
    assert ([leak.get("session") for leak in again["found"]], again["unknown"]) == ([None], 4)


async def test_a_leaked_token_is_reported_by_itself_or_its_digest(operations: DirectoryOperations, sql: Sql) -> None:
    leaked = operations.leaked_keys
    for number, reporting in (
        (1, leaked.report_key(refresh_token(1), "")),
        (2, leaked.report_digest(access_token(2).digest(), "")),
    ):
        found = await reporting
        assert found == {
            "known": True, "revoked_now": True, **OWNER, "key": None, "session": session_id(number), "client": CLIENT,
        }  # fmt: skip
    assert await sessions(sql) == [session_id(3)]
    by_digest = await leaked.report_text(hashlib.sha256(access_token(3).reveal()).hexdigest().encode(), "")
    assert [leak["session"] for leak in by_digest["found"]] == [session_id(3)]
    found = await leaked.report_key(SECRET, "")
    assert (found["known"], found["revoked_now"], found["client"], "session" in found) == (True, False, WORKER, False)


async def test_a_bound_token_neither_finds_nor_ends_sessions_of_other_tenants(api: Api, sql: Sql) -> None:
    await api.directory.tenants.create("globex", "")
    bound = await api.token("leaks:write", tenant="globex")
    text = "\n".join(one.reveal().decode() for one in (access_token(1), refresh_token(2), SECRET))
    reply = await api.call("POST", "/v1/leaked-texts", {"text": text}, token=bound)
    assert (reply.status, reply.json) == (200, {"found": [], "incomplete": 0, "unknown": 3})
    assert len(await sessions(sql)) == 3


async def test_the_command_names_the_client_whose_secret_still_works(
    api: Api, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    del api
    text = b"%b %b" % (access_token(1).reveal(), SECRET.reveal())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    reported = await run("key", "report-leaked")
    assert session_id(1) in reported.out
    assert f"the secret of the client {WORKER} still works" in reported.err
    by_digest = await run("key", "report-leaked", "--digest", refresh_token(2).digest().hex(), "--json", by="api")
    assert json.loads(by_digest.out)["found"] == [
        {"session": session_id(2), "client": CLIENT, **OWNER, "revoked_now": True}
    ]

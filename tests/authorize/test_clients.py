"""A presented client id is registered, listed, a document or a value: the first match, at each use by the policy."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest

from keyproxy.authorize.clients.client_directory import Clients
from keyproxy.authorize.clients.document_fetcher import DocumentFetcher
from keyproxy.authorize.clients.documents import Documents
from keyproxy.config.oauth.client_rules import known_clients
from keyproxy.oauth.client import Client, ClientKind, row_id
from keyproxy.oauth.client_ids import encode_value_id
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.client_refusals import (
    ClientDisabled,
    ClientRefused,
    DocumentRefused,
    UnknownClient,
)
from keyproxy.oauth.known_clients import KnownClient, KnownClients
from keyproxy.store.oauth.clients import ClientRows
from keyproxy.store.postgres.database import Database, StoreUnavailable
from tests.authorize.authority import FakeClock
from tests.authorize.test_documents import TLS
from tests.store.harness import Sql
from tests.store.oauth_rows import add_client, add_code, add_refresh_token

URI = "https://acme.example/cb"
CLAUDE = "https://claude.ai/api/mcp/auth_callback"
CLAUDE_ID = "https://claude.ai/oauth/mcp-oauth-client-metadata"
CODE_ID = "https://claude.ai/oauth/claude-code-client-metadata"
VALUE = encode_value_id([URI], "Acme")


class Judge:
    """Clients over a database; every document leads to a private address, so that a fetch is refused."""

    def __init__(self, database: Database, **policy: Any) -> None:
        self.asked: list[str] = []
        rules = dataclasses.replace(ClientPolicy(known_clients(())), **policy)
        fetcher = DocumentFetcher((), TLS, resolve=self._resolve)
        documents = Documents(rules, fetcher, now=FakeClock().now, count=lambda _outcome: None)
        self.clients = Clients(rules, ClientRows(database), documents)

    async def _resolve(self, host: str, _port: int) -> list[str]:
        self.asked.append(host)
        return ["10.0.0.1"]

    async def kind(self, client_id: str, redirect_uri: str | None = URI) -> str:
        """The kind of a judged client and its id, or the error."""
        try:
            client = await self.clients.judge(client_id, redirect_uri)
        except ClientRefused as refused:
            return type(refused).__name__
        assert client.presented_as == client_id
        return f"{client.kind.value} {client.client_id}"

    async def presented(self, client_id: str, redirect_uri: str | None = None, **options: Any) -> Client | str:
        """A client of the token endpoint, or the error."""
        try:
            return await self.clients.presented(client_id, redirect_uri, **options)
        except ClientRefused as refused:
            return type(refused).__name__


@pytest.fixture
def judge(database: Database) -> Judge:
    return Judge(database)


async def test_first_match_decides_the_kind_of_a_client(judge: Judge, sql: Sql) -> None:
    await register(sql, "worker", URI)
    for client_id, redirect_uri, kind in (
        ("worker", URI, "registered worker"),
        ("worker", CLAUDE, "RedirectRefused"),
        # listed: by redirect URI, whatever id is presented, or by its own id
        ("stale-id-of-another-server", CLAUDE, "listed listed:Claude"),
        (VALUE, CLAUDE, "listed listed:Claude"),
        (encode_value_id([CLAUDE], "Not Claude"), CLAUDE, "listed listed:Claude"),
        ("https://evil.example/c", CLAUDE, "listed listed:Claude"),
        ("kpc1_broken", "https://chatgpt.com/connector/oauth/aB3", "listed listed:ChatGPT"),
        (CLAUDE_ID, CLAUDE, "listed listed:Claude"),
        (CODE_ID, "http://localhost:49152/callback", "listed listed:Claude Code"),
        # the redirect URI decides before the id does
        (CODE_ID, CLAUDE, "listed listed:Claude"),
        (CODE_ID, URI, "RedirectRefused"),
        # a scheme and a loopback address do not identify a program
        (VALUE, "cursor://anysphere.cursor-mcp/oauth/callback", "RedirectRefused"),
        ("stale", "http://localhost:8787/callback", "UnknownClient"),
        ("stale", "cursor://anysphere.cursor-mcp/oauth/callback", "UnknownClient"),
        ("listed:Claude", URI, "UnknownClient"),
        # value
        (VALUE, URI, f"value {VALUE}"),
        (VALUE, URI + "/", "RedirectRefused"),
        (VALUE, "https://acme.example/cb?x", "RedirectRefused"),
        (VALUE, "https://acme.example.evil.example/cb", "RedirectRefused"),
        (VALUE, None, "RedirectRefused"),
        (VALUE + "A", URI, "UnknownClient"),
        ("", URI, "UnknownClient"),
        ("a" * 2_001, URI, "UnknownClient"),
        ("w\u00f6rker", URI, "UnknownClient"),
        ("worker\0", URI, "UnknownClient"),
        ("unknown", URI, "UnknownClient"),
        ("http://acme.example/c", URI, "UnknownClient"),
        ("https://acme.example", URI, "UnknownClient"),
    ):
        assert await judge.kind(client_id, redirect_uri) == kind, (client_id, redirect_uri)
    assert judge.asked == []
    assert await judge.kind("https://acme.example/c") == DocumentRefused.__name__
    assert judge.asked == ["acme.example"]


async def register(sql: Sql, client_id: str, *uris: str) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, name, redirect_uris, auth_method)"
        " VALUES ($1, $2, 'registered', 'Worker', $3, 'none')",
        row_id(client_id), client_id, list(uris),
    )  # fmt: skip


async def test_loopback_port_of_a_native_program_is_free(judge: Judge) -> None:
    value = encode_value_id(["http://127.0.0.1:33418/cb"], "Native")
    for uri, kind in (
        ("http://127.0.0.1:49152/cb", f"value {value}"),
        ("http://127.0.0.1/cb", f"value {value}"),
        ("http://127.0.0.1:0/cb", "RedirectRefused"),
        ("http://127.0.0.1:99999/cb", "RedirectRefused"),
        ("http://localhost:49152/cb", "RedirectRefused"),
    ):
        assert await judge.kind(value, uri) == kind


async def test_policy_applies_at_each_use_of_an_id(database: Database) -> None:
    known = encode_value_id([CLAUDE, "http://localhost/callback"], "Claude Code")
    loopback = "http://localhost:1/callback"
    for policy, outcomes in (
        ({}, (f"value {VALUE}", f"value {known}", "DocumentRefused", "listed listed:Claude")),
        ({"registers": False}, ("UnknownClient", "UnknownClient", "DocumentRefused", "listed listed:Claude")),
        ({"registers_any": False}, ("UnknownClient", f"value {known}", "DocumentRefused", "listed listed:Claude")),
        (
            {"redirect_hosts": frozenset({"other.example"})},
            ("UnknownClient", f"value {known}", "DocumentRefused", "listed listed:Claude"),
        ),
        ({"accepts_documents": False}, (f"value {VALUE}", f"value {known}", "UnknownClient", "listed listed:Claude")),
        (
            {"document_hosts": frozenset({"other.example"})},
            (f"value {VALUE}", f"value {known}", "UnknownClient", "listed listed:Claude"),
        ),
        ({"known": KnownClients([])}, (f"value {VALUE}", f"value {known}", "DocumentRefused", "UnknownClient")),
    ):
        judge = Judge(database, **policy)
        assert (
            await judge.kind(VALUE),
            await judge.kind(known, loopback),
            await judge.kind("https://acme.example/c"),
            await judge.kind("stale", CLAUDE),
        ) == outcomes, policy


async def test_disabled_client_is_refused_before_its_document_is_fetched(judge: Judge, sql: Sql) -> None:
    document = "https://acme.example/c"
    await register(sql, "worker", URI)
    await add_client(sql, VALUE, "value")
    await add_client(sql, document, "document")
    await add_client(sql, "listed:Claude", "listed")
    await sql.execute("UPDATE keyproxy.oauth_clients SET disabled_at = now()")
    for client_id, uri in (("worker", URI), (VALUE, URI), (document, URI), ("any", CLAUDE), (CLAUDE_ID, CLAUDE)):
        assert await judge.kind(client_id, uri) == ClientDisabled.__name__
        assert await judge.presented(client_id, uri) == ClientDisabled.__name__
    assert judge.asked == []


async def test_row_of_another_kind_registers_nothing(judge: Judge, sql: Sql) -> None:
    """Rows follow from what clients present; only those of an operator make an id known."""
    await add_client(sql, "stale", "value")
    assert await judge.kind("stale") == UnknownClient.__name__
    assert await judge.presented("stale") == UnknownClient.__name__


async def test_token_endpoint_knows_a_client_by_what_was_issued_to_its_id(database: Database, sql: Sql) -> None:
    """A listed client that presented any id need not repeat its redirect URI, and no document is fetched."""
    judge, issued_to = Judge(database), "https://acme.example/client"
    code, refresh = await add_code(sql), await issued(sql)
    for digest in (code, refresh):
        client = await judge.presented(issued_to, credential=digest)
        assert isinstance(client, Client)
        assert (client.kind, client.presented_as) == (ClientKind.DOCUMENT, issued_to)
        # What was issued to one id is not valid for another one.
        assert await judge.presented("stale", credential=digest) == UnknownClient.__name__
    await sql.execute("UPDATE keyproxy.oauth_sessions SET presented_as = 'stale'")
    await sql.execute(
        "UPDATE keyproxy.oauth_grants SET client_id = $1", await add_client(sql, "listed:Claude", "listed")
    )
    listed = await judge.presented("stale", credential=refresh)
    assert isinstance(listed, Client)
    assert (listed.kind, listed.client_id, listed.presented_as) == (ClientKind.LISTED, "listed:Claude", "stale")
    assert await judge.presented("stale", credential=hashlib.sha256(b"other").digest()) == UnknownClient.__name__
    other = Judge(database, known=KnownClients([KnownClient("Other", (CLAUDE,))]))
    assert await other.presented("stale", credential=refresh) == UnknownClient.__name__
    await sql.execute("UPDATE keyproxy.oauth_clients SET disabled_at = now() WHERE kind = 'listed'")
    assert await judge.presented("stale", credential=refresh) == ClientDisabled.__name__
    assert judge.asked == []


async def issued(sql: Sql) -> bytes:
    await sql.execute(
        "INSERT INTO keyproxy.oauth_sessions (id, grant_id, presented_as, scopes, expires_at)"
        " SELECT 'ses_0000000000000000000001', id, 'https://acme.example/client', scopes, now() + interval '1 day'"
        " FROM keyproxy.oauth_grants"
    )
    return await add_refresh_token(sql)


async def test_policy_applies_to_clients_with_tokens_too(database: Database, sql: Sql) -> None:
    refresh = (await add_code(sql)) and await issued(sql)
    document = "https://acme.example/client"
    for policy in ({"accepts_documents": False}, {"document_hosts": frozenset({"other.example"})}):
        assert await Judge(database, **policy).presented(document, credential=refresh) == UnknownClient.__name__
    await sql.execute("UPDATE keyproxy.oauth_sessions SET presented_as = $1", VALUE)
    await sql.execute("UPDATE keyproxy.oauth_grants SET client_id = $1", await add_client(sql, VALUE, "value"))
    assert isinstance(await Judge(database).presented(VALUE, credential=refresh), Client)
    for policy in ({"registers": False}, {"redirect_hosts": frozenset({"other.example"})}):
        assert await Judge(database, **policy).presented(VALUE, credential=refresh) == UnknownClient.__name__


async def test_store_that_does_not_respond_is_no_unknown_client() -> None:
    database = Database("postgresql://127.0.0.1:1/none", pool_size_max=1, statement_timeout_seconds=1)
    await database.open()
    try:
        for client_id in (VALUE, "worker"):
            with pytest.raises(StoreUnavailable):
                await Judge(database).clients.judge(client_id, URI)
            with pytest.raises(StoreUnavailable):
                await Judge(database).clients.presented(client_id)
    finally:
        await database.close()

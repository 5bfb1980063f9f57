"""The role of the authorization server suffices for its work, and for nothing else."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

import keyproxy
from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth.client import Client, ClientKind
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.directory.directory import Actor
from keyproxy.store.oauth.authorizations import Authorizations, ConsentingUser, NewCode
from keyproxy.store.oauth.cleanup import OAuthCleanup
from keyproxy.store.oauth.subjects import Subjects
from keyproxy.store.oauth.token_values import CodeExchange, RefreshExchange, TokenReader
from keyproxy.store.oauth.tokens import TokenStore
from keyproxy.store.postgres import migrations, queries, roles
from keyproxy.store.postgres.database import Database, StoreUnavailable
from tests.server import as_role, may_log_in
from tests.store.harness import Sql, add_key, add_user
from tests.store.oauth_rows import RESOURCE, add_access_token

RULES = OAuthSettings(resource=RESOURCE, scopes=["jobs:write"])
VERIFIER = hashlib.sha256(b"verifier").digest()
ACME = Client(
    "https://acme.example/c", "https://acme.example/c", ClientKind.DOCUMENT, "Acme", ("https://acme.example/cb",)
)


@pytest.fixture
async def prefix(dsn: str, sql: Sql) -> AsyncIterator[str]:
    """A unique prefix, since roles belong to the server and not the database. Drops the roles in the end."""
    prefix = f"kp_{secrets.token_hex(4)}"
    await roles.create(dsn, prefix)
    yield prefix
    for role in roles.names(prefix):
        await sql.execute(f'DROP OWNED BY "{role}"')
        await sql.execute(f'DROP ROLE "{role}"')


@pytest.fixture
async def as_authorize(dsn: str, sql: Sql, prefix: str) -> AsyncIterator[Database]:
    """The store with the role of the authorization server."""
    role = f"{prefix}_authorize"
    await sql.execute(may_log_in(dsn, role))
    database = Database(as_role(dsn, role), pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    yield database
    await database.close()


async def test_authorization_server_signs_users_in_issues_and_ends_tokens_and_cleans_up(
    as_authorize: Database, sql: Sql
) -> None:
    await add_user(sql)
    secret = await add_key(sql)
    authorizations, tokens = Authorizations(as_authorize), TokenStore(as_authorize, RULES, KeyFormat())
    key = await authorizations.key(secret.digest())
    assert key is not None
    user = ConsentingUser("u_42", via_key="key_1")
    code = NewCode(
        hashlib.sha256(b"code").digest(), "https://acme.example/cb", VERIFIER, RESOURCE, False, ("jobs:write",)
    )
    await authorizations.consent(ACME, user, code)
    issued = await tokens.redeem(ACME, CodeExchange(code.digest, VERIFIER, "https://acme.example/cb"))
    assert issued.refresh_token is not None
    issued = await tokens.refresh(ACME, RefreshExchange(issued.refresh_token.digest()))
    state = await tokens.introspect(issued.access_token.reveal(), TokenReader())
    assert state is not None
    assert (state.user_id, state.scopes) == ("u_42", ("jobs:write",))
    assert await tokens.use_assertion(bytes(32), datetime.now(UTC)) is True
    assert len(await authorizations.connections("u_42", is_test=None)) == 1
    assert await tokens.revoke(ACME, issued.access_token.reveal()) == "u_42"
    assert await authorizations.end_grants("u_42", None, is_test=None) == 1
    assert await OAuthCleanup(as_authorize, RULES).tend() is False
    assert await AdminTokens(as_authorize, KeyFormat(), Actor("authorize", "local")).presented(bytes(32)) is None
    actors = await sql.fetch("SELECT DISTINCT actor FROM keyproxy.audit_log WHERE entity LIKE 'oauth%'")
    assert {row["actor"] for row in actors} == {"user:u_42", f"client:{ACME.row_id}", "oauth:gc"}


async def test_authorization_server_creates_users_only_if_it_is_configured_to(
    as_authorize: Database, dsn: str, prefix: str, sql: Sql
) -> None:
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ('acme')")
    subjects = Subjects(as_authorize)
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await subjects.create("https://idp", "s", user_id="usr_1", tenant_id="acme")
    await roles.create(dsn, prefix, provisions=True)
    linked = await subjects.create("https://idp", "s", user_id="usr_1", tenant_id="acme")
    assert linked is not None
    assert await subjects.find("https://idp", "s") == linked
    await roles.create(dsn, prefix)
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await subjects.create("https://idp", "t", user_id="usr_2", tenant_id="acme")


_FORBIDDEN = {
    "authorize": [
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_9', 'acme')",
        "UPDATE keyproxy.users SET disabled_at = NULL",
        "UPDATE keyproxy.api_keys SET revoked_at = NULL",
        "UPDATE keyproxy.api_keys SET last_used_at = now()",
        "SELECT name FROM keyproxy.api_keys",
        "SELECT hint FROM keyproxy.api_keys",
        "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_x', 'u_42', sha256('x'))",
        "DELETE FROM keyproxy.tenants",
        "UPDATE keyproxy.plans SET limits = '{}'",
        "UPDATE keyproxy.admin_tokens SET scopes = '{}'",
        "SELECT * FROM keyproxy.audit_log",
        "SELECT * FROM keyproxy.changes",
        "SELECT * FROM keyproxy.agent_tokens",
        "SELECT * FROM keyproxy.usage",
        "SELECT * FROM keyproxy.provider_keys",
        "TRUNCATE keyproxy.oauth_clients CASCADE",
        "ALTER TABLE keyproxy.oauth_clients DISABLE TRIGGER ALL",
        "SET session_replication_role = replica",
    ],
    "proxy": [
        *[
            f"SELECT * FROM keyproxy.oauth_{table}"
            for table in ("refresh_tokens", "codes", "subjects", "assertions")
        ],
        *[
            f"DELETE FROM keyproxy.oauth_{table}"
            for table in ("clients", "grants", "sessions", "access_tokens", "refresh_tokens", "codes", "subjects")
        ],
        "UPDATE keyproxy.oauth_sessions SET expires_at = 'infinity'",
        "UPDATE keyproxy.oauth_access_tokens SET expires_at = 'infinity'",
        "UPDATE keyproxy.oauth_clients SET disabled_at = NULL",
        "UPDATE keyproxy.oauth_grants SET plan_id = NULL",
        "INSERT INTO keyproxy.oauth_assertions VALUES (sha256('x'), now())",
        "SELECT keyproxy.tend_oauth(1, 1, '{}', now())",
    ],
    "admin": [
        "SELECT * FROM keyproxy.oauth_codes",
        "UPDATE keyproxy.oauth_access_tokens SET scopes = '{a}'",
        "UPDATE keyproxy.oauth_refresh_tokens SET used_at = NULL",
        "SELECT keyproxy.tend_oauth(1, 1, '{}', now())",
    ],
}  # fmt: skip


@pytest.mark.parametrize("side", _FORBIDDEN)
async def test_each_role_has_no_other_privileges_on_oauth(dsn: str, sql: Sql, prefix: str, side: str) -> None:
    await add_access_token(sql)
    role = f"{prefix}_{side}"
    await sql.execute(may_log_in(dsn, role))
    client: Sql = await asyncpg.connect(as_role(dsn, role))
    for statement in _FORBIDDEN[side]:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await client.execute(statement)
    await client.close()


async def test_proxy_resolves_tokens_and_records_their_use(dsn: str, sql: Sql, prefix: str) -> None:
    secret = await add_access_token(sql)
    role = f"{prefix}_proxy"
    await sql.execute(may_log_in(dsn, role))
    database = Database(as_role(dsn, role), pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    (row,) = await database.fetch("access_token_identities", [secret.digest()])
    await database.fetch("mark_used", [row["key_id"]], f'{{"{row["key_id"]}": 1800000000}}')
    await database.close()
    assert await sql.fetchval("SELECT last_used_at IS NOT NULL FROM keyproxy.oauth_sessions") is True


async def test_authorization_server_reads_the_state_of_the_schema(dsn: str, sql: Sql, prefix: str) -> None:
    role = f"{prefix}_authorize"
    await sql.execute(may_log_in(dsn, role))
    assert (await migrations.state(as_role(dsn, role))).pending == []


_PACKAGE = Path(keyproxy.__file__).parent
_SIDES = {"authorize": ("store/oauth", "authorize"), "admin": ("store/directory",)}
_FETCHED = re.compile(r'\bfetch(?:_row)?\(\s*"([a-z_]+)"')


@pytest.mark.parametrize("side", _SIDES)
async def test_role_may_run_every_statement_of_its_side(dsn: str, sql: Sql, prefix: str, side: str) -> None:
    files = [file for folder in _SIDES[side] for file in (_PACKAGE / folder).rglob("*.py")]
    used = {name for file in files for name in _FETCHED.findall(file.read_text(encoding="utf-8"))}
    role = f"{prefix}_{side}"
    await roles.create(dsn, prefix, provisions=True)
    await sql.execute(may_log_in(dsn, role))
    client: Sql = await asyncpg.connect(as_role(dsn, role))
    statements = queries.load()
    refused = []
    # Without GENERIC_PLAN, which PostgreSQL 15 does not have.
    await client.execute("SET plan_cache_mode = force_generic_plan")
    for name in sorted(used):
        count = max(map(int, re.findall(r"\$(\d+)", statements[name])), default=0)
        arguments = f"({', '.join(['NULL'] * count)})" if count else ""
        await client.execute(f"PREPARE one AS {statements[name]}")
        try:
            await client.execute(f"EXPLAIN EXECUTE one{arguments}")
        except asyncpg.InsufficientPrivilegeError as error:
            refused.append(f"{name}: {error}")
        await client.execute("DEALLOCATE one")
    await client.close()
    assert len(used) > 10
    assert refused == []

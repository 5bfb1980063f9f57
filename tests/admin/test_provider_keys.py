"""Provider keys are added, rotated, revoked, deleted and sealed again: the same from the database and through the API."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from keyproxy.cli.remote.admin_client import AdminClient
from keyproxy.cli.remote.remote_directory import RemoteDirectory
from keyproxy.config.schema import Settings
from keyproxy.config.schema import Upstream as UpstreamSettings
from keyproxy.config.tools.provider_settings import ProviderRow, SecretSettings
from keyproxy.signing.sealing import SealedPlace, SealingKeys
from keyproxy.store.directory.directory import Conflict, Invalid, NotFound
from keyproxy.store.directory.interface import DirectoryOperations
from keyproxy.store.postgres.database import Database
from tests.admin.conftest import FILE_TOKEN, Api, serving
from tests.admin.test_commands import Run, run
from tests.rawhttp import OK, Upstream, answer_with

__all__ = ["run"]

SECRET = "sk-provider-canary-0123456789abcdefWXYZ"
OTHER = "sk-provider-second-0123456789abcdef4321"
REFUSAL = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"


def key_line(kid: str, byte: int) -> str:
    """A line of a key file."""
    return f"{kid}:{base64.b64encode(bytes([byte]) * 32).decode()}\n"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A key file with one key."""
    path = tmp_path / "keys"
    path.write_text(key_line("k1", 1))
    return path


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """An upstream that accepts any secret."""
    async with Upstream(answer_with(OK)).serving() as upstream:
        yield upstream


@pytest.fixture
async def api(database: Database, key_file: Path, upstream: Upstream) -> AsyncIterator[Api]:
    """An admin API with a provider whose secrets are stored."""
    settings = Settings(
        upstream=UpstreamSettings(url=f"http://127.0.0.1:{upstream.port}"),
        providers=(ProviderRow("openai", sealed=True), ProviderRow("filed", secret_file="x")),
        secrets=SecretSettings(str(key_file)),
    )
    async with serving(database, settings=settings) as api:
        yield api


@pytest.fixture(params=["database", "api"])
async def operations(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[DirectoryOperations]:
    """Each implementation of the port."""
    if request.param == "database":
        yield api.directory
        return
    async with AdminClient(api.url, FILE_TOKEN) as client:
        yield RemoteDirectory(client)


async def stored(api: Api, key_id: str) -> bytes:
    """The sealed bytes of a row."""
    (row,) = await api.database.fetch("provider_key", key_id)
    return bytes(row["sealed"])


async def test_secret_is_stored_sealed_for_its_row_and_never_returned(
    operations: DirectoryOperations, api: Api
) -> None:
    await api.user("u_1")
    made = await operations.provider_keys.add("openai", SECRET, tenant_id="acme", is_test=True)
    assert (made["provider"], made["tenant"], made["is_test"], made["state"]) == ("openai", "acme", True, "active")
    assert (made["hint"], made["sealed_with"], made["checked_at"]) == ("WXYZ", "k1", None)
    assert SECRET not in json.dumps(made)
    keys = SealingKeys({"k1": b"\1" * 32})
    sealed = await stored(api, made["id"])
    assert SECRET.encode() not in sealed
    assert keys.open(sealed, "k1", SealedPlace("openai", "acme", True, made["id"])) == SECRET.encode()
    assert await operations.provider_keys.get(made["id"]) == made


async def test_rotation_keeps_the_old_secret_for_the_grace_period(operations: DirectoryOperations) -> None:
    old = await operations.provider_keys.add("openai", SECRET)
    new = await operations.provider_keys.rotate(old["id"], OTHER, grace=timedelta(hours=1))
    assert (new["replaces"], new["state"], new["hint"], new["tenant"]) == (old["id"], "active", "4321", None)
    was = await operations.provider_keys.get(old["id"])
    assert (was["state"], was["ends_at"]) == ("ending", new["old_ends_at"])
    at_once = await operations.provider_keys.rotate(new["id"], SECRET, grace=timedelta(0))
    assert (await operations.provider_keys.get(new["id"]))["state"] == "ended"
    with pytest.raises(Conflict, match="has ended"):
        await operations.provider_keys.rotate(new["id"], SECRET, grace=timedelta(0))
    revoked = await operations.provider_keys.revoke(at_once["id"])
    assert revoked["state"] == "revoked"
    assert await operations.provider_keys.revoke(at_once["id"]) == revoked
    with pytest.raises(Conflict, match="was revoked"):
        await operations.provider_keys.rotate(at_once["id"], SECRET, grace=timedelta(0))


async def test_lists_are_filtered_and_a_deleted_key_is_gone(operations: DirectoryOperations, api: Api) -> None:
    await api.user("u_1")
    shared = await operations.provider_keys.add("openai", SECRET)
    own = await operations.provider_keys.add("openai", SECRET, tenant_id="acme")
    everything = await operations.provider_keys.list_by_id("", 500)
    assert {one["id"] for one in everything} == {shared["id"], own["id"]}
    assert [one["id"] for one in await operations.provider_keys.list_by_id("", 500, tenant_id="acme")] == [own["id"]]
    assert await operations.provider_keys.list_by_id("", 500, provider="none") == []
    assert await operations.provider_keys.delete(own["id"]) == {"id": own["id"], "deleted": True}
    with pytest.raises(NotFound):
        await operations.provider_keys.get(own["id"])


@pytest.mark.parametrize("secret", ["", " ", "two\nlines", "nul\0", "ünicode", "x" * 8193])
async def test_invalid_secret_is_refused_without_quoting_it(operations: DirectoryOperations, secret: str) -> None:
    with pytest.raises(Invalid) as refused:
        await operations.provider_keys.add("openai", secret)
    assert len(str(refused.value)) < 200


async def test_unknown_provider_and_tenant_are_refused(operations: DirectoryOperations) -> None:
    for provider in ("absent", "filed"):
        with pytest.raises(Invalid, match="no provider"):
            await operations.provider_keys.add(provider, SECRET)
    with pytest.raises(NotFound, match="no tenant"):
        await operations.provider_keys.add("openai", SECRET, tenant_id="missing")


async def test_checked_secret_is_stored_with_the_status(operations: DirectoryOperations, upstream: Upstream) -> None:
    made = await operations.provider_keys.add("openai", SECRET, check=True)
    assert made["check_status"] == 200
    assert made["checked_at"]
    assert upstream.requests[-1].one("Authorization") == f"Bearer {SECRET}"


async def test_refused_or_unchecked_secret_is_not_stored(operations: DirectoryOperations, upstream: Upstream) -> None:
    upstream.answering = answer_with(REFUSAL)
    with pytest.raises(Invalid, match="401"):
        await operations.provider_keys.add("openai", SECRET, check=True)
    await upstream.stop()
    with pytest.raises(Conflict, match="did not respond"):
        await operations.provider_keys.add("openai", SECRET, check=True)
    assert await operations.provider_keys.list_by_id("", 500) == []


async def test_reseal_moves_all_rows_to_the_first_key(
    operations: DirectoryOperations, api: Api, key_file: Path
) -> None:
    one = await operations.provider_keys.add("openai", SECRET)
    key_file.write_text(key_line("k2", 2) + key_line("k1", 1))
    two = await operations.provider_keys.add("openai", OTHER)
    assert two["sealed_with"] == "k2"
    await api.database.fetch("add_provider_key", "pvk_bad", "openai", None, False, b"\1" * 40, "k1", "", None)
    done = await operations.provider_keys.reseal()
    assert done == {"sealed_with": "k2", "resealed": 1, "failed": ["pvk_bad"]}
    moved = await operations.provider_keys.get(one["id"])
    assert (moved["sealed_with"], moved["hint"]) == ("k2", "WXYZ")
    keys = SealingKeys({"k2": b"\2" * 32})
    assert (
        keys.open(await stored(api, one["id"]), "k2", SealedPlace("openai", None, False, one["id"])) == SECRET.encode()
    )


@pytest.mark.parametrize("content", [None, "", "no key"])
async def test_unusable_key_file_stores_nothing(
    operations: DirectoryOperations, key_file: Path, content: str | None
) -> None:
    key_file.unlink() if content is None else key_file.write_text(content)
    with pytest.raises(Conflict, match=r"secrets\.key_file"):
        await operations.provider_keys.add("openai", SECRET)
    assert await operations.provider_keys.list_by_id("", 500) == []


async def test_token_of_a_tenant_neither_sees_nor_makes_shared_keys(api: Api) -> None:
    await api.user("u_1")
    await api.user("u_2", "other")
    shared = await api.directory.provider_keys.add("openai", SECRET)
    others = await api.directory.provider_keys.add("openai", SECRET, tenant_id="other")
    bound = await api.token("providers:read", "providers:write", tenant="acme")
    for key in (shared, others):
        assert (await api.call("GET", f"/v1/provider-keys/{key['id']}", token=bound)).status == 404
        assert (await api.call("POST", f"/v1/provider-keys/{key['id']}/revoke", token=bound)).status == 404
    assert (await api.done("GET", "/v1/provider-keys", token=bound))["items"] == []
    body = {"provider": "openai", "secret": SECRET}
    assert (await api.call("POST", "/v1/provider-keys", body, token=bound)).status == 409
    assert (await api.call("POST", "/v1/provider-keys", body | {"tenant": "other"}, token=bound)).status == 409
    assert (await api.call("POST", "/v1/provider-keys", body | {"tenant": "acme"}, token=bound)).status == 201
    assert (await api.call("POST", "/v1/provider-keys/reseal", token=bound)).code == "tenant_bound"


async def test_reading_and_writing_have_scopes_of_their_own(api: Api) -> None:
    reader, writer = await api.token("providers:read"), await api.token("providers:write")
    body = {"provider": "openai", "secret": SECRET}
    assert (await api.call("POST", "/v1/provider-keys", body, token=reader)).code == "insufficient_scope"
    assert (await api.call("GET", "/v1/provider-keys", token=writer)).code == "insufficient_scope"
    assert (await api.call("POST", "/v1/provider-keys", body, token=writer)).status == 201


async def test_replay_of_a_request_neither_repeats_it_nor_holds_the_secret(api: Api) -> None:
    body = {"provider": "openai", "secret": SECRET}
    headers = {"Idempotency-Key": "one"}
    first = await api.call("POST", "/v1/provider-keys", body, headers=headers)
    again = await api.call("POST", "/v1/provider-keys", body, headers=headers)
    assert (first.status, again.status, first.json) == (201, 201, again.json)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(await api.directory.provider_keys.list_by_id("", 500)) == 1
    assert SECRET not in first.body.decode()


async def test_errors_of_the_api_do_not_quote_the_secret(api: Api) -> None:
    for body in (
        {"provider": "openai", "secret": SECRET + "\n" + SECRET},
        {"provider": "openai", "secret": SECRET, "tenant": "missing"},
        {"provider": "openai", "secret": [SECRET]},
        {"provider": "openai", "secret": SECRET * 300},
        {"provider": "none", "secret": SECRET},
    ):
        reply = await api.call("POST", "/v1/provider-keys", body)
        assert reply.status in (404, 422), body
        assert SECRET not in reply.body.decode()


async def test_audit_log_has_every_change_without_the_sealed_secret(api: Api) -> None:
    made = await api.directory.provider_keys.add("openai", SECRET)
    await api.directory.provider_keys.revoke(made["id"])
    await api.directory.provider_keys.delete(made["id"])
    page = await api.directory.audit.list_newest(None, 10)
    rows = [row for row in page.items if row["entity"] == "provider_key"]
    assert [row["action"] for row in rows] == ["delete", "update", "insert"]
    assert {row["entity_id"] for row in rows} == {made["id"]}
    for row in rows:
        assert "sealed" not in (row["before"] or {}) | (row["after"] or {})
    assert rows[-1]["after"]["hint"] == "WXYZ"


async def test_commands_read_the_secret_from_a_file_or_stdin(
    run: Run, api: Api, tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del api
    with (tmp_path / "keyproxy.toml").open("a") as config:
        config.write(f'\n[secrets]\nkey_file = "{key_file}"\n[[providers]]\nname = "openai"\nsealed = true\n')
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    for by in ("database", "api"):
        added = await run("provider-key", "add", "openai", "--secret-file", str(secret), "--json", by=by)
        assert added.status == 0, added.err
        made = json.loads(added.out)
        assert made["hint"] == "WXYZ"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(OTHER.encode())))
        rotated = await run(
            "provider-key", "rotate", made["id"], "--secret-file", "-", "--grace", "1h", "--json", by=by
        )
        assert json.loads(rotated.out)["replaces"] == made["id"]
        listed = await run("provider-key", "list", by=by)
        assert "WXYZ" in listed.out
        refused = await run("provider-key", "revoke", made["id"], by=by)
        assert refused.status == 1  # stdin is no terminal
        revoked = await run("provider-key", "revoke", made["id"], "--yes", "--json", by=by)
        assert json.loads(revoked.out)["state"] == "revoked"
        assert (await run("provider-key", "reseal", "--json", by=by)).status == 0
        assert (await run("provider-key", "delete", made["id"], "--yes", by=by)).status == 0
        for printed in (added, rotated, listed, revoked):
            assert SECRET not in printed.out + printed.err
            assert OTHER not in printed.out + printed.err
    missing = await run("provider-key", "add", "openai", "--secret-file", str(tmp_path / "missing"))
    assert (missing.status, missing.out) == (1, "")

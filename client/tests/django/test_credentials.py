"""Per-user credentials: sealed keys with which background work calls keyproxy."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from cryptography.fernet import Fernet
from django.contrib.auth import get_user_model
from django.db import connections
from django.utils import timezone

from commands import run
from deployment import Deployment
from keyproxy_client import http
from keyproxy_client.acting import Acting, acting_as
from keyproxy_client.django import credentials, sealing
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.models import Credential
from keyproxy_client.django.sealing import CredentialUnusable
from keyproxy_client.django.users import keyproxy_id
from project.testing import keyproxy_settings
from proxied import status_and_headers

FIRST, SECOND = Fernet.generate_key().decode(), Fernet.generate_key().decode()
HOUR = timedelta(hours=1)


def _settings(deployment: Deployment, backend: str, **changes: Any) -> Any:
    return keyproxy_settings(
        BACKEND=backend,
        CREDENTIALS="per_user",
        PROVISION="first_use",
        SECRET_KEYS=[FIRST],
        SCOPES=["jobs:write"],
        ADMIN_URL=deployment.admin_url,
        ADMIN_TOKEN_FILE=str(deployment.admin_token_file),
        **changes,
    )


@pytest.fixture(params=["sql", pytest.param("api", marks=pytest.mark.once)])
def backend(request: pytest.FixtureRequest, deployment: Deployment, committing_db: None) -> Iterator[str]:
    Credential.objects.all().delete()
    with _settings(deployment, request.param):
        yield request.param


@pytest.fixture
def account(backend: str, deployment: Deployment) -> Iterator[Any]:
    user = get_user_model().objects.create_user(secrets.token_hex(6))
    yield user
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute("DELETE FROM keyproxy.users WHERE id = %s", [keyproxy_id(user)])


def _acting(user: Any, *, is_test: bool = False) -> Acting:
    return Acting(keyproxy_id(user), "acme", is_test)


def _working(user: Any) -> set[str]:
    return {key.id for key in directory().keys.of_user(keyproxy_id(user), "acme") if key.works_at(timezone.now())}


def test_first_call_issues_a_key_and_later_calls_reuse_it(account: Any, deployment: Deployment) -> None:
    live = credentials.secret_for(_acting(account))
    assert credentials.secret_for(_acting(account)) == live
    test = credentials.secret_for(_acting(account, is_test=True))
    for secret, mode in ((live, "false"), (test, "true")):
        status, headers = status_and_headers(deployment.origin, secret)
        assert (status, headers["x-keyproxy-user"]) == (200, keyproxy_id(account))
        assert (headers["x-keyproxy-test"], headers["x-keyproxy-scope"]) == (mode, "jobs:write")
    rows = Credential.objects.filter(user=account)
    assert {row.key_id for row in rows} == _working(account)
    assert not [row for row in rows for secret in (live, test) if secret.encode() in bytes(row.sealed)]


def test_call_of_no_active_user_of_this_project_has_no_credential(account: Any) -> None:
    with pytest.raises(credentials.NoCredential):
        credentials.secret_for(Acting("u_999999", "acme", False))
    with pytest.raises(credentials.NoCredential):
        credentials.secret_for(Acting(keyproxy_id(account), "globex", False))
    get_user_model().objects.filter(pk=account.pk).update(is_active=False)
    with pytest.raises(credentials.NoCredential):
        credentials.secret_for(_acting(account))
    assert not Credential.objects.exists()


def test_coroutine_receives_the_secret(account: Any) -> None:
    secret = credentials.secret_for(_acting(account))

    async def call() -> str:
        return await credentials.secret_for_async(_acting(account))

    assert asyncio.run(call()) == secret


def test_expired_credential_is_replaced_at_the_next_call(account: Any) -> None:
    old = credentials.secret_for(_acting(account))
    Credential.objects.update(expires_at=timezone.now() - HOUR)
    new = credentials.secret_for(_acting(account))
    assert new != old
    assert Credential.objects.get(retired_at=None).user == account


def test_concurrent_first_calls_share_one_credential(account: Any) -> None:
    found: list[str] = []
    start = threading.Barrier(4)

    def call() -> None:
        start.wait()
        try:
            found.append(credentials.secret_for(_acting(account)))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert _working(account) == {Credential.objects.get().key_id}


def test_content_of_another_row_is_refused(account: Any, deployment: Deployment) -> None:
    other = get_user_model().objects.create_user(secrets.token_hex(6))
    for user in (account, other):
        credentials.secret_for(_acting(user))
        credentials.secret_for(_acting(user, is_test=True))
    own = Credential.objects.get(user=account, is_test=False)
    for foreign in Credential.objects.exclude(pk=own.pk):
        Credential.objects.filter(pk=own.pk).update(sealed=foreign.sealed)
        with pytest.raises(CredentialUnusable, match="belongs to another user or key") as refused:
            credentials.secret_for(_acting(account))
        assert "kp_" not in str(refused.value)
    Credential.objects.filter(pk=own.pk).update(sealed=b"gAAAA" + b"x" * 100)
    with pytest.raises(CredentialUnusable, match="cannot be decrypted"):
        credentials.secret_for(_acting(account))


def test_rotation_replaces_credentials_past_half_their_life(
    account: Any, deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    old = credentials.secret_for(_acting(account))
    row = Credential.objects.get()
    assert row.expires_at is not None
    life = row.expires_at - row.issued_at
    for age, is_due in ((life / 2 - HOUR, False), (life / 2 + HOUR, True)):
        issued_at = timezone.now() - age
        Credential.objects.filter(pk=row.pk).update(issued_at=issued_at, expires_at=issued_at + life)
        planned = run(capsys, "keyproxy_rotate", "--dry-run", "--json").result
        assert [one["old"] for one in planned["rotated"]] == [row.key_id] * is_due
        done = run(capsys, "keyproxy_rotate", "--grace", "2h", "--json")
        assert done.status == 0
        assert [one["old"] for one in done.result["rotated"]] == [row.key_id] * is_due
        assert old not in done.stdout
    new = credentials.secret_for(_acting(account))
    assert new != old
    assert [status_and_headers(deployment.origin, one)[0] for one in (old, new)] == [200, 200]
    row.refresh_from_db()
    assert row.retired_at is not None
    assert row.expires_at is not None
    assert HOUR < row.expires_at - timezone.now() <= 2 * HOUR
    assert run(capsys, "keyproxy_rotate", "--json").result["rotated"] == []
    assert [one["old"] for one in run(capsys, "keyproxy_rotate", "--all", "--json").result["rotated"]] == [
        Credential.objects.exclude(pk=row.pk).order_by("pk").first().key_id  # type: ignore[union-attr]
    ]


def test_rotation_encrypts_all_under_the_first_key_and_reports_what_it_cannot_read(
    account: Any, deployment: Deployment, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = credentials.secret_for(_acting(account))
    with _settings(deployment, backend) as _, keyproxy_settings(SECRET_KEYS=[SECOND, FIRST]):
        assert run(capsys, "keyproxy_rotate", "--dry-run", "--json").result["reencrypted"] == 1
        assert run(capsys, "keyproxy_rotate", "--json").result["reencrypted"] == 1
        assert run(capsys, "keyproxy_rotate", "--json").result["reencrypted"] == 0
    with keyproxy_settings(SECRET_KEYS=[SECOND]):
        assert credentials.secret_for(_acting(account)) == secret
    done = run(capsys, "keyproxy_rotate", "--json")
    assert done.status == 1
    assert [one["key"] for one in done.result["failed"]] == [Credential.objects.get().key_id]


def test_key_that_works_no_more_is_replaced_by_a_new_one(account: Any, capsys: pytest.CaptureFixture[str]) -> None:
    credentials.secret_for(_acting(account))
    row = Credential.objects.get()
    directory().keys.revoke(row.key_id, "leaked", actor="test")
    assert run(capsys, "keyproxy_rotate", "--all").status == 0
    assert _working(account) == {Credential.objects.get(retired_at=None).key_id} != {row.key_id}


def test_expired_retired_credentials_are_deleted(account: Any, capsys: pytest.CaptureFixture[str]) -> None:
    credentials.secret_for(_acting(account))
    run(capsys, "keyproxy_rotate", "--all", "--grace", "0s")
    assert Credential.objects.count() == 1


def test_failure_after_the_new_key_loses_no_credential(
    account: Any, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = credentials.secret_for(_acting(account))
    before = _working(account)

    def fail(*_: object) -> bytes:
        raise CredentialUnusable("the process ends here")

    with monkeypatch.context() as patch:
        patch.setattr(sealing, "seal", fail)
        for _ in range(3):
            done = run(capsys, "keyproxy_rotate", "--all", "--json")
            assert (done.status, done.result["rotated"]) == (1, [])
            # By the admin API the successor exists, and its secret is lost.
            assert len(_working(account) - before) == (0 if backend == "sql" else 1)
    assert credentials.secret_for(_acting(account)) == secret
    # It is revoked, and another takes its place.
    assert run(capsys, "keyproxy_rotate", "--all").status == 0
    assert credentials.secret_for(_acting(account)) != secret
    assert _working(account) == before | {Credential.objects.get(retired_at=None).key_id}


def test_rotation_after_a_failure_may_have_another_grace_period(
    account: Any, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = credentials.secret_for(_acting(account))

    def fail(*_: object) -> bytes:
        raise CredentialUnusable("the process ends here")

    with monkeypatch.context() as patch:
        patch.setattr(sealing, "seal", fail)
        assert run(capsys, "keyproxy_rotate", "--all", "--grace", "1h").status == 1
    assert run(capsys, "keyproxy_rotate", "--all", "--grace", "2h").status == 0
    replaced = credentials.secret_for(_acting(account))
    assert replaced != secret
    assert status_and_headers(deployment.origin, replaced)[0] == 200


@pytest.mark.parametrize("arguments", [("--grace", "1 day"), ("--grace", "-1h"), ("--unknown",)])
def test_misuse_has_status_2(tables: None, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert run(capsys, "keyproxy_rotate", *arguments).status == 2


def test_sealed_content_needs_a_valid_fernet_key(deployment: Deployment) -> None:
    for keys in ([], ["not a key"]):
        with keyproxy_settings(SECRET_KEYS=keys), pytest.raises(CredentialUnusable) as refused:
            sealing.seal(1, "key_x", "kp_live_x")
        assert "not a key" not in str(refused.value)


def test_outgoing_calls_carry_the_key_of_the_acting_user_and_survive_its_rotation(
    account: Any, deployment: Deployment, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        _settings(deployment, backend, ORIGIN=deployment.origin),
        acting_as(keyproxy_id(account), "acme", test=True),
        http.httpx_client() as client,
    ):
        seen = []
        for _ in range(2):
            response = client.get("/v1/things")
            assert response.status_code == 200
            seen.append({name.lower(): value for name, value in response.json()["headers"]})
            run(capsys, "keyproxy_rotate", "--all", "--grace", "0s")
    assert {one["x-keyproxy-user"] for one in seen} == {keyproxy_id(account)}
    assert {one["x-keyproxy-test"] for one in seen} == {"true"}
    assert len({one["x-keyproxy-key-id"] for one in seen}) == 2
    assert not [one for one in seen if "x-keyproxy-actor" in one and one["x-keyproxy-actor"] != keyproxy_id(account)]


def test_first_key_of_a_sign_up_is_the_credential(backend: str, deployment: Deployment) -> None:
    with _settings(deployment, backend), keyproxy_settings(PROVISION="signup"):
        user = get_user_model().objects.create_user(secrets.token_hex(6))
        row = Credential.objects.get(user=user)
        secret = credentials.secret_for(_acting(user))
        assert status_and_headers(deployment.origin, secret)[1]["x-keyproxy-key-id"] == row.key_id
        assert _working(user) == {row.key_id}
        user.delete()

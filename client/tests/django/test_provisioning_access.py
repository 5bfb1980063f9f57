"""What a sign-up, a deactivation and a deletion mean for access through the proxy, also under concurrency."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from cryptography.fernet import Fernet
from django.contrib.auth import get_user_model
from django.db import IntegrityError, connections, transaction

from deployment import Deployment
from keyproxy_client.acting import Acting
from keyproxy_client.django import credentials
from keyproxy_client.django.directory.errors import DirectoryError
from keyproxy_client.django.models import Credential
from keyproxy_client.django.provisioning.synchronising import Wish, synchronise
from keyproxy_client.django.signals import key_issued
from project.accounts.models import Customer
from project.testing import keyproxy_settings

User = get_user_model()
_names = (f"access{number}-{uuid.uuid4().hex[:6]}" for number in itertools.count())


@pytest.fixture(params=["sql", "api"])
def backend(request: pytest.FixtureRequest, deployment: Deployment, committing_db: None) -> Iterator[str]:
    values = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND=request.param, TENANT="acme", PROVISION="signup", FIRST_KEY=True, **values):
        yield request.param


@pytest.fixture
def superuser(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(deployment.dsn, autocommit=True) as found:
        yield found


@pytest.fixture
def secrets() -> Iterator[dict[str, str]]:
    """The secrets that `key_issued` sent, by user name."""
    found: dict[str, str] = {}

    def receive(user: Any, secret: str, **_: Any) -> None:
        found[user.username] = secret

    key_issued.connect(receive)
    yield found
    key_issued.disconnect(receive)


def _status(deployment: Deployment, secret: str) -> int:
    request = urllib.request.Request(deployment.origin, headers={"Authorization": f"Api-Key {secret}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("end", ["deactivation", "deletion", "queryset deletion"])
def test_access_ends_within_a_second(backend: str, deployment: Deployment, secrets: dict[str, str], end: str) -> None:
    user = User.objects.create_user(next(_names))
    secret = secrets[user.username]
    assert _status(deployment, secret) == 200
    if end == "deactivation":
        user.is_active = False
        user.save()
    elif end == "deletion":
        user.delete()
    else:
        User.objects.filter(pk=user.pk).delete()
    ended_at = time.monotonic()
    while _status(deployment, secret) == 200:
        assert time.monotonic() < ended_at + 1.0


def test_users_of_a_subclass_are_followed(
    backend: str, superuser: psycopg.Connection[Any], secrets: dict[str, str]
) -> None:
    customer = Customer.objects.create_user(next(_names), company="ACME")
    assert list(secrets) == [customer.username]
    pk = customer.pk
    customer.delete()
    assert superuser.execute("SELECT FROM keyproxy.users WHERE id = %s", [f"u_{pk}"]).fetchone() is None


def test_coroutines_sign_up_and_delete(backend: str, deployment: Deployment, secrets: dict[str, str]) -> None:
    async def run() -> list[Any]:
        names = [next(_names) for _ in range(3)]
        return list(await asyncio.gather(*(User.objects.acreate_user(name) for name in names)))

    users = async_to_sync(run)()
    assert set(secrets) == {user.username for user in users}
    assert {_status(deployment, secret) for secret in secrets.values()} == {200}


def test_concurrent_sign_ups_with_one_id_create_one_user_with_one_key(
    backend: str, superuser: psycopg.Connection[Any], secrets: dict[str, str]
) -> None:
    name = next(_names)
    barrier = threading.Barrier(4)
    failures: list[type[Exception]] = []

    def sign_up() -> None:
        barrier.wait()
        try:
            with transaction.atomic():
                User.objects.create_user(name)
        except (IntegrityError, DirectoryError) as error:
            failures.append(type(error))
        connections.close_all()

    with keyproxy_settings(USER_ID="u_{username}"):
        threads = [threading.Thread(target=sign_up) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == [IntegrityError] * 3
    row = superuser.execute(
        "SELECT count(DISTINCT u.id), count(k.id) FROM keyproxy.users AS u"
        " JOIN keyproxy.api_keys AS k ON k.user_id = u.id WHERE u.id = %s AND k.revoked_at IS NULL",
        [f"u_{name}"],
    ).fetchone()
    assert row == (1, 1)
    assert list(secrets) == [name]


def test_failure_in_autocommit_mode_is_repaired_by_sync(
    committing_db: None, superuser: psycopg.Connection[Any], secrets: dict[str, str]
) -> None:
    name = next(_names)
    with keyproxy_settings(BACKEND="sql", PROVISION="signup", FIRST_KEY=True):
        with keyproxy_settings(TENANT="nowhere"), pytest.raises(DirectoryError):
            User.objects.create_user(name)
        user = User.objects.get(username=name)
        assert synchronise(Wish()).failed == {}
    assert superuser.execute("SELECT tenant_id FROM keyproxy.users WHERE id = %s", [f"u_{user.pk}"]).fetchone() == (
        "acme",
    )
    assert name in secrets


def test_first_key_becomes_the_credential_of_its_user(
    backend: str, deployment: Deployment, secrets: dict[str, str]
) -> None:
    with keyproxy_settings(FIRST_KEY=False, CREDENTIALS="per_user", SECRET_KEYS=[Fernet.generate_key().decode()]):
        user = User.objects.create_user(next(_names))
        row = Credential.objects.get(user=user)
        secret = credentials.secret_for(Acting(f"u_{user.pk}", "acme"))
        assert secret == secrets[user.username]
        assert secret.encode() not in bytes(row.sealed)
        assert _status(deployment, secret) == 200
        user.delete()
        assert not Credential.objects.filter(pk=row.pk).exists()


def test_rollback_leaves_no_credential(backend: str, secrets: dict[str, str]) -> None:
    with keyproxy_settings(CREDENTIALS="per_user", SECRET_KEYS=[Fernet.generate_key().decode()]):
        with transaction.atomic():
            User.objects.create_user(next(_names))
            transaction.set_rollback(True)
        assert not Credential.objects.exists()
    assert secrets == {}


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_stricter_isolation_changes_nothing(
    committing_db: None, deployment: Deployment, secrets: dict[str, str], level: str
) -> None:
    with keyproxy_settings(BACKEND="sql", PROVISION="signup", FIRST_KEY=True), transaction.atomic():
        with connections["default"].cursor() as cursor:
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        user = User.objects.create_user(next(_names))
    assert _status(deployment, secrets[user.username]) == 200


def test_receiver_that_fails_is_logged_without_the_secret(
    backend: str, caplog: pytest.LogCaptureFixture, secrets: dict[str, str]
) -> None:
    def fail(secret: str, **_: Any) -> None:
        raise ValueError(f"cannot send {secret}")

    # A worker of Celery in an earlier test may have raised the level of the root logger.
    caplog.set_level("ERROR", logger="keyproxy_client")
    key_issued.connect(fail)
    user = User.objects.create_user(next(_names))
    key_issued.disconnect(fail)
    assert "ValueError" in caplog.text
    assert secrets[user.username] not in caplog.text


def test_receiver_that_breaks_the_transaction_does_not_undo_the_delivery(
    backend: str, deployment: Deployment, secrets: dict[str, str]
) -> None:
    def fail(**_: Any) -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT 1 / 0")

    key_issued.connect(fail)
    user = User.objects.create_user(next(_names))
    key_issued.disconnect(fail)
    assert _status(deployment, secrets[user.username]) == 200
    assert not Credential.objects.exists()

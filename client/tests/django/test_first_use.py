"""`PROVISION = "first_use"`: the first call or key of a user creates the user in keyproxy."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import get_user_model
from django.db import connection, transaction

import keyproxy_client
from deployment import Deployment
from keyproxy_client.django.provisioning import lifecycle
from keyproxy_client.django.signals import key_issued
from project.testing import keyproxy_settings

User = get_user_model()
_names = (f"first{number}-{uuid.uuid4().hex[:6]}" for number in itertools.count())


@pytest.fixture(params=["sql", "api"])
def backend(request: pytest.FixtureRequest, deployment: Deployment, committing_db: None) -> Iterator[str]:
    values = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND=request.param, TENANT="acme", PROVISION="first_use", **values):
        yield request.param


def _exists(user: Any) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT FROM keyproxy.users WHERE id = %s", [f"u_{user.pk}"])
        return cursor.fetchone() is not None


def _call(user: Any) -> dict[str, Any]:
    with keyproxy_client.acting.acting_as(f"u_{user.pk}"), keyproxy_client.http.httpx_client() as client:
        return client.get("/").json()


def test_first_call_creates_the_user(backend: str) -> None:
    user = User.objects.create_user(next(_names))
    assert not _exists(user)
    for _ in range(2):
        assert ["X-Keyproxy-User", f"u_{user.pk}"] in _call(user)["headers"]
    assert _exists(user)


def test_first_call_of_a_coroutine_creates_the_user(backend: str) -> None:
    user = User.objects.create_user(next(_names))

    async def call() -> Any:
        with keyproxy_client.acting.acting_as(f"u_{user.pk}"):
            async with keyproxy_client.http.httpx_async_client() as client:
                return (await client.get("/")).json()

    assert ["X-Keyproxy-User", f"u_{user.pk}"] in async_to_sync(call)()["headers"]


@pytest.mark.parametrize("is_deleted", [False, True])
def test_inactive_and_deleted_users_are_not_created(backend: str, is_deleted: bool) -> None:
    user = User.objects.create_user(next(_names), is_active=is_deleted)
    pk = user.pk
    if is_deleted:
        user.delete()
        user.pk = pk
    assert "headers" not in _call(user)
    assert not _exists(user)


def test_rolled_back_creation_is_repeated(backend: str) -> None:
    user = User.objects.create_user(next(_names))
    with transaction.atomic():
        lifecycle.ensure_acting(f"u_{user.pk}")
        transaction.set_rollback(True)
    lifecycle.ensure_acting(f"u_{user.pk}")
    assert _exists(user)


def test_user_that_was_deleted_in_keyproxy_is_created_again_by_its_next_sign_up(backend: str) -> None:
    user = User.objects.create_user(next(_names))
    lifecycle.ensure_acting(f"u_{user.pk}")
    pk = user.pk
    user.delete()
    again = User.objects.create(pk=pk, username=next(_names))
    assert not _exists(again)
    lifecycle.ensure_acting(f"u_{pk}")
    assert _exists(again)


def test_unreachable_directory_fails_no_call(committing_db: None) -> None:
    user = User.objects.create_user(next(_names))
    values = {"ADMIN_URL": "http://127.0.0.1:9", "ADMIN_TOKEN_FILE": "/nowhere"}
    with keyproxy_settings(BACKEND="api", PROVISION="first_use", **values):
        lifecycle.ensure_acting(f"u_{user.pk}")
    assert not _exists(user)


def test_use_in_another_process_leaves_the_first_key_alone(backend: str) -> None:
    received: list[str] = []

    def receive(key_id: str, **_: Any) -> None:
        received.append(key_id)

    key_issued.connect(receive)
    with keyproxy_settings(FIRST_KEY=True):
        user = User.objects.create_user(next(_names))
        created = [lifecycle.ensure(user) for _ in range(3)]
    key_issued.disconnect(receive)
    assert [one is not None and one.is_new for one in created] == [True, False, False]
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM keyproxy.api_keys WHERE user_id = %s AND revoked_at IS NULL", [f"u_{user.pk}"])
        assert [key_id for (key_id,) in cursor.fetchall()] == received

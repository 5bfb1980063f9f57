"""Users of keyproxy follow the users of Django, by events of the outbox and the admin API."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.contrib.auth import get_user_model
from django.db import connection, connections, transaction
from django.utils import timezone

from admin_api_double import LOSE, PASS, REFUSE, Between, between
from deployment import VARIABLE, Deployment
from keyproxy_client import keys
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.models import OutboxEvent
from keyproxy_client.django.provisioning import first_keys, outbox
from keyproxy_client.django.provisioning.synchronising import Wish, synchronise
from keyproxy_client.django.signals import key_issued
from project.testing import keyproxy_settings

User = get_user_model()
_names = (f"api{number}-{uuid.uuid4().hex[:6]}" for number in itertools.count())


@pytest.fixture(scope="module")
def admin_api(deployment: Deployment) -> Iterator[Between]:
    with between(deployment) as found:
        yield found


@pytest.fixture(autouse=True)
def _api(deployment: Deployment, admin_api: Between) -> Iterator[None]:
    admin_api.rule = lambda _method, _path: PASS
    admin_api.forwarded = lambda: None
    admin_api.seen.clear()
    admin_api.keys.clear()
    values = {"ADMIN_URL": admin_api.url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND="api", TENANT="acme", PROVISION="signup", **values):
        yield


@pytest.fixture
def superuser(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(deployment.dsn, autocommit=True) as found:
        yield found


@pytest.fixture
def received() -> Iterator[list[dict[str, Any]]]:
    """What `key_issued` sent."""
    found: list[dict[str, Any]] = []

    def receive(**kwargs: Any) -> None:
        found.append(kwargs)

    key_issued.connect(receive)
    yield found
    key_issued.disconnect(receive)


def _row(superuser: psycopg.Connection[Any], pk: object) -> tuple[Any, ...] | None:
    return superuser.execute(
        "SELECT tenant_id, disabled_at IS NOT NULL FROM keyproxy.users WHERE id = %s", [f"u_{pk}"]
    ).fetchone()


def _working_keys(superuser: psycopg.Connection[Any], pk: object) -> list[bytes]:
    rows = superuser.execute(
        "SELECT digest FROM keyproxy.api_keys WHERE user_id = %s AND revoked_at IS NULL", [f"u_{pk}"]
    )
    return [digest for (digest,) in rows]


def _events() -> list[tuple[str, str, int]]:
    return list(OutboxEvent.objects.order_by("pk").values_list("operation", "user_id", "attempts"))


def test_signup_is_sent_after_the_commit(
    committing_db: None, superuser: psycopg.Connection[Any], admin_api: Between
) -> None:
    with transaction.atomic():
        user = User.objects.create_user(next(_names))
        assert _events() == [("create", f"u_{user.pk}", 0)]
        assert admin_api.seen == []
    assert admin_api.seen == [("POST", "/v1/users")]
    assert admin_api.keys == [f"u_{user.pk}"]
    assert _events() == []
    assert _row(superuser, user.pk) == ("acme", False)


def test_rollback_sends_nothing(committing_db: None, admin_api: Between) -> None:
    with transaction.atomic():
        User.objects.create_user(next(_names))
        transaction.set_rollback(True)
    assert admin_api.seen == []
    assert _events() == []


def test_events_of_a_user_are_delivered_in_order(committing_db: None, superuser: psycopg.Connection[Any]) -> None:
    with transaction.atomic():
        user = User.objects.create_user(next(_names))
        pk = user.pk
        user.is_active = False
        user.save()
        user.is_active = True
        user.save()
        assert [operation for operation, _, _ in _events()] == ["create", "disable", "enable"]
    assert _row(superuser, pk) == ("acme", False)
    user.is_active = False
    user.save()
    assert _row(superuser, pk) == ("acme", True)
    user.delete()
    assert _row(superuser, pk) is None
    assert _events() == []


def test_failed_delivery_fails_no_view_and_is_retried_later_each_time(
    committing_db: None, superuser: psycopg.Connection[Any], admin_api: Between
) -> None:
    admin_api.rule = lambda _method, _path: REFUSE
    user = User.objects.create_user(next(_names))
    for attempt, seconds in enumerate((10, 60, 360, 2160, 21_600, 21_600), start=1):
        event = OutboxEvent.objects.get()
        assert event.attempts == attempt
        assert abs((event.next_at - timezone.now()).total_seconds() - seconds) < 5
        assert "503" in event.last_error
        outbox.deliver_soon("default", f"u_{uuid.uuid4().hex}")
        assert OutboxEvent.objects.get().attempts == attempt, "an event is not retried before its time"
        OutboxEvent.objects.update(next_at=timezone.now() - timedelta(seconds=1))
        outbox.deliver_soon("default", f"u_{uuid.uuid4().hex}")
    admin_api.rule = lambda _method, _path: PASS
    OutboxEvent.objects.update(next_at=timezone.now())
    other = User.objects.create_user(next(_names))
    assert _events() == []
    assert [_row(superuser, one.pk) for one in (user, other)] == [("acme", False)] * 2


def test_later_events_of_a_user_wait_for_the_first(
    committing_db: None, superuser: psycopg.Connection[Any], admin_api: Between
) -> None:
    admin_api.rule = lambda method, _path: REFUSE if method == "POST" else PASS
    user = User.objects.create_user(next(_names))
    user.is_active = False
    user.save()
    assert [operation for operation, _, _ in _events()] == ["create", "disable"]
    admin_api.rule = lambda _method, _path: PASS
    assert {result for _, result in outbox.drain("default")} == {outbox.Result.DELIVERED}
    assert _row(superuser, user.pk) == ("acme", True)


def test_first_key_is_handed_out_once(
    committing_db: None, superuser: psycopg.Connection[Any], received: list[dict[str, Any]]
) -> None:
    with keyproxy_settings(FIRST_KEY=True, SCOPES=["jobs:read"]):
        user = User.objects.create_user(next(_names))
    (event,) = received
    assert event["user"] == user
    assert _working_keys(superuser, user.pk) == [keys.digest(event["secret"])]


@pytest.mark.parametrize(("losses", "issued"), [(1, 1), (2, 2), (3, 2)])
def test_key_of_a_lost_response_is_revoked_and_replaced(
    committing_db: None,
    superuser: psycopg.Connection[Any],
    admin_api: Between,
    received: list[dict[str, Any]],
    losses: int,
    issued: int,
) -> None:
    """Of the creation; then also of the replacement, and of its repetition, which issues nothing."""
    left = {"/v1/users": 1, "/v1/keys": losses - 1}

    def rule(_method: str, path: str) -> str:
        if left.get(path):
            left[path] -= 1
            return LOSE
        return PASS

    admin_api.rule = rule
    with keyproxy_settings(FIRST_KEY=True):
        user = User.objects.create_user(next(_names))
        assert received == []
        for _ in range(losses):
            list(outbox.drain("default"))
    assert _events() == []
    (event,) = received
    assert _working_keys(superuser, user.pk) == [keys.digest(event["secret"])]
    revoked = superuser.execute(
        "SELECT count(*) FROM keyproxy.api_keys WHERE user_id = %s AND revoke_reason = 'its secret was lost'",
        [f"u_{user.pk}"],
    ).fetchone()
    assert revoked == (issued,)


def test_user_who_signs_up_again_with_the_id_of_a_deleted_one_exists_again(
    committing_db: None, superuser: psycopg.Connection[Any], received: list[dict[str, Any]]
) -> None:
    """The stored response of the first sign-up must not stand for the second."""
    name = next(_names)
    with keyproxy_settings(USER_ID="u_{username}", FIRST_KEY=True):
        for _ in range(2):
            user = User.objects.create_user(name)
            assert _row(superuser, name) == ("acme", False)
            user.delete()
            assert _row(superuser, name) is None
        with keyproxy_settings(FIRST_KEY=False):
            User.objects.create_user(name)
        assert _row(superuser, name) == ("acme", False)
    assert len(received) == 2
    assert _events() == []


def test_repeated_events_change_nothing(
    committing_db: None, superuser: psycopg.Connection[Any], admin_api: Between
) -> None:
    user = User.objects.create_user(next(_names))
    pk = user.pk
    for operation, expected in (("disable", ("acme", True)), ("delete", None)):
        for loss in (LOSE, PASS):
            method = {"disable": "PATCH", "delete": "DELETE"}[operation]
            admin_api.rule = lambda this, _path, lost=(loss, method): lost[0] if this == lost[1] else PASS
            if operation == "disable" and loss is LOSE:
                user.is_active = False
                user.save()
            elif loss is LOSE:
                user.delete()
            list(outbox.drain("default"))
        assert _row(superuser, pk) == expected
        assert _events() == []


def test_conflict_stays_in_the_outbox_and_blocks_only_its_user(
    committing_db: None, superuser: psycopg.Connection[Any]
) -> None:
    name = next(_names)
    superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'globex')", [f"u_{name}"])
    with keyproxy_settings(USER_ID="u_{username}"):
        user = User.objects.create_user(name)
        other = next(_names)
        User.objects.create_user(other)
        assert _row(superuser, other) == ("acme", False)
        assert "another tenant" in OutboxEvent.objects.get().last_error
        user.delete()
        list(outbox.drain("default"))
    assert _row(superuser, name) == ("globex", False), "a user of another tenant is not deleted"


def test_user_of_another_tenant_is_neither_disabled_nor_deleted(
    committing_db: None, superuser: psycopg.Connection[Any], deployment: Deployment, admin_api: Between
) -> None:
    with keyproxy_settings(BACKEND="off"):
        user = User.objects.create_user(next(_names))
    pk = user.pk
    superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'globex')", [f"u_{pk}"])
    user.is_active = False
    user.save()
    user.delete()
    assert _events() == []
    assert _row(superuser, pk) == ("globex", False)


@pytest.mark.newest
def test_token_without_read_access_suffices(
    committing_db: None, superuser: psycopg.Connection[Any], deployment: Deployment
) -> None:
    scopes = ("--scope", "users:write", "--scope", "keys:write")
    token = deployment.cli("admin", "token", "create", "--name", "django", *scopes)
    file = deployment.home / "provision-token"
    file.write_text(token["secret"])
    with keyproxy_settings(ADMIN_TOKEN_FILE=str(file)):
        user = User.objects.create_user(next(_names))
        pk = user.pk
        user.is_active = False
        user.save()
        assert _row(superuser, pk) == ("acme", True)
        user.delete()
        (missing,) = User.objects.bulk_create([User(username=next(_names))])
        assert synchronise(Wish()).failed == {}
        assert _row(superuser, missing.pk) == ("acme", False)
    assert _row(superuser, pk) is None
    assert _events() == []


def test_concurrent_deliveries_keep_the_order_and_repeat_nothing(
    committing_db: None, superuser: psycopg.Connection[Any], admin_api: Between
) -> None:
    with transaction.atomic():
        users = [User.objects.create_user(next(_names)) for _ in range(5)]
        for user in users:
            user.is_active = False
            user.save()
        connection.run_on_commit.clear()
    assert len(_events()) == 10
    barrier = threading.Barrier(3)

    def run() -> None:
        barrier.wait()
        list(outbox.drain("default"))
        connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    list(outbox.drain("default"))
    assert _events() == []
    assert all(_row(superuser, user.pk) == ("acme", True) for user in users)
    for user in users:
        changes = [method for method, path in admin_api.seen if method == "PATCH" and path.endswith(f"/u_{user.pk}")]
        assert changes == ["PATCH"]
    assert admin_api.seen.count(("POST", "/v1/users")) == len(users)


_SIGNUP = """
import sys
import django
django.setup()
from django.contrib.auth import get_user_model
from project.testing import keyproxy_settings
with keyproxy_settings(BACKEND="api", FIRST_KEY=True, ADMIN_URL=sys.argv[1], ADMIN_TOKEN_FILE=sys.argv[2]):
    get_user_model().objects.create_user(sys.argv[3])
"""


@pytest.mark.newest
def test_killed_process_loses_no_event(
    committing_db: None,
    superuser: psycopg.Connection[Any],
    deployment: Deployment,
    admin_api: Between,
    received: list[dict[str, Any]],
) -> None:
    name = next(_names)
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "project.settings", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert VARIABLE in environment
    arguments = [admin_api.url, str(deployment.admin_token_file), name]
    process = subprocess.Popen([sys.executable, "-c", _SIGNUP, *arguments], env=environment)
    admin_api.forwarded = lambda: os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    admin_api.forwarded = lambda: None
    user = User.objects.get(username=name)
    assert [operation for operation, _, _ in _events()] == ["create"]
    with keyproxy_settings(FIRST_KEY=True):
        list(outbox.drain("default"))
    (event,) = received
    assert _working_keys(superuser, user.pk) == [keys.digest(event["secret"])]
    assert _events() == []


def test_time_limit_covers_a_server_that_sends_slowly(committing_db: None, admin_api: Between) -> None:
    held = threading.Event()
    admin_api.forwarded = lambda: held.wait(5) and None
    with keyproxy_settings(TIMEOUT_SECONDS=0.05):
        User.objects.create_user(next(_names))
    held.set()
    assert "did not respond" in OutboxEvent.objects.get().last_error
    admin_api.forwarded = lambda: None
    list(outbox.drain("default"))
    assert _events() == []


def test_secret_is_in_no_repr(committing_db: None, received: list[dict[str, Any]]) -> None:
    with keyproxy_settings(FIRST_KEY=True):
        created = directory().users.create(f"u_{next(_names)}", "acme", actor="", first_key=first_keys.wish())
    assert created.key is not None
    assert created.key.secret.startswith("kp_live_")
    assert created.key.secret not in repr(created)

"""Users of keyproxy follow the users of Django, by SQL in the same transaction."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.contrib.auth import get_user_model
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from deployment import Deployment
from keyproxy_client import keys
from keyproxy_client.django.directory.errors import NotInDirectory, ProvisionConflict
from keyproxy_client.django.signals import key_issued
from project.testing import keyproxy_settings

User = get_user_model()
_names = (f"sql{number}-{uuid.uuid4().hex[:6]}" for number in itertools.count())


@pytest.fixture(autouse=True)
def _sql() -> Iterator[None]:
    with keyproxy_settings(BACKEND="sql", TENANT="acme", PROVISION="signup"):
        yield


@pytest.fixture
def superuser(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    """Sees what is committed, with all rights."""
    with psycopg.connect(deployment.dsn, autocommit=True) as found:
        yield found


def _row(user: Any) -> tuple[Any, ...] | None:
    """The user in keyproxy as this transaction sees it."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT tenant_id, disabled_at IS NOT NULL FROM keyproxy.users WHERE id = %s", [f"u_{user.pk}"])
        return cursor.fetchone()


def _committed(superuser: psycopg.Connection[Any], pk: object) -> tuple[Any, ...] | None:
    return superuser.execute(
        "SELECT u.tenant_id, u.disabled_at IS NOT NULL, count(k.id) FROM keyproxy.users AS u"
        " LEFT JOIN keyproxy.api_keys AS k ON k.user_id = u.id WHERE u.id = %s GROUP BY u.id",
        [f"u_{pk}"],
    ).fetchone()


def _audit(superuser: psycopg.Connection[Any], pk: object) -> list[tuple[str, str, str]]:
    return superuser.execute(
        "SELECT actor, action, db_role FROM keyproxy.audit_log WHERE entity_id = %s ORDER BY id", [f"u_{pk}"]
    ).fetchall()


def test_user_and_first_key_commit_together(committing_db: None, superuser: psycopg.Connection[Any]) -> None:
    received: list[dict[str, Any]] = []

    def receive(**kwargs: Any) -> None:
        received.append(kwargs)

    key_issued.connect(receive)
    with keyproxy_settings(FIRST_KEY=True, SCOPES=["jobs:read"], KEY_DAYS=30):
        with transaction.atomic():
            user = User.objects.create_user(next(_names))
            assert _row(user) == ("acme", False)
            assert _committed(superuser, user.pk) is None
            assert received == []
        assert _committed(superuser, user.pk) == ("acme", False, 1)
    key_issued.disconnect(receive)
    (event,) = received
    assert event["sender"] is User
    assert event["user"] == user
    row = superuser.execute(
        "SELECT digest, scopes, is_test, round(extract(epoch FROM expires_at - created_at) / 86400), hint"
        " FROM keyproxy.api_keys WHERE id = %s",
        [event["key_id"]],
    ).fetchone()
    assert row == (keys.digest(event["secret"]), ["jobs:read"], False, 30, keys.hint(event["secret"]))


@pytest.mark.parametrize("is_savepoint", [False, True])
def test_rollback_leaves_no_user_and_no_key(
    committing_db: None, superuser: psycopg.Connection[Any], is_savepoint: bool
) -> None:
    received: list[object] = []

    def receive(**kwargs: Any) -> None:
        received.append(kwargs)

    key_issued.connect(receive)
    with keyproxy_settings(FIRST_KEY=True), transaction.atomic():
        block = transaction.atomic()
        block.__enter__()
        user = User.objects.create_user(next(_names))
        transaction.set_rollback(True)
        block.__exit__(None, None, None)
        if not is_savepoint:
            transaction.set_rollback(True)
    key_issued.disconnect(receive)
    assert _committed(superuser, user.pk) is None
    assert received == []


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2),
        ({"FIRST_KEY": True}, 2),
        ({"CREDENTIALS": "per_user", "SECRET_KEYS": ["MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="]}, 3),
    ],
)
def test_signup_adds_at_most_three_statements(db: None, settings: dict[str, Any], count: int) -> None:
    with keyproxy_settings(BACKEND="off"), CaptureQueriesContext(connection) as without:
        User.objects.create_user(next(_names))
    with keyproxy_settings(**settings), CaptureQueriesContext(connection) as following:
        User.objects.create_user(next(_names))
    assert len(following) - len(without) == count


def test_id_of_another_tenant_fails_the_signup(committing_db: None, superuser: psycopg.Connection[Any]) -> None:
    name = next(_names)
    with keyproxy_settings(USER_ID="u_{username}"):
        superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'globex')", [f"u_{name}"])
        with transaction.atomic():
            with pytest.raises(ProvisionConflict):
                User.objects.create_user(name)
            # Catching the refusal within the transaction does not save the user.
            assert transaction.get_rollback()
    assert not User.objects.filter(username=name).exists()
    assert _committed(superuser, name) == ("globex", False, 0)


def test_missing_tenant_fails_the_signup(committing_db: None) -> None:
    name = next(_names)
    with keyproxy_settings(TENANT="nowhere"), pytest.raises(NotInDirectory), transaction.atomic():
        User.objects.create_user(name)
    assert not User.objects.filter(username=name).exists()


def test_deactivation_disables_and_activation_enables(db: None) -> None:
    user = User.objects.create_user(next(_names))
    for is_active in (False, True, False, True):
        user.is_active = is_active
        user.save()
        assert _row(user) == ("acme", not is_active)
    loaded = User.objects.get(pk=user.pk)
    loaded.is_active = False
    loaded.save(update_fields=["is_active"])
    assert _row(user) == ("acme", True)


def _set_disabled(user: Any, is_disabled: bool) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE keyproxy.users SET disabled_at = CASE WHEN %s THEN now() END WHERE id = %s",
            [is_disabled, f"u_{user.pk}"],
        )


def test_save_that_leaves_is_active_never_enables(db: None) -> None:
    user = User.objects.create_user(next(_names))
    _set_disabled(user, True)
    for loaded in (user, User.objects.get(pk=user.pk), User.objects.only("username").get(pk=user.pk)):
        loaded.first_name = "Ada"
        loaded.save()
        assert _row(user) == ("acme", True)
    only = User.objects.defer("is_active").get(pk=user.pk)
    only.is_active = True
    only.save()
    assert _row(user) == ("acme", True)
    User(pk=user.pk, username=user.username, is_active=True).save()
    assert _row(user) == ("acme", True)
    refreshed = User.objects.get(pk=user.pk)
    User.objects.filter(pk=user.pk).update(is_active=False)
    inactive = User.objects.get(pk=user.pk)
    User.objects.filter(pk=user.pk).update(is_active=True)
    inactive.refresh_from_db()
    inactive.save()
    refreshed.save()
    assert _row(user) == ("acme", True)


def test_save_that_does_not_write_is_active_changes_nothing(db: None) -> None:
    user = User.objects.create_user(next(_names))
    user.is_active = False
    user.save(update_fields=["last_login"])
    assert _row(user) == ("acme", False)
    user.save()
    assert _row(user) == ("acme", True)


def test_user_that_signs_up_inactive_is_disabled_until_it_is_activated(db: None) -> None:
    user = User.objects.create_user(next(_names), is_active=False)
    assert _row(user) == ("acme", True)
    user.is_active = True
    user.save()
    assert _row(user) == ("acme", False)


@pytest.mark.parametrize("by", ["instance", "queryset"])
def test_deletion_deletes_user_and_keys(committing_db: None, superuser: psycopg.Connection[Any], by: str) -> None:
    with keyproxy_settings(FIRST_KEY=True):
        user = User.objects.create_user(next(_names))
    pk = user.pk
    assert _committed(superuser, pk) == ("acme", False, 1)
    with transaction.atomic():
        user.delete() if by == "instance" else User.objects.filter(pk=pk).delete()
        assert _committed(superuser, pk) == ("acme", False, 1)
    assert _committed(superuser, pk) is None


def test_deletion_spares_a_user_of_another_tenant(committing_db: None, superuser: psycopg.Connection[Any]) -> None:
    with keyproxy_settings(BACKEND="off"):
        user = User.objects.create_user(next(_names))
    pk = user.pk
    superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'globex')", [f"u_{pk}"])
    user.is_active = False
    user.save()
    user.delete()
    assert _committed(superuser, pk) == ("globex", False, 0)


def test_audit_log_names_the_event_and_the_role(committing_db: None, superuser: psycopg.Connection[Any]) -> None:
    with transaction.atomic():
        user = User.objects.create_user(next(_names))
        with connection.cursor() as cursor:
            # The application's own change in the same transaction.
            cursor.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = %s", [f"u_{user.pk}"])
    pk = user.pk
    user.is_active = False
    user.save()
    user.delete()
    role = connection.settings_dict["USER"]
    assert _audit(superuser, pk) == [
        ("django:signup", "insert", role),
        (f"sql:{role}", "update", role),
        ("django:delete", "delete", role),
    ]


def test_fixtures_and_bulk_create_are_left_to_keyproxy_sync(db: None) -> None:
    (user,) = User.objects.bulk_create([User(username=next(_names))])
    assert _row(user) is None


@pytest.mark.parametrize("provision", ["first_use", None])
def test_signup_creates_nothing_without_provisioning_at_signup(db: None, provision: str | None) -> None:
    with keyproxy_settings(PROVISION=provision):
        user = User.objects.create_user(next(_names))
    assert _row(user) is None


def test_proxy_models_are_followed(db: None) -> None:
    from project.accounts.models import Member

    member = Member.objects.create_user(next(_names))
    assert _row(member) == ("acme", False)
    pk = member.pk
    member.delete()
    member.pk = pk
    assert _row(member) is None


def test_user_without_valid_id_can_be_changed_and_deleted(db: None) -> None:
    with keyproxy_settings(BACKEND="off"):
        user = User.objects.create_user("no valid id")
    with keyproxy_settings(USER_ID="u_{username}"):
        user.is_active = False
        user.save()
        user.delete()
    assert not User.objects.filter(username="no valid id").exists()

"""Users in a database other than keyproxy's: events of an outbox in their database, delivered by SQL or the admin API."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connections, router, transaction
from django.db.utils import OperationalError

from deployment import Deployment
from keyproxy_client import keys
from keyproxy_client.django.models import OutboxEvent
from keyproxy_client.django.provisioning import lifecycle, outbox
from keyproxy_client.django.provisioning.synchronising import Wish, synchronise
from keyproxy_client.django.signals import key_issued
from project.testing import keyproxy_settings

pytestmark = pytest.mark.once

User = get_user_model()
_names = (f"two{number}-{uuid.uuid4().hex[:6]}" for number in itertools.count())


@pytest.fixture(scope="module")
def other(tables: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The alias of an SQLite file with the tables of the project."""
    file = tmp_path_factory.mktemp("other") / "db.sqlite3"
    values = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(file),
        "USER": "",
        "PASSWORD": "",
        "HOST": "",
        "PORT": "",
    }
    connections.databases["other"] = connections.databases["default"] | values
    call_command("migrate", run_syncdb=True, verbosity=0, database="other")
    yield "other"
    connections["other"].close()
    del connections.databases["other"]


@pytest.fixture(params=["sql", "api"])
def backend(request: pytest.FixtureRequest, deployment: Deployment, other: str) -> Iterator[str]:
    values = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    form = f"{uuid.uuid4().hex[:6]}_{{pk}}"
    with keyproxy_settings(BACKEND=request.param, TENANT="acme", PROVISION="signup", USER_ID=form, **values):
        yield request.param
    with keyproxy_settings(BACKEND="off"):
        User.objects.using(other).all().delete()
    OutboxEvent.objects.using(other).all().delete()


@pytest.fixture
def superuser(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(deployment.dsn, autocommit=True) as found:
        yield found


def _row(superuser: psycopg.Connection[Any], user: Any) -> tuple[Any, ...] | None:
    wanted = lifecycle.subject_of(user).id
    return superuser.execute(
        "SELECT tenant_id, disabled_at IS NOT NULL FROM keyproxy.users WHERE id = %s", [wanted]
    ).fetchone()


def _sign_up() -> Any:
    return User.objects.db_manager("other").create_user(next(_names))


def test_user_of_another_database_is_followed(backend: str, superuser: psycopg.Connection[Any]) -> None:
    with transaction.atomic(using="other"):
        user = _sign_up()
        assert OutboxEvent.objects.using("other").count() == 1
        assert _row(superuser, user) is None
    assert _row(superuser, user) == ("acme", False)
    user.is_active = False
    user.save()
    assert _row(superuser, user) == ("acme", True)
    pk = user.pk
    user.delete()
    user.pk = pk
    assert _row(superuser, user) is None
    assert OutboxEvent.objects.using("other").count() == OutboxEvent.objects.count() == 0


def test_rollback_in_another_database_leaves_no_user(backend: str, superuser: psycopg.Connection[Any]) -> None:
    with transaction.atomic(using="other"):
        user = _sign_up()
        transaction.set_rollback(True, using="other")
    assert _row(superuser, user) is None
    assert OutboxEvent.objects.using("other").count() == 0


def test_lost_first_key_is_revoked_and_replaced(
    backend: str, superuser: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after keyproxy's commit and before that of the outbox."""
    received: list[dict[str, Any]] = []

    def receive(**kwargs: Any) -> None:
        received.append(kwargs)

    def crash(*_: object) -> None:
        raise OperationalError("the connection is gone")

    key_issued.connect(receive)
    with keyproxy_settings(FIRST_KEY=True):
        with monkeypatch.context() as patch:
            patch.setattr("keyproxy_client.django.provisioning.first_keys.send", crash)
            user = _sign_up()
        assert OutboxEvent.objects.using("other").count() == 1
        list(outbox.drain("other"))
    key_issued.disconnect(receive)
    (event,) = received
    rows = superuser.execute(
        "SELECT digest FROM keyproxy.api_keys WHERE user_id = %s AND revoked_at IS NULL",
        [lifecycle.subject_of(user).id],
    ).fetchall()
    assert rows == [(keys.digest(event["secret"]),)]


def test_concurrent_deliveries_without_row_locks_keep_the_order(
    backend: str, superuser: psycopg.Connection[Any], deployment: Deployment
) -> None:
    with transaction.atomic(using="other"):
        users = [_sign_up() for _ in range(3)]
        for user in users:
            user.is_active = False
            user.save()
            user.is_active = True
            user.save()
        connections["other"].run_on_commit.clear()
    barrier = threading.Barrier(2)

    def run() -> None:
        barrier.wait()
        list(outbox.drain("other"))
        connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    list(outbox.drain("other"))
    assert OutboxEvent.objects.using("other").count() == 0
    for user in users:
        actions = superuser.execute(
            "SELECT action, after ->> 'disabled_at' IS NOT NULL FROM keyproxy.audit_log WHERE entity_id = %s ORDER BY id",
            [lifecycle.subject_of(user).id],
        ).fetchall()
        assert actions == [("insert", False), ("update", True), ("update", False)]


def test_sync_reaches_users_of_another_database(
    backend: str, superuser: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "routers", [_Router()])
    (user,) = User.objects.using("other").bulk_create([User(username=next(_names))])
    report = synchronise(Wish())
    assert (report.done["created"], report.failed) == (1, {})
    user = User.objects.using("other").get(username=user.username)
    assert _row(superuser, user) == ("acme", False)


class _Router:
    """Users live in the other database."""

    def db_for_read(self, model: Any, **_hints: Any) -> str | None:
        return "other" if model is User else None

    db_for_write = db_for_read

"""keyproxy_sync and keyproxy_check, by both ways to keyproxy."""

from __future__ import annotations

import io
import itertools
import json
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.utils import timezone

from deployment import Deployment
from keyproxy_client import keys
from keyproxy_client.django.models import OutboxEvent
from keyproxy_client.django.provisioning import lifecycle, outbox, synchronising
from project.testing import keyproxy_settings

User = get_user_model()
_names = (f"sync{number}-{uuid.uuid4().hex[:6]}" for number in itertools.count())


@pytest.fixture(params=["sql", "api"])
def backend(request: pytest.FixtureRequest, deployment: Deployment, committing_db: None) -> Iterator[str]:
    values = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND=request.param, TENANT="acme", PROVISION="signup", **values):
        yield request.param


@pytest.fixture
def superuser(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(deployment.dsn, autocommit=True) as found:
        # Users of other tests would be orphans.
        found.execute("DELETE FROM keyproxy.users WHERE id NOT LIKE 'u_service_%'")
        yield found


def _users(superuser: psycopg.Connection[Any]) -> dict[str, bool]:
    """Users of keyproxy in the tenant, and whether they are disabled."""
    rows = superuser.execute(
        "SELECT id, disabled_at IS NOT NULL FROM keyproxy.users WHERE tenant_id = 'acme'"
    ).fetchall()
    return {user: is_disabled for user, is_disabled in rows if user != "u_service_acme"}


def _run(command: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = io.StringIO()
    try:
        call_command(command, "--json", *arguments, stdout=out, stderr=io.StringIO())
    except CommandError as error:
        return error.returncode, json.loads(out.getvalue() or "null")
    return 0, json.loads(out.getvalue())


def _bulk(count: int, **values: Any) -> list[Any]:
    return User.objects.bulk_create([User(username=next(_names), **values) for _ in range(count)])


def test_sync_creates_missing_users_and_disables_inactive_ones(
    backend: str, superuser: psycopg.Connection[Any]
) -> None:
    missing = _bulk(5)
    inactive_and_missing = _bulk(1, is_active=False)
    deactivated = User.objects.create_user(next(_names))
    User.objects.filter(pk=deactivated.pk).update(is_active=False)
    dry = _run("keyproxy_sync", "--dry-run", "--batch", "2")
    assert (dry[0], dry[1]["created"], dry[1]["disabled"], dry[1]["dry_run"]) == (0, 5, 1, True)
    assert _users(superuser) == {f"u_{deactivated.pk}": False}
    status, result = _run("keyproxy_sync", "--batch", "2")
    assert (status, result["created"], result["disabled"], result["failed"]) == (0, 5, 1, [])
    assert _users(superuser) == {f"u_{user.pk}": False for user in missing} | {f"u_{deactivated.pk}": True}
    assert f"u_{inactive_and_missing[0].pk}" not in _users(superuser)
    status, result = _run("keyproxy_sync")
    assert (status, result["created"], result["disabled"]) == (0, 0, 0)


def test_sync_enables_only_on_request(backend: str, superuser: psycopg.Connection[Any]) -> None:
    user = User.objects.create_user(next(_names))
    superuser.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = %s", [f"u_{user.pk}"])
    _, result = _run("keyproxy_sync")
    assert (result["enabled"], result["left_disabled"]) == (0, 1)
    assert _users(superuser) == {f"u_{user.pk}": True}
    _, result = _run("keyproxy_sync", "--enable")
    assert (result["enabled"], result["left_disabled"]) == (1, 0)
    assert _users(superuser) == {f"u_{user.pk}": False}


def test_sync_deletes_orphans_only_on_request_and_no_owner_of_a_service_key(
    backend: str, superuser: psycopg.Connection[Any], deployment: Deployment
) -> None:
    kept = User.objects.create_user(next(_names))
    superuser.execute(
        "INSERT INTO keyproxy.users (id, tenant_id)"
        " VALUES ('u_987654', 'acme'), ('u_worker', 'acme'), ('u_987655', 'globex'), ('u_0987654', 'acme')"
    )
    _run("keyproxy_sync")
    assert "u_987654" in _users(superuser)
    assert _run("keyproxy_sync", "--prune", "--dry-run")[1]["deleted"] == 1
    status, result = _run("keyproxy_sync", "--prune")
    assert (status, result["deleted"]) == (0, 1)
    assert set(_users(superuser)) == {f"u_{kept.pk}", "u_worker", "u_0987654"}
    assert superuser.execute("SELECT count(*) FROM keyproxy.users WHERE id = 'u_987655'").fetchone() == (1,)
    with keyproxy_settings(USER_ID="u_{username}", SERVICE_KEY_FILE=deployment.service_key_pattern):
        # By this format the owner of the service key is a user that could exist.
        _, result = _run("keyproxy_sync", "--prune")
    assert result["kept"] == 1
    assert superuser.execute("SELECT count(*) FROM keyproxy.users WHERE id = 'u_service_acme'").fetchone() == (1,)


def _id_by_function(user: Any) -> str:
    return f"u_{user.pk}"


def test_sync_deletes_no_user_that_may_be_an_operators(
    backend: str, superuser: psycopg.Connection[Any], deployment: Deployment, tmp_path: Path
) -> None:
    kept = User.objects.create_user(next(_names))
    superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_987654', 'acme'), ('worker', 'acme')")
    everyone = {f"u_{kept.pk}", "u_987654", "worker"}
    absent = str(tmp_path / "absent.key")
    for values in ({"USER_ID": _id_by_function}, {"SERVICE_KEY_FILE": absent}, {"SERVICE_TEST_KEY_FILE": absent}):
        with keyproxy_settings(**values):
            for arguments in (("--dry-run",), ()):
                status, _ = _run("keyproxy_sync", "--prune", *arguments)
                assert (status, set(_users(superuser))) == (1, everyone), values
    with keyproxy_settings(USER_ID="u_{pk}{pk}x{username}"):
        assert _run("keyproxy_sync", "--prune", "--dry-run")[1]["deleted"] == 0
    _id_by_function.may_be_id = lambda text: text.startswith("u_")  # type: ignore[attr-defined]
    try:
        with keyproxy_settings(USER_ID=_id_by_function, SERVICE_KEY_FILE=str(tmp_path / "{tenant}.key")):
            assert _run("keyproxy_sync", "--prune")[1]["deleted"] == 1
    finally:
        del _id_by_function.may_be_id  # type: ignore[attr-defined]
    assert set(_users(superuser)) == everyone - {"u_987654"}


def test_sync_protects_the_owner_of_a_service_key_that_was_replaced_since_the_last_run(
    backend: str, superuser: psycopg.Connection[Any], tmp_path: Path
) -> None:
    file = tmp_path / "service.key"
    with keyproxy_settings(SERVICE_KEY_FILE=str(file)):
        for owner in ("u_987654", "u_987655"):
            secret = keys.make()
            superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'acme')", [owner])
            superuser.execute(
                "INSERT INTO keyproxy.api_keys (id, user_id, digest, hint) VALUES (%s, %s, %s, %s)",
                [keys.new_key_id(), owner, keys.digest(secret), keys.hint(secret)],
            )
            file.write_text(secret, encoding="ascii")
            _run("keyproxy_sync", "--prune")
            assert set(_users(superuser)) == {owner}


def test_user_that_signs_up_while_orphans_are_deleted_stays(
    backend: str, superuser: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(_names)
    with keyproxy_settings(USER_ID="n_{username}"):
        superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'acme')", [f"n_{name}"])
        prune = synchronising._prune

        def sign_up_first(*arguments: Any) -> None:
            User.objects.create_user(name)
            prune(*arguments)

        monkeypatch.setattr(synchronising, "_prune", sign_up_first)
        status, result = _run("keyproxy_sync", "--prune")
    assert (status, result["deleted"]) == (0, 0)
    assert f"n_{name}" in _users(superuser)


def test_sync_reports_a_conflict_and_does_the_rest(backend: str, superuser: psycopg.Connection[Any]) -> None:
    first, second = _bulk(2)
    superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'globex')", [f"u_{first.pk}"])
    status, result = _run("keyproxy_sync")
    assert status == 1
    assert _users(superuser) == {f"u_{second.pk}": False}
    assert result["waiting"] == (0 if backend == "sql" else 1)
    assert [one["user"] for one in result["failed"]] == ([f"u_{first.pk}"] if backend == "sql" else [])


def test_sync_delivers_what_waits_for_a_retry(
    committing_db: None, superuser: psycopg.Connection[Any], deployment: Deployment, tmp_path: Path
) -> None:
    settings = {"BACKEND": "api", "TENANT": "acme", "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(**settings, ADMIN_URL="http://127.0.0.1:9"):
        users = [User.objects.create_user(next(_names)) for _ in range(5)]
        status, _ = _run("keyproxy_sync")
        assert status == 1
        assert OutboxEvent.objects.count() == 5
    with keyproxy_settings(**settings, ADMIN_URL=deployment.admin_url):
        status, result = _run("keyproxy_sync")
    assert (status, result["delivered"], result["waiting"], result["created"]) == (0, 5, 0, 0)
    assert set(_users(superuser)) == {f"u_{user.pk}" for user in users}


def test_sync_is_misuse_without_backend(committing_db: None) -> None:
    assert _run("keyproxy_sync")[0] == 2


def _checks(result: dict[str, Any]) -> dict[str, bool | None]:
    """The result of each check; of several under one name, the one that is not a note."""
    found: dict[str, bool | None] = {}
    for one in result["checks"]:
        if one["ok"] is not None or one["check"] not in found:
            found[one["check"]] = one["ok"]
    return found


def test_check_passes_for_a_correct_installation(backend: str, deployment: Deployment) -> None:
    with keyproxy_settings(TRUST="signed", JWKS_URL=deployment.jwks_url):
        status, result = _run("keyproxy_check")
    assert status == 0, result
    assert result["ok"] is True
    names = {"sql": {"settings", "schema", "rights", "tenant", "JWKS", "outbox"}}
    names["api"] = names["sql"] - {"schema"} | {"admin API"}
    assert _checks(result) == dict.fromkeys(names[backend], True)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"TENANT": "nowhere"}, "tenant"),
        ({"TRUST": "signed", "JWKS_URL": "http://127.0.0.1:9/jwks.json"}, "JWKS"),
    ],
)
def test_check_names_the_fault(backend: str, changes: dict[str, Any], failing: str) -> None:
    with keyproxy_settings(**changes):
        status, result = _run("keyproxy_check")
    assert status == 1
    assert [name for name, is_ok in _checks(result).items() if is_ok is False] == [failing]


def test_check_fails_for_a_service_key_of_the_wrong_mode(committing_db: None, tmp_path: Path) -> None:
    for setting, is_test in (("SERVICE_KEY_FILE", True), ("SERVICE_TEST_KEY_FILE", False)):
        file = tmp_path / setting
        file.write_text(keys.make(is_test=is_test))
        with keyproxy_settings(**{setting: str(file)}):
            status, result = _run("keyproxy_check")
        (failed,) = [one for one in result["checks"] if one["ok"] is False]
        assert status == 1
        assert setting in failed["detail"]
        assert file.read_text() not in failed["detail"]


def test_check_notes_a_service_key_that_it_cannot_read(committing_db: None) -> None:
    with keyproxy_settings(SERVICE_KEY_FILE="/nonexistent/worker.key"):
        status, result = _run("keyproxy_check")
    assert status == 0
    assert any("/nonexistent/worker.key" in one["detail"] for one in result["checks"] if one["ok"] is None)


def test_command_before_migrate_names_the_command_to_run(backend: str, tables: None) -> None:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE keyproxy_outbox RENAME TO moved")
        with pytest.raises(CommandError, match=r"run manage\.py migrate"):
            call_command("keyproxy_sync")
        transaction.set_rollback(True)


def test_check_fails_for_an_admin_api_that_is_absent(
    committing_db: None, deployment: Deployment, tmp_path: Path
) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("kp_admin_wrong")
    for changes in (
        {"ADMIN_URL": "http://127.0.0.1:9"},
        {"ADMIN_TOKEN_FILE": str(wrong)},
        {"ADMIN_TOKEN_FILE": "/none"},
    ):
        values = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)} | changes
        with keyproxy_settings(BACKEND="api", **values):
            status, result = _run("keyproxy_check")
        assert status == 1
        assert _checks(result)["admin API"] is False


def test_check_fails_for_an_event_that_has_waited_for_long(backend: str) -> None:
    event = OutboxEvent.objects.create(operation="create", user_id="u_1", payload={}, last_error="refused: why")
    assert _run("keyproxy_check")[0] == 0
    OutboxEvent.objects.filter(pk=event.pk).update(created_at=timezone.now() - timedelta(minutes=11))
    status, result = _run("keyproxy_check")
    assert status == 1
    (outbox,) = [one for one in result["checks"] if one["check"] == "outbox"]
    assert "refused: why" in outbox["detail"]


def test_check_leaves_no_user(backend: str, superuser: psycopg.Connection[Any]) -> None:
    _run("keyproxy_check")
    assert _users(superuser) == {}


def test_repeated_creation_leaves_a_first_key_that_was_handed_out_alone(
    committing_db: None, superuser: psycopg.Connection[Any], deployment: Deployment
) -> None:
    """Another event for a user that exists, whose delivery also fails at first."""
    values = {
        "BACKEND": "api",
        "TENANT": "acme",
        "ADMIN_TOKEN_FILE": str(deployment.admin_token_file),
        "FIRST_KEY": True,
    }
    with keyproxy_settings(**values, ADMIN_URL=deployment.admin_url):
        user = User.objects.create_user(next(_names))
    with keyproxy_settings(**values, ADMIN_URL="http://127.0.0.1:9"):
        lifecycle.create(user, "default", actor="django:sync")
        OutboxEvent.objects.update(created_at=timezone.now() + timedelta(minutes=1))
    with keyproxy_settings(**values, ADMIN_URL=deployment.admin_url):
        assert OutboxEvent.objects.get().attempts == 1
        list(outbox.drain("default"))
    assert not OutboxEvent.objects.exists()
    rows = superuser.execute("SELECT revoked_at FROM keyproxy.api_keys WHERE user_id = %s", [f"u_{user.pk}"]).fetchall()
    assert rows == [(None,)]

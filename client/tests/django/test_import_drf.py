"""The keys of djangorestframework-api-key, imported by each of the three ways, work through the proxy."""

from __future__ import annotations

import csv
import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.hashers import PBKDF2PasswordHasher
from django.db import connections
from django.utils import timezone
from rest_framework_api_key.models import APIKey

from commands import Done, run
from deployment import Deployment
from keyproxy_client.django.users import keyproxy_id
from project.accounts.models import CustomAPIKey
from project.settings import _database
from project.testing import keyproxy_settings
from proxied import status_and_headers

MODEL = "accounts.CustomAPIKey"
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def admin_alias(deployment: Deployment) -> Iterator[str]:
    """A connection with the rights of keyproxy's admin role."""
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute("GRANT keyproxy_admin TO app_importer" if _has_role(superuser) else _ROLE)
    connections.databases["keys"] = connections.configure_settings(
        {**settings.DATABASES, "keys": {**_database(deployment.dsn), "OPTIONS": {"options": "-c role=app_importer"}}}
    )["keys"]
    yield "keys"
    connections["keys"].close()
    del connections.databases["keys"]


_ROLE = "CREATE ROLE app_importer LOGIN IN ROLE keyproxy_admin"


def _has_role(superuser: psycopg.Connection[Any]) -> bool:
    return superuser.execute("SELECT true FROM pg_roles WHERE rolname = 'app_importer'").fetchone() is not None


@pytest.fixture
def project(deployment: Deployment, committing_db: None) -> Iterator[None]:
    api = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND="api", PROVISION="first_use", **api):
        yield
        CustomAPIKey.objects.all().delete()
        APIKey.objects.all().delete()


@pytest.fixture
def owner(project: None) -> Any:
    return get_user_model().objects.create_user(secrets.token_hex(6))


@pytest.fixture(
    params=[pytest.param("api", marks=pytest.mark.once), pytest.param("csv", marks=pytest.mark.once), "using"]
)
def way(request: pytest.FixtureRequest, project: None, admin_alias: str, tmp_path: Path) -> Any:
    """Imports, by one of the ways; arguments of the command."""
    capsys = request.getfixturevalue("capsys")
    deployment = request.getfixturevalue("deployment")

    def run_import(*arguments: str) -> Done:
        if request.param == "api":
            return run(capsys, "keyproxy_import_drf", MODEL, *arguments, "--json")
        if request.param == "using":
            return run(capsys, "keyproxy_import_drf", MODEL, *arguments, "--using", admin_alias, "--json")
        path = tmp_path / "keys.csv"
        done = run(capsys, "keyproxy_import_drf", MODEL, *arguments, "--csv", str(path), "--json")
        if path.exists() and done.status == 0:
            deployment.cli("key", "import", str(path))
        return done

    run_import.name = request.param  # type: ignore[attr-defined]
    return run_import


def _status(deployment: Deployment, secret: str) -> int:
    return status_and_headers(deployment.origin, secret)[0]


def test_old_keys_keep_working_with_their_owner_mode_and_state(way: Any, owner: Any, deployment: Deployment) -> None:
    made = {
        "live": CustomAPIKey.objects.create_key(name="nightly", user=owner),
        "test": CustomAPIKey.objects.create_key(name="test", user=owner, is_test=True),
        "expired": CustomAPIKey.objects.create_key(name="old", user=owner, expiry_date=timezone.now() - DAY),
        "expiring": CustomAPIKey.objects.create_key(name="soon", user=owner, expiry_date=timezone.now() + DAY),
        "revoked": CustomAPIKey.objects.create_key(name="gone", user=owner, revoked=True),
    }
    slow, slow_secret = CustomAPIKey.objects.create_key(name="of an old release", user=owner)
    CustomAPIKey.objects.filter(pk=slow.pk).update(
        hashed_key=PBKDF2PasswordHasher().encode(slow_secret, "salt1", iterations=1000)
    )
    assert way("--scope", "jobs:write", "--scope", "jobs:read").status == 0
    for name, (_, secret) in made.items():
        status, headers = status_and_headers(deployment.origin, secret)
        if name in ("expired", "revoked"):
            assert status == 401
            continue
        assert status == 200, name
        assert headers["x-keyproxy-user"] == keyproxy_id(owner)
        assert headers["x-keyproxy-tenant"] == "acme"
        assert set(headers["x-keyproxy-scope"].split()) == {"jobs:read", "jobs:write"}
        assert headers["x-keyproxy-test"] == str(name == "test").lower()
    assert _status(deployment, slow_secret) == 200
    key, _ = made["expiring"]
    with psycopg.connect(deployment.dsn) as superuser:
        row = superuser.execute(
            "SELECT name, created_at, expires_at FROM keyproxy.api_keys WHERE hint = %s", [f"{key.prefix}.…"]
        ).fetchone()
    assert row == ("soon", key.created, key.expiry_date)
    # Wrong secrets under a known prefix stay refused.
    assert _status(deployment, made["live"][1][:-4] + "0000") == 401


@pytest.mark.parametrize("way", [pytest.param("api", marks=pytest.mark.once), "using"], indirect=True)
def test_import_can_be_repeated_and_revokes_what_was_revoked_in_django_meanwhile(
    way: Any, owner: Any, deployment: Deployment
) -> None:
    kept, kept_secret = CustomAPIKey.objects.create_key(name="kept", user=owner)
    gone, gone_secret = CustomAPIKey.objects.create_key(name="gone", user=owner)
    first = way().result
    assert (first["imported"], first["present"], first["revoked"]) == (2, 0, 0)
    assert [_status(deployment, one) for one in (kept_secret, gone_secret)] == [200, 200]
    gone.revoked = True
    gone.save()
    CustomAPIKey.objects.create_key(name="new", user=owner)
    second = way().result
    assert (second["imported"], second["present"], second["revoked"], second["problems"]) == (1, 2, 1, [])
    third = way().result
    assert (third["imported"], third["present"], third["revoked"]) == (0, 3, 0)
    with psycopg.connect(deployment.dsn) as superuser:
        states = dict(
            superuser.execute(
                "SELECT hint, revoke_reason FROM keyproxy.api_keys WHERE user_id = %s", [keyproxy_id(owner)]
            ).fetchall()
        )
    assert states[f"{gone.prefix}.…"] == "revoked in Django"
    assert states[f"{kept.prefix}.…"] is None


def test_dry_run_changes_nothing(way: Any, owner: Any, deployment: Deployment, tmp_path: Path) -> None:
    CustomAPIKey.objects.create_key(name="n", user=owner)
    done = way("--dry-run")
    assert (done.status, done.result["dry_run"]) == (0, True)
    assert done.result["imported"] + done.result["written"] == 1
    assert not list(tmp_path.glob("*.csv"))
    with psycopg.connect(deployment.dsn) as superuser:
        assert not superuser.execute("SELECT FROM keyproxy.users WHERE id = %s", [keyproxy_id(owner)]).fetchall()


@pytest.mark.parametrize("way", [pytest.param("api", marks=pytest.mark.once), "using"], indirect=True)
def test_import_does_not_enable_an_inactive_owner_or_move_one_to_another_tenant(
    way: Any, owner: Any, deployment: Deployment
) -> None:
    inactive = get_user_model().objects.create_user(secrets.token_hex(6), is_active=False)
    _, secret = CustomAPIKey.objects.create_key(name="inactive", user=inactive)
    _, foreign = CustomAPIKey.objects.create_key(name="foreign", user=owner)
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'globex')", [keyproxy_id(owner)])
    done = way()
    assert done.status == 1
    assert "another" in done.result["problems"][0]["problem"] or "other" in done.result["problems"][0]["problem"]
    assert len(done.result["problems"]) == 1
    assert done.result["imported"] == 1
    assert [_status(deployment, one) for one in (secret, foreign)] == [401, 401]


def test_keys_without_owner_are_problems_and_others_are_imported(
    project: None, owner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    APIKey.objects.create_key(name="without an owner")
    CustomAPIKey.objects.create_key(name="n", user=owner)
    done = run(capsys, "keyproxy_import_drf", "--json")
    assert done.status == 1
    assert set(done.result["models"]) == {"rest_framework_api_key.APIKey", MODEL}
    assert done.result["imported"] == 1
    (problem,) = done.result["problems"]
    assert "--user-field" in problem["problem"]
    assert "1 key was not imported" in done.stderr


def test_file_is_readable_by_its_owner_only_and_has_the_columns_of_key_import(
    project: None, owner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, secret = CustomAPIKey.objects.create_key(name="a, b", user=owner, is_test=True)
    path = tmp_path / "keys.csv"
    assert run(capsys, "keyproxy_import_drf", MODEL, "--csv", str(path), "--scope", "a:b").status == 0
    assert path.stat().st_mode & 0o777 == 0o600
    (row,) = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    assert (row["prefix"], row["user"], row["tenant"], row["name"]) == (key.prefix, keyproxy_id(owner), "acme", "a, b")
    assert (row["is_test"], row["revoked"], row["scopes"]) == ("true", "false", "a:b")
    assert secret not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("accounts.Missing",), "accounts.CustomAPIKey"),
        (("auth.User",), "not a model of keys"),
        ((MODEL, "--user-field", "owner"), "'owner'"),
        ((MODEL, "--user-field", "name"), "name"),
        ((MODEL, "--scope", "a b"), "--scope"),
        ((MODEL, "--using", "missing"), "missing"),
        ((MODEL, "--csv", "/nonexistent/x.csv"), "/nonexistent"),
        ((MODEL, "--csv", "x", "--using", "y"), "not allowed with"),
    ],
)
def test_misuse_has_status_2(
    project: None, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    done = run(capsys, "keyproxy_import_drf", *arguments)
    assert done.status == 2
    assert named in done.stderr


def test_project_that_uses_sql_names_the_way(project: None, capsys: pytest.CaptureFixture[str]) -> None:
    with keyproxy_settings(BACKEND="sql", ADMIN_URL="", ADMIN_TOKEN_FILE=""):
        done = run(capsys, "keyproxy_import_drf")
    assert done.status == 2
    assert "--using" in done.stderr


def test_dry_run_needs_no_way(project: None, owner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    CustomAPIKey.objects.create_key(name="n", user=owner)
    with keyproxy_settings(BACKEND="sql", ADMIN_URL="", ADMIN_TOKEN_FILE=""):
        done = run(capsys, "keyproxy_import_drf", MODEL, "--dry-run", "--json")
    assert done.status == 0
    assert (done.result["dry_run"], done.result["imported"], done.result["problems"]) == (True, 1, [])


def test_role_of_the_application_cannot_import_hashes(
    project: None, owner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    CustomAPIKey.objects.create_key(name="n", user=owner)
    done = run(capsys, "keyproxy_import_drf", MODEL, "--using", "default")
    assert done.status == 1
    assert "permission denied" in done.stderr

"""The system checks, and what stops a process at its start."""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import psycopg
import pytest
from django.apps import apps
from django.conf import settings
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test import override_settings
from django.urls import include, path
from psycopg import sql
from rest_framework.permissions import IsAdminUser
from rest_framework.views import APIView

from deployment import Deployment, clean_environment
from keyproxy_client.django import checks, drf
from project.testing import keyproxy_settings

FERNET_KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
OLD_PERMISSION = "rest_framework_api_key.permissions.HasAPIKey"
PATHS = settings.MIDDLEWARE
LEAST = {"BACKEND": "off", "TENANT": "acme", "TRUST": "loopback"}


def urlconf(*patterns: Any) -> ModuleType:
    module = ModuleType("urlconf")
    module.urlpatterns = patterns  # type: ignore[attr-defined]
    return module


def ids() -> list[str]:
    return sorted(str(message.id).removeprefix("keyproxy.") for message in run_checks(tags=["keyproxy"]))


# In the row without PostgreSQL, "sql" is E003: see the tests with `deployment`.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("nothing is wrong", {}, {"DEBUG": True}, []),
    ("an unknown key", {"ORIGINS": ""}, {"DEBUG": True}, ["E001"]),
    ("an invalid value", {"KEY_DAYS": "90"}, {}, ["E001"]),
    ("two invalid values", {"KEY_DAYS": "90", "TRUST": "all"}, {}, ["E001", "E001"]),
    ("a path that does not exist", {"TENANT": "project.absent.f"}, {"DEBUG": True}, ["E001"]),
    ("a field that does not exist", {"USER_ID": "u_{uuid}"}, {"DEBUG": True}, ["E001"]),
    ("a database that does not exist", {"BACKEND": "sql", "DATABASE": "x"}, {}, ["E001"]),
    ("a fallback that does not exist", {"HAS_API_KEY_FALLBACK": "project.absent.P"}, {"DEBUG": True}, ["E001", "W004"]),
    ("a fallback that is no permission", {"HAS_API_KEY_FALLBACK": "os.path"}, {"DEBUG": True}, ["E001", "W004"]),
    ("no rule with the middleware", {"TRUST": None}, {"DEBUG": True}, ["E002"]),
    ("no rule and another fault", {"TRUST": None, "KEY_DAYS": -1}, {"DEBUG": True}, ["E001", "E002"]),
    ("no rule without the middleware", {"TRUST": None}, {"DEBUG": True, "MIDDLEWARE": [], "ROOT_URLCONF": None}, []),
    (
        "no rule with a default class of DRF",
        {"TRUST": None},
        {
            "DEBUG": True,
            "MIDDLEWARE": PATHS[1:],
            "REST_FRAMEWORK": {"DEFAULT_PERMISSION_CLASSES": ["keyproxy_client.django.drf.HasAPIKey"]},
        },
        ["E002"],
    ),
    ("a fixed identity in production", {"DEV_IDENTITY": {"user": "u_1"}}, {}, ["E002", "W002"]),
    ("a fixed identity", {"DEV_IDENTITY": {"user": "u_1"}}, {"DEBUG": True}, []),
    ("no key to seal with", {"CREDENTIALS": "per_user"}, {"DEBUG": True}, ["E004"]),
    ("a short key to seal with", {"CREDENTIALS": "per_user", "SECRET_KEYS": ["eA=="]}, {"DEBUG": True}, ["E004"]),
    ("no base64", {"CREDENTIALS": "per_user", "SECRET_KEYS": [FERNET_KEY, "é"]}, {"DEBUG": True}, ["E004"]),
    ("no file of keys", {"CREDENTIALS": "per_user", "SECRET_KEYS_FILE": "/absent"}, {"DEBUG": True}, ["E004"]),
    ("a key to seal with", {"CREDENTIALS": "per_user", "SECRET_KEYS": [FERNET_KEY]}, {"DEBUG": True}, []),
    ("no provisioning in production", {}, {}, ["W002"]),
    ("the middleware is second", {}, {"DEBUG": True, "MIDDLEWARE": [PATHS[1], PATHS[0], *PATHS[2:]]}, ["W003"]),
    ("the old permission", {"HAS_API_KEY_FALLBACK": OLD_PERMISSION}, {"DEBUG": True}, ["W004"]),
    ("the admin API", {"BACKEND": "api", "ADMIN_URL": "http://h", "ADMIN_TOKEN_FILE": "/t"}, {}, []),
]  # fmt: skip


@pytest.mark.parametrize(("keyproxy", "others", "found"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_checks_report(keyproxy: dict[str, Any], others: dict[str, Any], found: list[str]) -> None:
    with override_settings(KEYPROXY={**LEAST, **keyproxy}, **others):
        assert ids() == found


def test_missing_settings_are_e001() -> None:
    with override_settings(KEYPROXY={}, MIDDLEWARE=[], ROOT_URLCONF=urlconf()):
        assert ids() == ["E001", "E001"]
    with override_settings():
        del settings.KEYPROXY
        assert ids() == ["E001", "E002"]


@pytest.mark.parametrize(
    "permission",
    [drf.HasAPIKey, drf.HasScope("a"), drf.HasAPIKey | IsAdminUser, IsAdminUser & ~drf.HasScope("a")],
    ids=str,
)
def test_a_view_with_a_class_of_drf_needs_a_rule(permission: Any) -> None:
    kinds: list[type[APIView]] = [
        type("Jobs", (APIView,), {"permission_classes": [one]}) for one in (IsAdminUser, permission)
    ]
    with override_settings(KEYPROXY={**LEAST, "TRUST": None}, DEBUG=True, MIDDLEWARE=[]):
        for kind, found in zip(kinds, ([], ["E002"]), strict=True):
            with override_settings(ROOT_URLCONF=urlconf(path("v1/", include(([path("jobs", kind.as_view())], "v1"))))):
                assert ids() == found


@pytest.mark.parametrize(
    ("absent", "changes", "extra"),
    [
        ("jwt", {"TRUST": "signed", "JWKS_URL": "http://127.0.0.1/jwks.json"}, "signed"),
        ("cryptography", {"TRUST": "signed", "JWKS_URL": "http://127.0.0.1/jwks.json"}, "signed"),
        ("cryptography", {"CREDENTIALS": "per_user", "SECRET_KEYS": [FERNET_KEY]}, "sealed"),
    ],
)
def test_a_missing_extra_is_e005(
    absent: str, changes: dict[str, Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with override_settings(KEYPROXY={**LEAST, **changes}, DEBUG=True):
        assert ids() == []
        real = importlib.util.find_spec
        monkeypatch.setattr(checks, "find_spec", lambda name: None if name == absent else real(name))
        (message,) = run_checks(tags=["keyproxy"])
    assert (message.id, message.hint) == ("keyproxy.E005", f"pip install 'keyproxy-client[{extra}]'")


@pytest.mark.parametrize(
    ("keyproxy", "stopping"),
    [
        ({"ORIGINS": ""}, "keyproxy.E001"),
        ({"TRUST": None}, "keyproxy.E002"),
        ({"DEV_IDENTITY": {"user": "u_1"}}, "keyproxy.E002"),
        ({"CREDENTIALS": "per_user"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_e001_and_e002_stop_the_start_and_no_other_error(keyproxy: dict[str, Any], stopping: str | None) -> None:
    with override_settings(KEYPROXY={**LEAST, **keyproxy}):
        if stopping is None:
            checks_pass = apps.get_app_config("keyproxy").ready()
            assert checks_pass is None
        else:
            with pytest.raises(ImproperlyConfigured, match=stopping):
                apps.get_app_config("keyproxy").ready()


@pytest.mark.once
@pytest.mark.parametrize(("program", "status"), [("import project.wsgi", 1), ("import project.asgi", 1)])
def test_a_server_without_a_trust_rule_does_not_start(program: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=clean_environment() | {"PYTHONPATH": os.pathsep.join(sys.path), "TEST_KEYPROXY": '{"TRUST": null}'},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status
    assert "keyproxy.E002" in done.stderr


# With PostgreSQL.


@pytest.fixture
def role(deployment: Deployment) -> Iterator[str]:
    """A role that may log in and has no rights, as the alias `other`."""
    name, password = f"check_{secrets.token_hex(4)}", secrets.token_hex(16)
    alias = {**settings.DATABASES["default"], "USER": name, "PASSWORD": password}
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password))
        )
        connections.settings["other"] = connections.configure_settings({**connections.settings, "other": alias})[
            "other"
        ]
        try:
            yield name
        finally:
            connections["other"].close()
            del connections["other"], connections.settings["other"]
            superuser.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            superuser.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def grant(deployment: Deployment, statement: str, role: str) -> None:
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute(sql.SQL(statement).format(role=sql.Identifier(role)))


def messages(alias: str) -> dict[str, str]:
    with keyproxy_settings(BACKEND="sql", DATABASE=alias):
        found = run_checks(tags=["database"], databases=[alias], include_deployment_checks=False)
    return {str(message.id).removeprefix("keyproxy."): str(message.msg) for message in found}


def test_e011_names_each_right_that_is_missing(deployment: Deployment, role: str) -> None:
    assert messages("other") == {"E011": "The database role lacks rights in keyproxy's schema: USAGE on the schema"}
    grant(deployment, "GRANT USAGE ON SCHEMA keyproxy TO {role}", role)
    grant(deployment, "GRANT SELECT ON keyproxy.migrations TO {role}", role)
    grant(
        deployment,
        "GRANT SELECT (id, tenant_id, disabled_at), INSERT (id, tenant_id) ON keyproxy.users TO {role}",
        role,
    )
    found = messages("other")["E011"]
    assert found.partition("schema: ")[2] == (
        "UPDATE (disabled_at) on users; DELETE on users; SELECT (id, user_id, hint, name, scopes, is_test, created_at,"
        " expires_at, revoked_at, revoke_reason, replaces, last_used_at) on api_keys; INSERT (id, user_id, digest, hint,"
        " name, scopes, is_test, expires_at, replaces) on api_keys; UPDATE (revoked_at, revoke_reason, expires_at) on"
        " api_keys"
    )


def test_the_application_role_has_no_message(deployment: Deployment, tables: None) -> None:
    assert messages("default") == {}


@pytest.mark.parametrize(
    ("statement", "excess"),
    [
        ("GRANT SELECT (digest) ON keyproxy.api_keys TO {role}", "reads digests of keys"),
        ("GRANT SELECT ON keyproxy.api_keys TO {role}", "reads digests of keys"),
        ("GRANT SELECT ON keyproxy.audit_log TO {role}", "reads the audit log"),
        ("GRANT SELECT (entity_id) ON keyproxy.audit_log TO {role}", "reads the audit log"),
        ("ALTER ROLE {role} SUPERUSER", "owns the schema, reads digests of keys, reads the audit log"),
    ],
)
def test_w010_names_what_the_role_can_do_beyond_its_rights(
    deployment: Deployment, role: str, statement: str, excess: str
) -> None:
    grant(deployment, "GRANT keyproxy_app TO {role}", role)
    assert messages("other") == {}
    grant(deployment, statement, role)
    assert messages("other") == {"W010": f"The database role {excess}"}


def test_e010_without_the_schema_and_with_an_old_one(deployment: Deployment, role: str) -> None:
    class Cursor:
        """A database of which only the answers matter."""

        def __init__(self, *answers: Any) -> None:
            self.answers = list(answers)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def execute(self, statement: str, _parameters: object = None) -> None:
            self.is_version = "max(number)" in statement
            self.is_role = "has_schema_privilege" in statement

        def fetchone(self) -> Any:
            return self.answers[1:2] if self.is_version else self.answers[0] if self.is_role else (True,)

        def fetchall(self) -> Any:
            return []

    def found(*answers: Any) -> list[str | None]:
        connection = SimpleNamespace(cursor=lambda: Cursor(*answers))
        return [message.id for message in checks.database_messages(connection) if message.id != "keyproxy.W010"]

    assert found(None) == ["keyproxy.E010"]
    assert found((True, False, False), 28) == ["keyproxy.E010"]
    assert found((True, False, True), 29) == []
    # A role without rights cannot read the number of the migration.
    assert found((False, False, False)) == ["keyproxy.E010", "keyproxy.E011"]


def test_sql_needs_postgresql_and_its_transactions() -> None:
    lite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:", "ATOMIC_REQUESTS": True}
    connections.settings["lite"] = connections.configure_settings({**connections.settings, "lite": lite})["lite"]
    try:
        with keyproxy_settings(BACKEND="sql", DATABASE="lite"):
            assert ids() == ["E003"]
    finally:
        del connections.settings["lite"]
    if connections["default"].vendor == "postgresql":
        with keyproxy_settings(BACKEND="sql"):
            assert ids() == []
            connections["default"].settings_dict["ATOMIC_REQUESTS"] = False
            try:
                assert ids() == ["W001"]
            finally:
                connections["default"].settings_dict["ATOMIC_REQUESTS"] = True

"""manage.py keyproxy_issue."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.utils import timezone

from commands import run
from deployment import Deployment
from keyproxy_client.django.users import keyproxy_id
from project.testing import keyproxy_settings
from proxied import status_and_headers


@pytest.fixture(params=["sql", pytest.param("api", marks=pytest.mark.once)])
def owner(request: pytest.FixtureRequest, deployment: Deployment, committing_db: None) -> Iterator[Any]:
    api = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND=request.param, PROVISION="first_use", SCOPES=["jobs:read"], **api):
        yield get_user_model().objects.create_user(secrets.token_hex(6))


def test_secret_alone_is_on_stdout_and_works(
    owner: Any, deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(capsys, "keyproxy_issue", owner.username, "--test", "--scope", "jobs:write")
    assert done.status == 0
    status, headers = status_and_headers(deployment.origin, done.stdout.removesuffix("\n"))
    assert status == 200
    assert headers["x-keyproxy-user"] == keyproxy_id(owner)
    assert (headers["x-keyproxy-test"], headers["x-keyproxy-scope"]) == ("true", "jobs:write")
    assert done.stdout.strip() not in done.stderr
    assert headers["x-keyproxy-key-id"] in done.stderr


def test_json_has_the_key_with_the_life_that_was_asked_for(owner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, days in (((), 90), (("--expires-in", "2d"), 2)):
        made = run(capsys, "keyproxy_issue", str(owner.pk), *arguments, "--json").result
        life = datetime.fromisoformat(made["expires_at"]) - timezone.now()
        assert timedelta(days=days) - timedelta(minutes=1) < life <= timedelta(days=days)
    assert (
        run(capsys, "keyproxy_issue", keyproxy_id(owner), "--expires-in", "never", "--json").result["expires_at"]
        is None
    )
    assert set(made) == {"id", "user", "secret", "is_test", "scopes", "expires_at"}
    assert (made["user"], made["is_test"], made["scopes"]) == (keyproxy_id(owner), False, ["jobs:read"])


def test_failure_has_status_1_and_one_line(owner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with keyproxy_settings(KEYS_PER_USER_MAX=1):
        run(capsys, "keyproxy_issue", owner.username)
        done = run(capsys, "keyproxy_issue", owner.username)
    assert done.status == 1
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "KEYS_PER_USER_MAX" in done.stderr
    assert run(capsys, "keyproxy_issue", "nonexistent").status == 1


def test_misuse_has_status_2(owner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), (owner.username, "--expires-in", "0d"), (owner.username, "--scope", "a b")):
        assert run(capsys, "keyproxy_issue", *arguments).status == 2
    get_user_model().objects.create_user(str(owner.pk))
    done = run(capsys, "keyproxy_issue", str(owner.pk))
    assert done.status == 2
    assert "several users" in done.stderr
    with keyproxy_settings(BACKEND="off"):
        assert run(capsys, "keyproxy_issue", owner.username).status == 1

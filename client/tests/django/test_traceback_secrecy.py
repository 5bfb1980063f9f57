"""Error reports of Django show the variables of every frame: none of them has a secret."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.contrib.auth import get_user_model
from django.views.debug import ExceptionReporter

from keyproxy_client import keys
from keyproxy_client.acting import Acting
from keyproxy_client.django import credentials, sealing
from keyproxy_client.django.directory.admin_api import AdminApi
from keyproxy_client.django.directory.errors import DirectoryError
from keyproxy_client.django.directory.interface import IssuedKey, KeyWish
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.models import Credential
from keyproxy_client.django.sealing import CredentialUnusable
from keyproxy_client.django.users import keyproxy_id
from project.testing import keyproxy_settings

SECRET = keys.make()
TOKEN = secrets.token_urlsafe(32)
FERNET = Fernet.generate_key().decode()


class _Broken(http.client.HTTPConnection):
    """A connection on which the response breaks off within the body, or the request is not sent."""

    is_sent = True

    def connect(self) -> None:
        pass

    def send(self, _data: Any) -> None:
        if not self.is_sent:
            raise TimeoutError

    def getresponse(self) -> Any:
        content = json.dumps({"secret": SECRET}).encode()
        return type(
            "Response", (), {"status": 200, "length": 9, "read1": lambda _, _size, got=[content, b""]: got.pop(0)}
        )()


@pytest.fixture
def broken_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdminApi:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN, encoding="ascii")
    monkeypatch.setattr(http.client, "HTTPConnection", _Broken)
    return AdminApi("http://127.0.0.1:1", str(token_file), 2.0)


@pytest.fixture
def failures(db: None, broken_api: AdminApi, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], Any]]]:
    user = get_user_model().objects.create_user(secrets.token_hex(6))
    issued = IssuedKey("key_1", keyproxy_id(user), False, None, SECRET)

    def unsent() -> None:
        monkeypatch.setattr(_Broken, "is_sent", False)
        broken_api.call("POST", "/v1/keys", {})

    def seal_without_a_key() -> None:
        with keyproxy_settings(SECRET_KEYS=["no key"]):
            credentials.keep(user, issued)

    def unseal_of_another_row() -> None:
        Credential.objects.create(user=user, key_id="key_2", sealed=sealing.seal(user.pk, "key_1", SECRET))
        credentials.secret_for(Acting(keyproxy_id(user), "acme", False))

    def refused_insert() -> None:
        monkeypatch.setattr(keys, "make", lambda **_: SECRET)
        directory().users.create(keyproxy_id(user), "acme", actor="t")
        directory().keys.issue(keyproxy_id(user), "acme", KeyWish("x" * 201), actor="t")

    def refused_sign_up() -> None:
        monkeypatch.setattr(keys, "make", lambda **_: SECRET)
        directory().users.create("u_new", "missing", actor="t", first_key=KeyWish())

    with keyproxy_settings(PROVISION=None, SECRET_KEYS=[FERNET], CREDENTIALS="per_user"):
        yield [
            lambda: broken_api.call("POST", "/v1/keys", {}),
            unsent,
            seal_without_a_key,
            unseal_of_another_row,
            refused_insert,
            refused_sign_up,
        ]


def test_error_reports_show_no_secret(failures: list[Callable[[], Any]]) -> None:
    for fail in failures:
        with pytest.raises((DirectoryError, CredentialUnusable)) as caught:
            fail()
        report = ExceptionReporter(None, caught.type, caught.value, caught.tb).get_traceback_html()
        assert "Traceback" in report
        assert not [hidden for hidden in (SECRET, TOKEN, FERNET) if hidden in report], fail

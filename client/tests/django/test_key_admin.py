"""Keys on the user page of Django's admin."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.apps import apps
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.admin import UserAdmin
from django.contrib.auth.models import Permission
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.test import Client
from django.urls import reverse

from deployment import Deployment
from keyproxy_client.django.admin import KeyAdminMixin, attach
from keyproxy_client.django.directory.interface import KeyWish
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.users import keyproxy_id
from project.testing import keyproxy_settings
from proxied import status_and_headers

SECRET = re.compile(r"kp_(?:live|test)_[0-9A-Za-z]{49}")
TOKEN = re.compile(r'name="token" value="([^"]+)"')
ACTIONS = ("view", "issue", "rotate", "revoke")


@pytest.fixture(params=["sql", pytest.param("api", marks=pytest.mark.once)])
def backend(request: pytest.FixtureRequest, deployment: Deployment, committing_db: None) -> Iterator[str]:
    api = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND=request.param, PROVISION="first_use", SCOPES=["jobs:write"], **api):
        yield request.param


@pytest.fixture
def account(backend: str, deployment: Deployment) -> Iterator[Any]:
    name = secrets.token_hex(6)
    with keyproxy_settings(PROVISION=None):
        user = get_user_model().objects.create_user(name)
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute(
            "INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, 'acme') ON CONFLICT DO NOTHING", [keyproxy_id(user)]
        )
    yield user
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute("DELETE FROM keyproxy.users WHERE id = %s", [keyproxy_id(user)])


@pytest.fixture
def staff(backend: str) -> Any:
    with keyproxy_settings(PROVISION=None):
        return get_user_model().objects.create_superuser(secrets.token_hex(6))


@pytest.fixture
def browser(staff: Any) -> Client:
    client = Client()
    client.force_login(staff)
    return client


def _page(user: Any, rest: str = "") -> str:
    return f"/admin/auth/user/{user.pk}/" + (f"keyproxy/{rest}/" if rest else "change/")


def _issue(browser: Client, user: Any, **fields: str) -> Any:
    form = browser.get(_page(user, "issue"))
    assert form.status_code == 200
    data = {
        "token": TOKEN.findall(form.content.decode())[0],
        "mode": "live",
        "days": "30",
        "name": "n",
        "scopes": "a:b",
    }
    return browser.post(_page(user, "issue"), data | fields)


def _keys(user: Any) -> list[Any]:
    return directory().keys.of_user(keyproxy_id(user), "acme")


@pytest.mark.parametrize(("mode", "days"), [("live", "30"), ("test", "0")])
def test_issued_secret_is_in_the_response_to_the_post_and_nowhere_else(
    browser: Client, account: Any, deployment: Deployment, caplog: pytest.LogCaptureFixture, mode: str, days: str
) -> None:
    with caplog.at_level(logging.DEBUG):
        response = _issue(browser, account, mode=mode, days=days)
    assert response.status_code == 200
    assert (response["Cache-Control"], response["Referrer-Policy"]) == ("no-store", "no-referrer")
    (secret,) = set(SECRET.findall(response.content.decode()))
    assert status_and_headers(deployment.origin, secret)[1]["x-keyproxy-user"] == keyproxy_id(account)
    (key,) = _keys(account)
    assert (key.is_test, key.scopes, key.name) == (mode == "test", ("a:b",), "n")
    assert (key.expires_at is None) == (days == "0")
    kept = [
        caplog.text,
        *(str(entry.get_change_message()) + entry.change_message for entry in LogEntry.objects.all()),
        *(str(session.get_decoded()) for session in Session.objects.all()),
        *map(str, browser.cookies.values()),
        browser.get(_page(account)).content.decode(),
    ]
    assert not [text for text in kept if secret in text or secret[8:] in text]
    assert key.id in LogEntry.objects.latest("pk").change_message


def test_second_submission_of_a_form_shows_that_the_key_was_already_issued(browser: Client, account: Any) -> None:
    first = _issue(browser, account)
    again = browser.post(first.request["PATH_INFO"], _form_of(first))
    assert again.status_code == 200
    assert again["Cache-Control"] == "no-store"
    assert b"already issued" in again.content
    assert not SECRET.search(again.content.decode())
    assert len(_keys(account)) == 1


def _form_of(response: Any) -> dict[str, Any]:
    return dict(response.wsgi_request.POST.items())


def test_token_of_another_page_user_or_staff_member_issues_nothing(browser: Client, account: Any, staff: Any) -> None:
    used = _form_of(_issue(browser, account))
    others = [{**used, "token": token} for token in ("", "x", used["token"] + "x")]
    for form in others:
        assert not SECRET.search(browser.post(_page(account, "issue"), form).content.decode())
    own = TOKEN.findall(browser.get(_page(staff, "issue")).content.decode())[0]
    response = browser.post(_page(account, "issue"), {**used, "token": own})
    assert b"belongs to another page" in response.content
    assert len(_keys(account)) == 1


def test_rotation_shows_the_new_secret_once_and_keeps_the_old_key_for_the_grace_period(
    browser: Client, account: Any, deployment: Deployment
) -> None:
    old = SECRET.findall(_issue(browser, account).content.decode())[0]
    (key,) = _keys(account)
    url = _page(account, f"{key.id}/rotate")
    form = browser.get(url).content.decode()
    assert re.findall(r'<option value="(\d+)"', form) == ["0", "3600", "86400", "604800"]
    data = {"token": TOKEN.findall(form)[0], "grace": "3600"}
    shown = browser.post(url, data)
    new = SECRET.findall(shown.content.decode())[0]
    assert (shown["Cache-Control"], shown["Referrer-Policy"]) == ("no-store", "no-referrer")
    assert new != old
    assert [status_and_headers(deployment.origin, one)[0] for one in (old, new)] == [200, 200]
    again = browser.post(url, data)
    assert b"already issued" in again.content
    assert len(_keys(account)) == 2
    assert not SECRET.search(again.content.decode())


def test_revocation_names_its_reason_and_author(
    browser: Client, account: Any, staff: Any, backend: str, deployment: Deployment
) -> None:
    _issue(browser, account)
    (key,) = _keys(account)
    response = browser.post(_page(account, f"{key.id}/revoke"), {"reason": "lost laptop"}, follow=True)
    assert response.redirect_chain == [(_page(account), 302)]
    (revoked,) = _keys(account)
    assert revoked.revoke_reason == "lost laptop"
    assert b"lost laptop" in response.content
    if backend == "sql":
        with psycopg.connect(deployment.dsn) as superuser:
            actors = superuser.execute(
                "SELECT DISTINCT actor FROM keyproxy.audit_log WHERE entity = 'key' AND entity_id = %s", [key.id]
            ).fetchall()
        assert actors == [(f"django:admin:{staff.pk}",)]


def test_each_action_needs_its_permission(backend: str, account: Any, deployment: Deployment) -> None:
    issued = directory().keys.issue(keyproxy_id(account), "acme", KeyWish("", (), False, None), actor="test")
    with keyproxy_settings(PROVISION=None):
        member = get_user_model().objects.create_user(secrets.token_hex(6), is_staff=True)
    member.user_permissions.add(Permission.objects.get(codename="view_user"))
    browser = Client()
    pages = {
        "issue": _page(account, "issue"),
        "rotate": _page(account, f"{issued.key_id}/rotate"),
        "revoke": _page(account, f"{issued.key_id}/revoke"),
    }
    for granted in (None, *ACTIONS):
        member.user_permissions.remove(
            *Permission.objects.filter(codename__endswith="_key", content_type__app_label="keyproxy")
        )
        if granted is not None:
            permission = Permission.objects.get(codename=f"{granted}_key", content_type__app_label="keyproxy")
            member.user_permissions.add(permission)
        browser.force_login(get_user_model().objects.get(pk=member.pk))
        assert {name for name, url in pages.items() if browser.get(url).status_code == 200} == {granted} & set(pages)
        page = browser.get(_page(account)).content.decode()
        assert (issued.key_id in page) == (granted == "view")
        assert ("keyproxy/issue/" in page) == (granted == "issue")


def test_page_of_a_user_reaches_no_key_of_another(
    browser: Client, account: Any, staff: Any, deployment: Deployment
) -> None:
    issued = directory().keys.issue(keyproxy_id(account), "acme", KeyWish("", (), False, None), actor="test")
    for action in ("rotate", "revoke"):
        assert browser.get(_page(staff, f"{issued.key_id}/{action}")).status_code == 404
        assert browser.post(_page(staff, f"{issued.key_id}/{action}"), {}).status_code == 404
        assert browser.get(_page(account, f"key_missing/{action}")).status_code == 404


def test_anonymous_request_reaches_no_page(backend: str, account: Any) -> None:
    for page in ("issue", "key_x/rotate", "key_x/revoke"):
        assert Client().get(_page(account, page)).status_code == 302


def test_user_page_saves_with_the_list_of_keys_and_works_without_keyproxy(browser: Client, account: Any) -> None:
    _issue(browser, account)
    data = {
        "username": account.username,
        "first_name": "Ada",
        "is_active": "on",
        "date_joined_0": "2026-01-02",
        "date_joined_1": "03:04:05",
    }
    assert browser.post(_page(account), data).status_code == 302
    account.refresh_from_db()
    assert account.first_name == "Ada"
    with keyproxy_settings(BACKEND="api", ADMIN_URL="http://127.0.0.1:9", ADMIN_TOKEN_FILE="/dev/null"):
        page = browser.get(_page(account))
    assert page.status_code == 200
    assert b"ADMIN_TOKEN_FILE" in page.content


def test_project_that_does_not_manage_users_shows_no_keys(browser: Client, account: Any) -> None:
    with keyproxy_settings(BACKEND="off"):
        page = browser.get(_page(account))
    assert page.status_code == 200
    assert b"keyproxy_keys-group" not in page.content
    assert b"keyproxy/issue/" not in page.content


def test_form_refuses_values_that_keyproxy_would_refuse(browser: Client, account: Any) -> None:
    for fields in ({"scopes": "not:a scope*"}, {"days": "-1"}, {"mode": "x"}, {"name": "a\x07b"}):
        response = _issue(browser, account, **fields)
        assert b"errorlist" in response.content
        assert not SECRET.search(response.content.decode())
    assert _keys(account) == []


def test_first_key_of_a_user_that_is_missing_in_keyproxy_creates_it(
    browser: Client, account: Any, deployment: Deployment
) -> None:
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute("DELETE FROM keyproxy.users WHERE id = %s", [keyproxy_id(account)])
    assert SECRET.search(_issue(browser, account).content.decode())


def test_keys_are_added_to_the_admin_that_the_project_registers_once() -> None:
    class SpecialAdmin(UserAdmin):
        list_filter = ("is_staff",)

    site = admin.AdminSite()
    assert attach(site) is False
    site.register(get_user_model(), SpecialAdmin)
    assert attach(site) is True
    first = site.get_model_admin(get_user_model())
    assert isinstance(first, SpecialAdmin)
    assert isinstance(first, KeyAdminMixin)
    assert attach(site) is True
    assert site.get_model_admin(get_user_model()) is first


def test_admin_that_is_registered_late_has_keys_when_the_applications_are_ready() -> None:
    user_model = get_user_model()
    admin.site.unregister(user_model)
    admin.site.register(user_model, UserAdmin)
    apps.get_app_config("keyproxy").ready()
    assert isinstance(admin.site.get_model_admin(user_model), KeyAdminMixin)


def test_admin_passes_djangos_checks(backend: str) -> None:
    call_command("check", "admin")
    assert reverse("admin:keyproxy_issue_key", args=[1]) == "/admin/auth/user/1/keyproxy/issue/"

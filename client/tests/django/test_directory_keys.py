"""Keys in keyproxy over both ways, as an application issues, rotates and revokes them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.db import connections, transaction
from django.utils import timezone

from deployment import Deployment
from keyproxy_client.django.directory.admin_api import AdminApi, Response
from keyproxy_client.django.directory.api_keys import ApiKeys
from keyproxy_client.django.directory.errors import (
    AlreadyIssued,
    DirectoryUnavailable,
    KeyConflict,
    KeyLimitReached,
    NotInDirectory,
    ProvisionConflict,
)
from keyproxy_client.django.directory.interface import Directory, KeyWish
from keyproxy_client.django.directory.selection import directory
from project.testing import keyproxy_settings
from proxied import status_and_headers

ACTOR = "django:admin:7"
DAY = timedelta(days=1)
WISH = KeyWish("nightly", ("jobs:read", "jobs:write"), False, DAY)


@pytest.fixture(params=["sql", pytest.param("api", marks=pytest.mark.once)])
def way(request: pytest.FixtureRequest, deployment: Deployment) -> Iterator[Directory]:
    api = {"ADMIN_URL": deployment.admin_url, "ADMIN_TOKEN_FILE": str(deployment.admin_token_file)}
    with keyproxy_settings(BACKEND=request.param, KEYS_PER_USER_MAX=3, **api):
        yield directory()


@pytest.fixture
def user(deployment: Deployment) -> str:
    return _user(deployment, "acme")


def _user(deployment: Deployment, tenant: str) -> str:
    name = f"u_{secrets.token_hex(6)}"
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, %s)", [name, tenant])
    return name


def _rows(deployment: Deployment, statement: str, *values: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        return superuser.execute(statement, values).fetchall()


def test_issued_key_works_through_the_proxy_with_its_scopes_and_mode(
    way: Directory, user: str, deployment: Deployment
) -> None:
    for is_test in (False, True):
        issued = way.keys.issue(user, "acme", KeyWish("n", ("jobs:write",), is_test, DAY), actor=ACTOR)
        status, headers = status_and_headers(deployment.origin, issued.secret)
        assert status == 200
        assert headers["x-keyproxy-user"] == user
        assert headers["x-keyproxy-scope"] == "jobs:write"
        assert headers["x-keyproxy-test"] == str(is_test).lower()
        assert headers["x-keyproxy-key-id"] == issued.key_id
        assert issued.secret not in repr(issued)


def test_repeated_request_issues_no_second_key(way: Directory, user: str, deployment: Deployment) -> None:
    first = way.keys.issue(user, "acme", WISH, actor=ACTOR, request=f"form.{user}")
    with pytest.raises(AlreadyIssued) as refused:
        way.keys.issue(user, "acme", WISH, actor=ACTOR, request=f"form.{user}")
    assert refused.value.key_id == first.key_id
    assert [key.id for key in way.keys.of_user(user, "acme")] == [first.key_id]
    rotated = way.keys.rotate(first.key_id, grace=DAY, life=DAY, actor=ACTOR, request=f"rotation.{user}")
    with pytest.raises(AlreadyIssued) as refused:
        way.keys.rotate(first.key_id, grace=DAY, life=DAY, actor=ACTOR, request=f"rotation.{user}")
    assert refused.value.key_id == rotated.key_id
    assert len(way.keys.of_user(user, "acme")) == 2


def test_no_key_is_issued_for_a_user_that_is_missing_or_of_another_tenant(
    way: Directory, deployment: Deployment
) -> None:
    with pytest.raises(NotInDirectory):
        way.keys.issue("u_missing", "acme", WISH, actor=ACTOR)
    stranger = _user(deployment, "globex")
    with pytest.raises(ProvisionConflict):
        way.keys.issue(stranger, "acme", WISH, actor=ACTOR)
    assert not _rows(deployment, "SELECT id FROM keyproxy.api_keys WHERE user_id = %s AND revoked_at IS NULL", stranger)
    assert way.keys.of_user(stranger, "acme") == []


def test_user_has_at_most_the_configured_number_of_working_keys(way: Directory, user: str) -> None:
    issued = [way.keys.issue(user, "acme", WISH, actor=ACTOR) for _ in range(3)]
    with pytest.raises(KeyLimitReached):
        way.keys.issue(user, "acme", WISH, actor=ACTOR)
    way.keys.revoke(issued[0].key_id, "not needed", actor=ACTOR)
    way.keys.issue(user, "acme", WISH, actor=ACTOR)
    with pytest.raises(KeyLimitReached):
        way.keys.issue(user, "acme", WISH, actor=ACTOR)


def test_rotation_keeps_owner_scopes_mode_and_name_and_retires_the_old_key(
    way: Directory, user: str, deployment: Deployment
) -> None:
    old = way.keys.issue(user, "acme", KeyWish("nightly", ("jobs:read",), True, 30 * DAY), actor=ACTOR)
    new = way.keys.rotate(old.key_id, grace=timedelta(hours=1), life=30 * DAY, actor=ACTOR)
    shown = {key.id: key for key in way.keys.of_user(user, "acme")}
    assert (shown[new.key_id].name, shown[new.key_id].scopes, shown[new.key_id].is_test) == (
        "nightly", ("jobs:read",), True,
    )  # fmt: skip
    assert shown[new.key_id].replaces == old.key_id
    ends = shown[old.key_id].expires_at
    assert ends is not None
    assert ends == new.old_expires_at
    assert timedelta(minutes=59) < ends - timezone.now() <= timedelta(hours=1)
    assert [status_and_headers(deployment.origin, one.secret)[0] for one in (old, new)] == [200, 200]
    with pytest.raises(KeyConflict):
        way.keys.rotate(old.key_id, grace=DAY, life=DAY, actor=ACTOR)


def test_rotated_key_keeps_the_plan_of_the_old_one_and_draws_on_what_is_left(
    way: Directory, user: str, deployment: Deployment
) -> None:
    old = way.keys.issue(user, "acme", WISH, actor=ACTOR)
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        plan = superuser.execute(
            "INSERT INTO keyproxy.plans (id, limits) VALUES (%s, '{\"requests_per_day\": 3}') RETURNING id",
            [f"p.{user}"],
        ).fetchone()
        superuser.execute("UPDATE keyproxy.api_keys SET plan_id = %s WHERE id = %s", [*(plan or ()), old.key_id])
    statuses = [status_and_headers(deployment.origin, old.secret)[0]]
    second = way.keys.rotate(old.key_id, grace=DAY, life=DAY, actor=ACTOR)
    statuses.append(status_and_headers(deployment.origin, second.secret)[0])
    third = way.keys.rotate(second.key_id, grace=DAY, life=DAY, actor=ACTOR)
    statuses += [status_and_headers(deployment.origin, one.secret)[0] for one in (third, third, second, old)]
    assert statuses == [200, 200, 200, 429, 429, 429]


def test_key_without_expiry_is_replaced_by_one_without(way: Directory, user: str) -> None:
    old = way.keys.issue(user, "acme", KeyWish("", (), False, None), actor=ACTOR)
    assert old.expires_at is None
    new = way.keys.rotate(old.key_id, grace=timedelta(0), life=DAY, actor=ACTOR)
    assert new.expires_at is None
    assert [key.id for key in way.keys.of_user(user, "acme") if key.works_at(timezone.now() + DAY)] == [new.key_id]


def test_revoked_key_keeps_its_time_and_cannot_be_rotated(way: Directory, user: str) -> None:
    issued = way.keys.issue(user, "acme", WISH, actor=ACTOR)
    first = way.keys.revoke(issued.key_id, "leaked", actor=ACTOR)
    again = way.keys.revoke(issued.key_id, "another reason", actor=ACTOR)
    assert first.revoked_at is not None
    assert (again.revoked_at, again.revoke_reason) == (first.revoked_at, "leaked")
    with pytest.raises(KeyConflict):
        way.keys.rotate(issued.key_id, grace=DAY, life=DAY, actor=ACTOR)
    with pytest.raises(NotInDirectory):
        way.keys.revoke("key_missing", "", actor=ACTOR)
    with pytest.raises(NotInDirectory):
        way.keys.rotate("key_missing", grace=DAY, life=DAY, actor=ACTOR)


@pytest.mark.parametrize("way", ["sql"], indirect=True)
class TestSql:
    def test_author_is_recorded_and_does_not_outlast_the_statement(
        self, way: Directory, user: str, deployment: Deployment
    ) -> None:
        with transaction.atomic(), connections["default"].cursor() as cursor:
            issued = way.keys.issue(user, "acme", WISH, actor=ACTOR)
            cursor.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = %s", [user])
        found = dict(
            _rows(
                deployment,
                "SELECT entity, actor FROM keyproxy.audit_log WHERE entity_id IN (%s, %s) AND action <> 'insert'"
                " OR entity_id = %s",
                user, issued.key_id, issued.key_id,
            )
        )  # fmt: skip
        assert found == {"key": ACTOR, "user": "sql:app"}

    def test_rollback_leaves_no_key(self, way: Directory, user: str) -> None:
        with transaction.atomic():
            way.keys.issue(user, "acme", WISH, actor=ACTOR)
            transaction.set_rollback(True)
        assert way.keys.of_user(user, "acme") == []

    def test_refused_issue_leaves_the_transaction_usable(self, way: Directory, user: str) -> None:
        with transaction.atomic():
            with pytest.raises(NotInDirectory):
                way.keys.issue("u_missing", "acme", WISH, actor=ACTOR)
            way.keys.issue(user, "acme", WISH, actor=ACTOR)
        assert len(way.keys.of_user(user, "acme")) == 1

    def test_concurrent_issues_do_not_exceed_the_limit(self, way: Directory, user: str) -> None:
        outcomes: list[str] = []
        start = threading.Barrier(6)

        def issue() -> None:
            try:
                start.wait()
                way.keys.issue(user, "acme", WISH, actor=ACTOR)
                outcomes.append("issued")
            except KeyLimitReached:
                outcomes.append("refused")
            finally:
                connections.close_all()

        threads = [threading.Thread(target=issue) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["issued"] * 3 + ["refused"] * 3


class _LosesResponses:
    """An admin API whose responses to requests that make keys are lost, so many times."""

    def __init__(self, api: AdminApi, lost: int) -> None:
        self._api = api
        self.lost = lost

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> Response:
        response = self._api.call(method, path, body, **options)
        if options.get("idempotency_key") and self.lost:
            self.lost -= 1
            raise DirectoryUnavailable("the response was lost")
        return response


class TestLostResponse:
    @pytest.fixture
    def keys(self, deployment: Deployment) -> ApiKeys:
        api = AdminApi(deployment.admin_url, str(deployment.admin_token_file), 2.0)
        return ApiKeys(_LosesResponses(api, 1), 10)  # type: ignore[arg-type]

    def test_key_whose_secret_was_lost_is_revoked_and_another_one_issued(
        self, keys: ApiKeys, user: str, deployment: Deployment
    ) -> None:
        issued = keys.issue(user, "acme", WISH, actor=ACTOR)
        shown = {key.id: key.revoke_reason for key in keys.of_user(user, "acme")}
        assert shown.pop(issued.key_id) is None
        assert list(shown.values()) == ["its secret was lost"]
        assert status_and_headers(deployment.origin, issued.secret)[0] == 200

    def test_successor_whose_secret_was_lost_is_revoked_and_another_one_issued(
        self, keys: ApiKeys, user: str, deployment: Deployment
    ) -> None:
        keys.api.lost = 0  # type: ignore[attr-defined]
        old = keys.issue(user, "acme", WISH, actor=ACTOR)
        keys.api.lost = 1  # type: ignore[attr-defined]
        new = keys.rotate(old.key_id, grace=DAY, life=DAY, actor=ACTOR)
        working = {key.id for key in keys.of_user(user, "acme") if key.works_at(timezone.now())}
        assert working == {old.key_id, new.key_id}
        assert status_and_headers(deployment.origin, new.secret)[0] == 200

    def test_second_loss_is_an_error(self, keys: ApiKeys, user: str) -> None:
        keys.api.lost = 2  # type: ignore[attr-defined]
        with pytest.raises(DirectoryUnavailable):
            keys.issue(user, "acme", WISH, actor=ACTOR)


def test_token_that_cannot_read_issues_up_to_the_limit(user: str, deployment: Deployment) -> None:
    made = deployment.cli(
        "admin", "token", "create", "--name", "django", "--scope", "users:write", "--scope", "keys:write"
    )
    token_file = deployment.home / f"{user}.token"
    token_file.write_text(made["secret"], encoding="ascii")
    keys = ApiKeys(AdminApi(deployment.admin_url, str(token_file), 2.0), 2)
    for _ in range(2):
        keys.issue(user, "acme", WISH, actor=ACTOR)
    with pytest.raises(KeyLimitReached):
        keys.issue(user, "acme", WISH, actor=ACTOR)

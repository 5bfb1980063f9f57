"""keyproxy_check: whether this project can work with its keyproxy."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NamedTuple

from django.core.checks import ERROR
from django.db import DatabaseError, connections, transaction
from django.utils import timezone

from keyproxy_client import keys
from keyproxy_client.django import checks
from keyproxy_client.django.directory.admin_api import AdminApi, segment
from keyproxy_client.django.directory.errors import DirectoryError, DirectoryRefused, NotInDirectory
from keyproxy_client.django.directory.interface import ACTOR_SYNC
from keyproxy_client.django.directory.sql_connection import explained
from keyproxy_client.django.directory.sql_users import SqlUsers
from keyproxy_client.django.models import OutboxEvent
from keyproxy_client.django.provisioning import outbox
from keyproxy_client.django.settings import Settings, settings
from keyproxy_client.incoming.key_set_fetch import FetchFailed, KeySetFetcher
from keyproxy_client.outgoing.key_sources import KeyFile, SecretUnavailable

#: An event that is older has failed at least three times.
AGE_MAX: Final = timedelta(minutes=10)

_NOT_ALLOWED: Final = "insufficient_scope"


class Finding(NamedTuple):
    """The result of one check. `is_ok` None: it does not apply, or cannot be known."""

    name: str
    is_ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class _Probe:
    """A user id that does not exist, with which to try rights without an effect."""

    api: AdminApi
    id: str

    def has_scope(self, scope: str) -> bool:
        """Whether the token has a scope. The request is permitted, and finds nothing to change."""
        method, path = {
            "users:write": ("PATCH", f"/v1/users/{self.id}"),
            "keys:write": ("PATCH", f"/v1/keys/{self.id}"),
            "keys:read": ("GET", f"/v1/users/{self.id}"),
        }[scope]
        try:
            self.api.call(method, path, None if method == "GET" else {})
        except NotInDirectory:
            return True
        except DirectoryRefused as error:
            if error.code == _NOT_ALLOWED:
                return False
            raise
        return True


def findings() -> Iterator[Finding]:
    """Every check, in order. Later ones are left out if the settings are invalid."""
    messages = checks.check_settings()
    errors = [message for message in messages if message.level >= ERROR]
    warnings = [message for message in messages if message.level < ERROR]
    for message in warnings:
        yield Finding("settings", None, f"{message.id}: {message.msg}")
    if errors:
        for message in errors:
            yield Finding("settings", False, f"{message.id}: {message.msg}")
        return
    found = settings()
    yield Finding("settings", True, f"backend {found.backend}")
    if found.credentials == "service":
        yield from _service_keys(found)
    backend: Callable[[Settings], Iterator[Finding]] = _BACKENDS[found.backend]
    yield from backend(found)
    if found.trust == "signed":
        yield _key_set(found)
    yield from _outboxes()


def _service_keys(found: Settings) -> Iterator[Finding]:
    """Faults of the files of service keys. Only workers need to read them, so that an unreadable one is a note."""
    for setting, is_test in (("SERVICE_KEY_FILE", False), ("SERVICE_TEST_KEY_FILE", True)):
        path = getattr(found, setting.lower())
        if not path or ("{tenant}" in path and found.fixed_tenant is None):
            continue
        try:
            parts = keys.parse(KeyFile(path, found.fixed_tenant).secret(None))
        except SecretUnavailable as error:
            yield Finding("settings", None, f"KEYPROXY[{setting!r}]: {error}")
            continue
        if parts is not None and parts.is_test is not is_test:
            mode = "test" if parts.is_test else "live"
            yield Finding("settings", False, f"KEYPROXY[{setting!r}]: the key in {path} is a {mode} key")


def _sql(found: Settings) -> Iterator[Finding]:
    messages = list(checks.database_messages(connections[found.database]))
    errors = [message for message in messages if message.level >= ERROR]
    for name, code in (("schema", "keyproxy.E010"), ("rights", "keyproxy.E011")):
        failed = [message for message in errors if message.id == code]
        if errors and not failed and name == "rights":
            yield Finding(name, None, "not checked")
        else:
            yield Finding(name, not failed, "; ".join(f"{one.id}: {one.msg}" for one in failed))
    for message in messages:
        if message.level < ERROR:
            yield Finding("rights", None, f"{message.id}: {message.msg}")
    if errors or found.fixed_tenant is None:
        yield Finding("tenant", None, "not checked" if errors else "a function of the user gives it")
        return
    users = SqlUsers(found.database, found.key_prefix)
    try:
        # The role cannot read tenants. A foreign key can, and the rollback leaves no user.
        with transaction.atomic(using=found.database):
            users.create(f"keyproxy-check-{uuid.uuid4().hex}", found.fixed_tenant, actor=ACTOR_SYNC)
            transaction.set_rollback(True, using=found.database)
    except (DirectoryError, DatabaseError) as error:
        yield Finding("tenant", False, str(error).partition("\n")[0])
    else:
        yield Finding("tenant", True, found.fixed_tenant)


def _api(found: Settings) -> Iterator[Finding]:
    api = AdminApi(found.admin_url, found.admin_token_file, found.timeout_seconds)
    probe = _Probe(api, f"keyproxy-check-{uuid.uuid4().hex}")
    try:
        missing = [scope for scope in ("users:write", "keys:write") if not probe.has_scope(scope)]
        may_read = probe.has_scope("keys:read")
    except DirectoryError as error:
        yield Finding("admin API", False, str(error))
        return
    yield Finding("admin API", True, found.admin_url)
    yield Finding("rights", not missing, f"the token lacks {' and '.join(missing)}" if missing else "")
    if not may_read and found.fixed_tenant is None:
        yield Finding(
            "rights", None, "the token lacks keys:read, which keyproxy_sync needs for users of several tenants"
        )
    if found.fixed_tenant is None or not may_read:
        why = "the token lacks keys:read" if found.fixed_tenant else "a function of the user gives it"
        yield Finding("tenant", None, why)
        return
    try:
        api.call("GET", f"/v1/tenants/{segment(found.fixed_tenant)}")
    except DirectoryError as error:
        yield Finding("tenant", False, str(error))
    else:
        yield Finding("tenant", True, found.fixed_tenant)


def _off(_found: Settings) -> Iterator[Finding]:
    yield Finding("schema", None, "keyproxy does not follow this project's users")


_BACKENDS: Final = {"sql": _sql, "api": _api, "off": _off}


def _key_set(found: Settings) -> Finding:
    try:
        content, _ = KeySetFetcher(found.jwks_url).fetch()
    except (FetchFailed, ValueError) as error:
        return Finding("JWKS", False, f"{found.jwks_url}: {error}")
    keys = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(keys, list) or not keys:
        return Finding("JWKS", False, f"{found.jwks_url} has no keys")
    return Finding("JWKS", True, f"{len(keys)} keys")


def _outboxes() -> Iterator[Finding]:
    for alias in outbox.aliases():
        events = OutboxEvent.objects.using(alias).order_by("pk")
        try:
            oldest = events.first()
        except DatabaseError as error:
            yield Finding("outbox", False, f"its table cannot be read: {explained(error)}")
            continue
        if oldest is None:
            yield Finding("outbox", True, "empty")
            continue
        age = timezone.now() - oldest.created_at
        text = f"{events.count()} events; the oldest has waited for {int(age.total_seconds())} s"
        if oldest.last_error:
            text = f"{text}: {oldest.last_error}"
        yield Finding("outbox", age <= AGE_MAX, text)

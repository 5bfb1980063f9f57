"""keyproxy_sync: make the users of keyproxy match the users of Django, where signals could not.

Bulk operations, fixtures and SQL send no signals, and a failure after Django's commit leaves a user without its
counterpart. The users of keyproxy are read first and those of Django afterwards, so that a sign-up in between is not
taken for an orphan. Each change is decided again on the locked row.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, router, transaction

from keyproxy_client import keys
from keyproxy_client.django.directory.errors import DirectoryError, DirectoryRefused
from keyproxy_client.django.directory.interface import ACTOR_SYNC, Directory, DirectoryUser
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.provisioning import lifecycle, outbox
from keyproxy_client.django.provisioning.lifecycle import Subject
from keyproxy_client.django.provisioning.outbox import Result
from keyproxy_client.django.settings import settings
from keyproxy_client.django.users import InvalidId, may_be_id, user_of_id

_log = logging.getLogger("keyproxy_client.sync")

_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Wish:
    """What to do. Enabling and deleting are opt-in: an operator may have disabled a user, or added one."""

    batch: int = 1000
    is_dry_run: bool = False
    enables: bool = False
    prunes: bool = False


@dataclass(slots=True)
class Report:
    """What was done, or would be. `failed`: by user, why."""

    done: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: int = 0

    def note(self, kind: str, user: str) -> None:
        """Count a change of a user."""
        self.done[kind] += 1
        _log.info("%s user %s", kind, user)


def synchronise(wish: Wish) -> Report:
    """Perform a run. Raises DirectoryError if keyproxy cannot be read."""
    report, found = Report(), directory()
    if wish.prunes:
        _check_ids()
    using = router.db_for_write(get_user_model())
    if not wish.is_dry_run:
        _drain(report)
    known = {one.id: one for page in found.users.pages(settings().fixed_tenant, size=_PAGE) for one in page}
    tenants = set()
    for user in _users(using, wish.batch):
        tenants |= _compare(user, known, using, wish, report)
    if wish.prunes:
        orphans = [one for one in known.values() if one.tenant in tenants | {settings().fixed_tenant}]
        _prune(found, orphans, using, wish, report)
    if not wish.is_dry_run:
        _drain(report)
    report.waiting = sum(outbox.count(alias) for alias in outbox.aliases())
    return report


def _drain(report: Report) -> None:
    for alias in outbox.aliases():
        for user, result in outbox.drain(alias):
            if result is Result.DELIVERED:
                report.note("delivered", user)


def _users(using: str, batch: int) -> Iterator[Any]:
    """All users in the order of their primary keys, `batch` at a time, whatever a manager of the project hides."""
    rows = get_user_model()._base_manager.using(using).order_by("pk")
    page = list(rows[:batch])
    while page:
        yield from page
        page = list(rows.filter(pk__gt=page[-1].pk)[:batch])


def _compare(user: Any, known: dict[str, DirectoryUser], using: str, wish: Wish, report: Report) -> set[str]:
    """Change the counterpart of a user if it differs, and take it from `known`. Return the tenant of the user, if any."""
    try:
        subject = lifecycle.subject_of(user)
    except InvalidId as error:
        report.done["without_id"] += 1
        _log.info("%s", error)
        return set()
    counterpart = known.pop(subject.id, None)
    is_active = getattr(user, "is_active", True)
    if counterpart is None:
        if is_active:
            _change("created", subject, using, wish, report)
    elif counterpart.tenant != subject.tenant:
        report.failed[subject.id] = "the user exists in keyproxy and belongs to another tenant"
    elif not is_active and not counterpart.is_disabled:
        _change("disabled", subject, using, wish, report)
    elif is_active and counterpart.is_disabled:
        if wish.enables:
            _change("enabled", subject, using, wish, report)
        else:
            report.done["left_disabled"] += 1
    return {subject.tenant}


def _change(kind: str, subject: Subject, using: str, wish: Wish, report: Report) -> None:
    """Perform a change, unless the user was changed since it was read: then signals have already updated keyproxy."""
    was_active = getattr(subject.user, "is_active", True)
    alias = outbox.alias_for(using)
    if not lifecycle.is_direct(using) and outbox.has_events(alias, subject.id):
        return
    if wish.is_dry_run:
        report.note(kind, subject.id)
        return
    try:
        with transaction.atomic(using=using):
            rows = get_user_model()._base_manager.using(using).select_for_update()
            current = rows.filter(pk=subject.user.pk).first()
            if current is None or getattr(current, "is_active", True) != was_active:
                return
            _CHANGES[kind](current, using, actor=ACTOR_SYNC)
    except (DirectoryError, DatabaseError) as error:
        report.failed[subject.id] = str(error).partition("\n")[0]
    else:
        report.note(kind, subject.id)


_CHANGES: Final[dict[str, Callable[..., None]]] = {
    "created": lifecycle.create,
    "disabled": lifecycle.disable,
    "enabled": lifecycle.enable,
}


def _check_ids() -> None:
    """Raises DirectoryRefused if the users of operators cannot be distinguished from orphans."""
    try:
        may_be_id("")
    except ImproperlyConfigured as error:
        raise DirectoryRefused(f"{error}: no user is deleted") from error


def _prune(found: Directory, orphans: Iterable[DirectoryUser], using: str, wish: Wish, report: Report) -> None:
    """Delete users whose ids are those of users of Django that do not exist, except owners of service keys."""
    # Read once in each run: a service key may move to another user while this process lives.
    service_hints = functools.lru_cache(_service_hints)
    for orphan in orphans:
        if not may_be_id(orphan.id):
            continue
        try:
            hints = service_hints(orphan.tenant)
            if any(key.hint in hints for key in found.keys.of_user(orphan.id, orphan.tenant)):
                report.done["kept"] += 1
                continue
            if not wish.is_dry_run and not _delete(orphan, using):
                continue
        except (DirectoryError, DatabaseError) as error:
            report.failed[orphan.id] = str(error).partition("\n")[0]
            continue
        report.note("deleted", orphan.id)


def _delete(orphan: DirectoryUser, using: str) -> bool:
    """Delete a user that Django still does not have. One that has signed up meanwhile stays."""
    try:
        if user_of_id(orphan.id) is not None:
            return False
    except ImproperlyConfigured:
        # The ids have no inverse.
        pass
    lifecycle.delete(Subject(None, orphan.id, orphan.tenant), using, actor=ACTOR_SYNC)
    return True


def _service_hints(tenant: str) -> frozenset[str]:
    """The hints of the tenant's service keys. Raises DirectoryRefused if a file cannot be read.

    `{tenant}` in the path: a tenant without a file has no service key. A path without it names the one service key.
    """
    found = settings()
    hints = set()
    for path in (found.service_key_file, found.service_test_key_file):
        if path:
            file = Path(path.replace("{tenant}", tenant))
            try:
                hints.add(keys.hint(file.read_text(encoding="ascii").strip(), prefix=found.key_prefix))
            except (OSError, UnicodeDecodeError) as error:
                if isinstance(error, FileNotFoundError) and "{tenant}" in path:
                    continue
                raise DirectoryRefused(f"cannot read {file}: no user is deleted") from error
    return frozenset(hints)

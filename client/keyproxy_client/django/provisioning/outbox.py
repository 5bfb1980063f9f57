"""The outbox: events of users are delivered to keyproxy at least once, and those of one user in order.

An event is written in the transaction of the change and delivered after its commit, and later by other deliveries and by
keyproxy_sync. It is claimed by a lock on its row, which ends with the process that holds it; on a database without such
locks, by the lock for writing. Only the first event of a user is ever claimed. Its row is deleted after keyproxy has
confirmed it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

from django.contrib.auth import get_user_model
from django.db import DatabaseError, connections, router, transaction
from django.db.models import Exists, F, OuterRef, QuerySet
from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.directory.errors import DirectoryError, DirectoryUnavailable
from keyproxy_client.django.directory.interface import IssuedKey, SignUp
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.models import Operation, OutboxEvent
from keyproxy_client.django.provisioning import first_keys
from keyproxy_client.django.settings import settings

_log = logging.getLogger("keyproxy_client.outbox")

#: How long after a failure an event is delivered again; after more failures, the last.
RETRY_SECONDS: Final = (10, 60, 360, 2160, 21_600)

_ERROR_CHARACTERS_MAX: Final = 500

#: Due events of other users that a delivery takes along.
_OTHERS_MAX: Final = 10

_SLOW_SECONDS: Final = 0.5

#: After so many failures in a row without a response, the others would fail as well.
_UNAVAILABLE_MAX: Final = 3


class Result(enum.Enum):
    """The outcome of one delivery. BUSY: another process delivers the event, or has delivered it."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    BUSY = "busy"


class _Outage:
    """Whether requests to keyproxy timed out a moment ago. Views then leave their events to a later delivery.

    A transaction may write many events: each would wait for as long again. A refused connection costs no time.
    """

    def __init__(self) -> None:
        self._ends_at = 0.0

    def note(self, result: Result, seconds: float) -> None:
        """Note the result of a delivery, and how long it took."""
        if result is Result.UNAVAILABLE and seconds >= _SLOW_SECONDS:
            self._ends_at = time.monotonic() + RETRY_SECONDS[0]
        elif result is Result.DELIVERED:
            self._ends_at = 0.0

    def is_over(self) -> bool:
        """Whether to try."""
        return time.monotonic() >= self._ends_at


_outage: Final = _Outage()


def enqueue(operation: str, user_id: str, payload: dict[str, Any], using: str) -> None:
    """Write an event in the transaction that is open on the user's database, and deliver it after the commit."""
    alias = alias_for(using)
    OutboxEvent.objects.using(alias).create(operation=operation, user_id=user_id, payload=payload)

    def deliver_after_commit() -> None:
        deliver_soon(alias, user_id)

    if connections[alias].in_atomic_block or connections[alias].get_autocommit():
        # A defect in a delivery must not reach the view: the event stays, and Django logs the exception.
        transaction.on_commit(deliver_after_commit, using=alias, robust=True)


def alias_for(using: str) -> str:
    """The database of the outbox for users of a database: the same, unless a router keeps the outbox elsewhere."""
    return using if router.allow_migrate_model(using, OutboxEvent) else router.db_for_write(OutboxEvent)


def aliases() -> list[str]:
    """The databases whose outbox to deliver: that of the user model, and others that have events and can be written.

    A replica shows the same events, and refuses the statement.
    """
    first = alias_for(router.db_for_write(get_user_model()))
    return [first, *(alias for alias in connections if alias != first and _has_outbox(alias))]


def _has_outbox(alias: str) -> bool:
    events = OutboxEvent.objects.using(alias)
    try:
        with transaction.atomic(using=alias):
            return events.exists() and events.filter(pk=0).update(attempts=0) == 0
    except DatabaseError:
        return False


def deliver_soon(alias: str, user_id: str) -> None:
    """Deliver the events of a user, and then a few due ones of others. For views: one failure ends it."""
    if not _outage.is_over():
        return
    for event in _of_user(alias, user_id):
        if deliver(alias, event) is not Result.DELIVERED:
            return
    for pk in list(_heads(alias).filter(next_at__lte=timezone.now()).values_list("pk", flat=True)[:_OTHERS_MAX]):
        if deliver(alias, pk) is Result.UNAVAILABLE:
            return


def drain(alias: str) -> Iterator[tuple[str, Result]]:
    """Deliver all events that can be delivered, also those that wait for a retry; yields each user's id and result."""
    after, failures = 0, 0
    while failures < _UNAVAILABLE_MAX:
        head = _heads(alias).filter(pk__gt=after).order_by("pk").values_list("pk", "user_id").first()
        if head is None:
            return
        after, user_id = head
        result = Result.DELIVERED
        for event in _of_user(alias, user_id):
            result = deliver(alias, event)
            yield user_id, result
            if result is not Result.DELIVERED:
                break
        failures = failures + 1 if result is Result.UNAVAILABLE else 0


def has_events(alias: str, user_id: str) -> bool:
    """Whether events of a user wait."""
    return OutboxEvent.objects.using(alias).filter(user_id=user_id).exists()


def count(alias: str) -> int:
    """The number of events that wait."""
    return OutboxEvent.objects.using(alias).count()


def deliver(alias: str, pk: int) -> Result:
    """Deliver one event, which must be the first of its user."""
    begun = time.monotonic()
    result = _deliver(alias, pk)
    _outage.note(result, time.monotonic() - begun)
    return result


def _deliver(alias: str, pk: int) -> Result:
    attempt = _count_attempt(alias, pk)
    with transaction.atomic(using=alias):
        event = _claim(alias, pk, attempt)
        if event is None:
            return Result.BUSY
        try:
            _perform(event, alias)
        except DirectoryError as error:
            _postpone(event, error)
            return Result.UNAVAILABLE if isinstance(error, DirectoryUnavailable) else Result.REFUSED
        event.delete(using=alias)
    return Result.DELIVERED


def _heads(alias: str) -> QuerySet[OutboxEvent]:
    """The first event of each user."""
    events = OutboxEvent.objects.using(alias)
    return events.filter(~Exists(events.filter(user_id=OuterRef("user_id"), pk__lt=OuterRef("pk"))))


def _of_user(alias: str, user_id: str) -> Iterator[int]:
    """The events of a user in order. Each is the first when it is yielded, if those before were delivered.

    Each is looked up after the one before: an event that was written meanwhile found its user's first event claimed.
    """
    events = OutboxEvent.objects.using(alias).filter(user_id=user_id).order_by("pk").values_list("pk", flat=True)
    after = 0
    while (pk := events.filter(pk__gt=after).first()) is not None:
        yield pk
        after = pk


def _count_attempt(alias: str, pk: int) -> int:
    """Count an attempt before it begins, so that one that ends with its process is counted; 0 if another is going on."""
    row = OutboxEvent.objects.using(alias).filter(pk=pk)
    with transaction.atomic(using=alias):
        if _is_locked(row) or not row.update(attempts=F("attempts") + 1):
            return 0
        return row.values_list("attempts", flat=True).get()


def _claim(alias: str, pk: int, attempt: int) -> OutboxEvent | None:
    """Lock an event until the end of this transaction; None if another process has it, or has delivered it."""
    row = OutboxEvent.objects.using(alias).filter(pk=pk, attempts=attempt)
    # Without locks on rows, an update locks the database.
    if not attempt or _is_locked(row) or not row.update(attempts=attempt):
        return None
    return row.get()


def _is_locked(row: QuerySet[OutboxEvent]) -> bool:
    """Lock a row, if the database can. True if another process has done so, or if there is no such row."""
    can_lock = connections[row.db].features.has_select_for_update_skip_locked
    return can_lock and not row.select_for_update(skip_locked=True)


def _postpone(event: OutboxEvent, error: DirectoryError) -> None:
    wait = RETRY_SECONDS[min(event.attempts, len(RETRY_SECONDS)) - 1]
    event.next_at = timezone.now() + timedelta(seconds=wait)
    event.last_error = str(error)[:_ERROR_CHARACTERS_MAX]
    event.save(update_fields=["next_at", "last_error"])
    _log.warning("event %s of user %s was not delivered: %s", event.operation, event.user_id, event.last_error)


def _perform(event: OutboxEvent, alias: str) -> None:
    users, payload = directory().users, event.payload
    user_id, tenant, actor = event.user_id, payload["tenant"], payload["actor"]
    if event.operation == Operation.CREATE:
        _create(event, alias)
    elif event.operation == Operation.DISABLE:
        users.disable(user_id, tenant, actor=actor)
    elif event.operation == Operation.DELETE:
        users.delete(user_id, tenant, actor=actor)
    elif not users.enable(user_id, tenant, actor=actor) and settings().provision == "signup":
        _create(event, alias)


def _create(event: OutboxEvent, alias: str) -> None:
    """Create the user, unless it does not exist in Django any more: then the event of its deletion follows."""
    payload = event.payload
    user = get_user_model()._base_manager.using(payload["database"]).filter(pk=payload["pk"]).first()
    if user is None:
        return
    created = directory().users.create(
        event.user_id,
        payload["tenant"],
        actor=payload["actor"],
        first_key=first_keys.wish(),
        sign_up=SignUp(payload["event"], event.created_at, is_repeated=event.attempts > 1),
    )
    if created.key is not None:
        # Before the event is deleted: after a crash, the key is revoked and another is issued.
        first_keys.keep(user, created.key)
        _send(user, created.key, alias)


@sensitive_variables("key")
def _send(user: Any, key: IssuedKey, alias: str) -> None:
    """Send the signal. An error of the database in a receiver must not undo the delivery."""
    with contextlib.suppress(_ReceiverFailed), transaction.atomic(using=alias):
        failures = first_keys.send(user, key)
        if any(isinstance(failure, DatabaseError) for failure in failures):
            raise _ReceiverFailed


class _ReceiverFailed(Exception):
    """A receiver left the transaction unusable: it ends at the savepoint before it."""

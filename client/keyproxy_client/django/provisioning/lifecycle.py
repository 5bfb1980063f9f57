"""Users of keyproxy follow the users of Django.

Where keyproxy's schema is in the database of the user, a change is a statement in the same transaction. Otherwise it is
an event of the outbox, which is written in that transaction and delivered after its commit.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any, Final, NamedTuple

from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.db import router, transaction

from keyproxy_client.django.directory.errors import DirectoryError
from keyproxy_client.django.directory.interface import ACTOR_DELETE, ACTOR_SIGNUP, Created
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.models import Operation
from keyproxy_client.django.provisioning import first_keys, outbox
from keyproxy_client.django.settings import settings
from keyproxy_client.django.users import InvalidId, keyproxy_id, tenant_of, user_of_id

_log = logging.getLogger("keyproxy_client.provisioning")

_SEEN_MAX: Final = 10_000
_SEEN_SECONDS: Final = 600.0


class Subject(NamedTuple):
    """A user of Django, and its ids in keyproxy. `user` is None for a user of keyproxy without one of Django."""

    user: Any
    id: str
    tenant: str


def subject_of(user: Any) -> Subject:
    """The ids of a user. Raises InvalidId."""
    return Subject(user, keyproxy_id(user), tenant_of(user))


def known_subject(user: Any) -> Subject | None:
    """The ids of a user that may be in keyproxy. One without a valid id is not, and can be changed and deleted freely."""
    try:
        return subject_of(user)
    except InvalidId as error:
        _log.info("a change of a user does not reach keyproxy: %s", error)
        return None


def sign_up(user: Any, using: str) -> None:
    """Create a user that was just saved, with `PROVISION` "signup"; disabled if it is inactive. Raises InvalidId."""
    if settings().provision == "signup":
        create(user, using, actor=ACTOR_SIGNUP)


def create(user: Any, using: str, *, actor: str) -> None:
    """Create a user as at its sign-up."""
    subject = subject_of(user)
    _perform(Operation.CREATE, subject, using, actor)
    if not getattr(user, "is_active", True):
        _perform(Operation.DISABLE, subject, using, actor)


def disable(user: Any, using: str, *, actor: str = ACTOR_SIGNUP) -> None:
    """Disable a user that was deactivated."""
    subject = known_subject(user)
    if subject is not None:
        _perform(Operation.DISABLE, subject, using, actor)


def enable(user: Any, using: str, *, actor: str = ACTOR_SIGNUP) -> None:
    """Enable a user that was activated; it is created if it is missing, with `PROVISION` "signup"."""
    subject = known_subject(user)
    if subject is not None:
        _perform(Operation.ENABLE, subject, using, actor)


def delete(subject: Subject, using: str, *, actor: str = ACTOR_DELETE) -> None:
    """Delete a user that was deleted, with its keys."""
    _seen.forget(subject.id)
    _perform(Operation.DELETE, subject, using, actor)


def is_direct(using: str) -> bool:
    """Whether keyproxy's schema is in this database, so that both change in one transaction."""
    return settings().backend == "sql" and settings().database == using


def ensure_acting(keyproxy_user: str) -> None:
    """With `PROVISION` "first_use": create the user of an outgoing call if it is missing in keyproxy.

    Only an active user of Django is created. A failure is logged: keyproxy refuses the call then.
    """
    if is_ensured(keyproxy_user):
        return
    try:
        user = user_of_id(keyproxy_user)
        if user is None or ensure(user) is None:
            _log.warning("user %s was not created at its first use: there is no such active user", keyproxy_user)
    except (DirectoryError, InvalidId, ImproperlyConfigured) as error:
        _log.warning("user %s was not created at its first use: %s", keyproxy_user, error)


def is_ensured(keyproxy_user: str) -> bool:
    """Whether `ensure_acting` has nothing to do."""
    found = settings()
    return found.provision != "first_use" or found.backend == "off" or keyproxy_user in _seen


def ensure(user: Any, *, actor: str = ACTOR_SIGNUP) -> Created | None:
    """Create an active user in keyproxy if it is missing there. None if it is inactive or deleted in Django.

    The user's row is locked, so that a concurrent deletion follows and also deletes what this creates.
    """
    using = user._state.db or router.db_for_write(type(user))
    with transaction.atomic(using=using):
        current = get_user_model()._base_manager.using(using).select_for_update().filter(pk=user.pk).first()
        if current is None or not getattr(current, "is_active", True):
            return None
        subject = subject_of(current)
        created = directory().users.create(subject.id, subject.tenant, actor=actor, first_key=first_keys.wish())
        if created.key is not None:
            first_keys.hand_out(current, created.key, using)

        def note_after_commit() -> None:
            _seen.note(subject.id)

        transaction.on_commit(note_after_commit, using=using)
        return created


class _Seen:
    """The users that were provisioned at their first use. Bounded in number and in time: an operator may delete one."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def __contains__(self, keyproxy_user: object) -> bool:
        return isinstance(keyproxy_user, str) and self._until.get(keyproxy_user, 0.0) > time.monotonic()

    def note(self, keyproxy_user: str) -> None:
        """Do not look this user up again for a while."""
        if len(self._until) >= _SEEN_MAX:
            self._until.clear()
        self._until[keyproxy_user] = time.monotonic() + _SEEN_SECONDS

    def forget(self, keyproxy_user: str) -> None:
        """The user was deleted."""
        self._until.pop(keyproxy_user, None)


_seen: Final = _Seen()


def _perform(operation: str, subject: Subject, using: str, actor: str) -> None:
    if not is_direct(using):
        payload = {
            "pk": None if subject.user is None else str(subject.user.pk),
            "database": using,
            "tenant": subject.tenant,
            "actor": actor,
            "event": uuid.uuid4().hex,
        }
        outbox.enqueue(operation, subject.id, payload, using)
        return
    # Like an error of the database, a refusal makes the whole transaction fail, even if code within it catches it.
    with transaction.mark_for_rollback_on_error(using=using):
        users = directory().users
        if operation == Operation.CREATE:
            _create(subject, using, actor)
        elif operation == Operation.DISABLE:
            users.disable(subject.id, subject.tenant, actor=actor)
        elif operation == Operation.DELETE:
            users.delete(subject.id, subject.tenant, actor=actor)
        elif not users.enable(subject.id, subject.tenant, actor=actor) and settings().provision == "signup":
            _create(subject, using, actor)


def _create(subject: Subject, using: str, actor: str) -> None:
    created = directory().users.create(subject.id, subject.tenant, actor=actor, first_key=first_keys.wish())
    if created.key is not None:
        first_keys.hand_out(subject.user, created.key, using)

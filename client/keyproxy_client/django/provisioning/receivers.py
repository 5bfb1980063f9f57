"""The receivers by which users of keyproxy follow the users of Django.

They are connected to the user model, its subclasses and its proxies, and not to all models: Django sends the signals
of a deletion under the class of the instance, and deletes tables without receivers in one statement.
"""

from __future__ import annotations

from typing import Any, Final

from django.apps import apps
from django.contrib.auth import get_user_model
from django.db.models.signals import post_delete, post_init, post_save, pre_delete, pre_save

from keyproxy_client.django.provisioning import lifecycle
from keyproxy_client.django.settings import settings

#: Where an instance keeps the value of `is_active` that it was loaded with, and its ids while it is deleted.
_LOADED: Final = "keyproxy_was_active"
_ENABLES: Final = "keyproxy_enables"
_SUBJECT: Final = "keyproxy_subject"


def connect() -> None:
    """Connect the receivers. Called once all models are loaded."""
    model = get_user_model()
    for one in apps.get_models():
        if not issubclass(one, model):
            continue
        for signal, receiver in _RECEIVERS:
            signal.connect(receiver, sender=one, dispatch_uid=f"keyproxy_client.{receiver.__name__}")


def _remember(instance: Any, **_kwargs: object) -> None:
    """After loading. A deferred field is not in the instance, and reading it would be a query."""
    instance._state.keyproxy_was_active = instance.__dict__.get("is_active")


def _before_save(instance: Any, raw: bool, using: str, update_fields: frozenset[str] | None, **_kwargs: object) -> None:
    """Decide whether this save enables the user: on a loaded instance, from false in the database to true.

    The database is queried because another process may have enabled the user, and an operator disabled it, since the
    instance was loaded.
    """
    state = instance._state
    state.keyproxy_enables = False
    if raw or state.adding or not _writes_is_active(instance, update_fields) or not instance.is_active:
        return
    if getattr(state, _LOADED, None) is not True and settings().backend != "off":
        rows = type(instance)._base_manager.using(using).filter(pk=instance.pk)
        state.keyproxy_enables = rows.values_list("is_active", flat=True).first() is False


def _after_save(
    instance: Any, created: bool, raw: bool, using: str, update_fields: frozenset[str] | None, **_kwargs: object
) -> None:
    state = instance._state
    is_written = _writes_is_active(instance, update_fields)
    was_active, enables = getattr(state, _LOADED, None), getattr(state, _ENABLES, False)
    if is_written:
        state.keyproxy_was_active = instance.is_active
    if raw or settings().backend == "off":
        return
    if created:
        lifecycle.sign_up(instance, using)
    elif is_written and not instance.is_active and was_active is not False:
        lifecycle.disable(instance, using)
    elif enables:
        lifecycle.enable(instance, using)


def _before_delete(instance: Any, **_kwargs: object) -> None:
    """The ids may depend on rows that are deleted before the user."""
    if settings().backend != "off":
        instance._state.keyproxy_subject = lifecycle.known_subject(instance)


def _after_delete(instance: Any, using: str, **_kwargs: object) -> None:
    subject = getattr(instance._state, _SUBJECT, None)
    if subject is not None:
        lifecycle.delete(subject, using)


def _writes_is_active(instance: Any, update_fields: frozenset[str] | None) -> bool:
    """Whether a save writes the field, if the model has it: it may be an attribute of the class."""
    if update_fields is not None and "is_active" not in update_fields:
        return False
    return "is_active" in instance.__dict__


_RECEIVERS: Final = (
    (post_init, _remember),
    (pre_save, _before_save),
    (post_save, _after_save),
    (pre_delete, _before_delete),
    (post_delete, _after_delete),
)

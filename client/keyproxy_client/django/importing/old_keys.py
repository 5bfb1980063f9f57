"""The keys of djangorestframework-api-key in this project: the models that hold them, and their rows as keyproxy imports
them.

The models are found by their base class, so that a project's own model with a reference to the user is included. Nothing
here decides which rows are valid: keyproxy does, where the rows arrive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.apps import apps
from django.contrib.auth import get_user_model
from django.core.exceptions import FieldDoesNotExist
from django.db import models

from keyproxy_client.django.users import InvalidId, keyproxy_id, tenant_of
from keyproxy_client.missing_extra import missing_extra

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_BATCH = 2000


class ModelUnusable(Exception):
    """A model whose keys cannot be imported as the options of the command demand. The text is the reason."""


@dataclass(frozen=True, slots=True)
class OldKey:
    """One key of djangorestframework-api-key. `place`: its source, for messages."""

    place: str
    user: str
    tenant: str
    is_owner_active: bool
    prefix: str
    hashed_key: str
    name: str
    scopes: tuple[str, ...]
    is_test: bool
    created: datetime
    expires_at: datetime | None
    is_revoked: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a key was not imported. `place`: its source."""

    place: str
    problem: str


def key_models(labels: Sequence[str]) -> list[type[models.Model]]:
    """The models with these labels (`app.Model`), or all models of keys if there are none. Raises ModelUnusable."""
    try:
        from rest_framework_api_key.models import AbstractAPIKey
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] != "rest_framework_api_key":
            raise missing_extra("drf", error) from error
        raise ModelUnusable("djangorestframework-api-key is not installed, so there is no model to import") from error
    except RuntimeError as error:
        # Its models cannot be imported unless the application is in INSTALLED_APPS.
        raise ModelUnusable('"rest_framework_api_key" is not in INSTALLED_APPS') from error
    found = {
        model._meta.label_lower: model
        for model in apps.get_models()
        if issubclass(model, AbstractAPIKey) and not model._meta.proxy
    }
    if not labels:
        return list(found.values())
    missing = [label for label in labels if label.lower() not in found]
    if missing:
        known = ", ".join(model._meta.label for model in found.values()) or "there is none"
        raise ModelUnusable(f"{missing[0]!r} is not a model of keys in this project; models of keys: {known}")
    return list(dict.fromkeys(found[label.lower()] for label in labels))


def owner_fields(
    models_of_keys: Sequence[type[models.Model]], wanted: str | None
) -> list[tuple[type[models.Model], str | None]]:
    """Each model with the field that refers to a key's owner; None if it has no such field.

    `wanted`: the field, or a path such as `team__owner`, of those models that have it. Raises ModelUnusable if none has.
    """
    if wanted is None:
        return [(model, _only_reference(model)) for model in models_of_keys]
    found: list[tuple[type[models.Model], str | None]] = []
    faults: list[ModelUnusable] = []
    for model in models_of_keys:
        try:
            _check_path(model, wanted, get_user_model())
            found.append((model, wanted))
        except ModelUnusable as error:
            faults.append(error)
            found.append((model, None))
    if faults and len(faults) == len(found):
        raise faults[0]
    return found


def _only_reference(model: type[models.Model]) -> str | None:
    user_model = get_user_model()
    references = [
        field.name
        for field in model._meta.get_fields()
        if isinstance(field, models.ForeignKey) and issubclass(user_model, _target(field))
    ]
    return references[0] if len(references) == 1 else None


def read_keys(model: type[models.Model], field: str | None, scopes: Sequence[str]) -> Iterator[OldKey | Problem]:
    """Every key of a model, in the order of its primary key; a Problem where a key has no owner."""
    has_test_mode = any(one.name == "is_test" for one in model._meta.get_fields())
    # The default manager of a project may hide some.
    rows = model._base_manager.order_by("pk")
    if field is not None:
        rows = rows.select_related(field)
    for row in rows.iterator(chunk_size=_BATCH):
        place = f"{model._meta.label} {_printable(str(row.prefix))}"
        owner = _owner(row, field)
        if owner is None:
            hint = (
                "its owner is null" if field else "the model has no single reference to a user: name it by --user-field"
            )
            yield Problem(place, f"the key has no owner: {hint}")
            continue
        try:
            user, tenant = keyproxy_id(owner), tenant_of(owner)
        except InvalidId as error:
            yield Problem(place, str(error))
            continue
        yield OldKey(
            place,
            user,
            tenant,
            bool(getattr(owner, "is_active", True)),
            str(row.prefix),
            str(row.hashed_key),
            _printable(str(row.name or "")),
            tuple(scopes),
            bool(has_test_mode and row.is_test),
            _aware(row.created),
            None if row.expiry_date is None else _aware(row.expiry_date),
            bool(row.revoked),
        )


def _check_path(model: type[models.Model], path: str, user_model: type[models.Model]) -> None:
    at = model
    for name in path.split("__"):
        try:
            field = at._meta.get_field(name)
        except FieldDoesNotExist as error:
            raise ModelUnusable(f"{at._meta.label} has no field {name!r}") from error
        if not isinstance(field, models.ForeignKey):
            raise ModelUnusable(f"{at._meta.label}.{name} is not a foreign key or one-to-one reference")
        at = _target(field)
    if not issubclass(user_model, at):
        raise ModelUnusable(f"{model._meta.label}.{path} refers to {at._meta.label}, not to {user_model._meta.label}")


def _target(field: models.ForeignKey[Any, Any]) -> type[models.Model]:
    target: type[models.Model] = field.remote_field.model
    return target


def _owner(row: Any, field: str | None) -> Any:
    owner = row if field is not None else None
    for name in [] if field is None else field.split("__"):
        owner = None if owner is None else getattr(owner, name)
    return owner


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub(" ", text)[:200]


def _aware(when: datetime) -> datetime:
    # Without USE_TZ Django's times are in the time zone of the process.
    return (when if when.tzinfo is not None else when.astimezone()).astimezone(UTC)

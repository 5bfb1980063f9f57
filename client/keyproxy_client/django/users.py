"""Which user of keyproxy a user of Django is, and back: by the settings `USER_ID` and `TENANT`.

`USER_ID` as a format of one unique field is its own inverse. A function needs an attribute `user_of`, the function from
an id of keyproxy to the user or None, if identities must become users:

    def account_id(user):
        return f"u_{user.account.number}"

    def user_of(keyproxy_id):
        return User.objects.filter(account__number=keyproxy_id.removeprefix("u_")).first()

    account_id.user_of = user_of

`keyproxy_sync --prune` deletes only ids that a user of Django could have. A function states them by another attribute:

    account_id.may_be_id = re.compile("u_[0-9]+").fullmatch
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from django.contrib.auth import get_user_model
from django.core.exceptions import FieldDoesNotExist, ImproperlyConfigured, ValidationError
from django.utils.module_loading import import_string

from keyproxy_client.django.checking.setting_checks import is_dotted_path
from keyproxy_client.django.settings import Settings, settings
from keyproxy_client.identity import Identity
from keyproxy_client.names import is_id


class InvalidId(ValueError):
    """`USER_ID` or `TENANT` gives a value that is not a valid id in keyproxy."""


def keyproxy_id(user: Any) -> str:
    """The id of this user in keyproxy. Raises InvalidId."""
    form = settings().user_id
    if callable(form) or is_dotted_path(form):
        return _valid("USER_ID", _function(form)(user), user)
    if user.pk is None:
        raise InvalidId("a user without a primary key has no id in keyproxy")
    values = {name: getattr(user, name) for name in _fields(form)}
    if None in values.values() or "" in values.values():
        raise InvalidId(f"USER_ID: a field of the user with the primary key {user.pk} is empty")
    return _valid("USER_ID", form.format(**values), user)


def tenant_of(user: Any) -> str:
    """The tenant of this user in keyproxy. Raises InvalidId."""
    found = settings()
    return found.fixed_tenant or _valid("TENANT", _function(found.tenant)(user), user)


def user_of(identity: Identity) -> Any | None:
    """The user of Django behind an identity; None if there is none, or if it belongs to another tenant now.

    The id of the user that is found must be the identity's: a database may compare more loosely, as 'u_042' and 'u_42'.
    Raises ImproperlyConfigured if `USER_ID` has no inverse.
    """
    user = user_of_id(identity.user)
    if user is None:
        return None
    try:
        return user if tenant_of(user) == identity.tenant else None
    except InvalidId:
        return None


def user_of_id(wanted: str) -> Any | None:
    """The user of Django with this id in keyproxy, in whichever tenant; None if there is none."""
    user = _find(settings().user_id, wanted)
    if user is None:
        return None
    try:
        return user if keyproxy_id(user) == wanted else None
    except InvalidId:
        return None


def may_be_id(text: str) -> bool:
    """Whether a user of Django could have this id.

    Raises ImproperlyConfigured if `USER_ID` is a function without the attribute `may_be_id`: nothing is known of its ids.
    """
    form = settings().user_id
    if callable(form) or is_dotted_path(form):
        condition = getattr(_function(form), "may_be_id", None)
        if condition is None:
            raise ImproperlyConfigured("KEYPROXY['USER_ID'] is a function without the attribute 'may_be_id'")
        return bool(condition(text))
    inverted = _inverse(form)
    if inverted is None:
        return _pattern(form).fullmatch(text) is not None
    value = text[len(inverted.before) : len(text) - len(inverted.after)]
    model = get_user_model()
    try:
        field = model._meta.pk if inverted.field == "pk" else model._meta.get_field(inverted.field)
        return form.format(**{inverted.field: field.to_python(value)}) == text
    except FieldDoesNotExist:
        return True
    except ValidationError:
        return False


def _find(form: str | Callable[[Any], str], wanted: str) -> Any | None:
    if callable(form) or is_dotted_path(form):
        inverse = getattr(_function(form), "user_of", None)
        if inverse is None:
            raise ImproperlyConfigured("KEYPROXY['USER_ID'] is a function without the attribute 'user_of'")
        return inverse(wanted)
    inverted = _inverse(form)
    if inverted is None:
        raise ImproperlyConfigured(
            "KEYPROXY['USER_ID'] has no inverse: it must be a format of one field, or a function"
        )
    if not wanted.startswith(inverted.before) or not wanted.endswith(inverted.after):
        return None
    value = wanted[len(inverted.before) : len(wanted) - len(inverted.after)]
    try:
        return get_user_model()._default_manager.get(**{inverted.field: value})
    except (get_user_model().DoesNotExist, ValueError, ValidationError):
        return None


def _valid(key: str, value: object, user: Any) -> str:
    """The value may be an e-mail address: a message names the primary key only."""
    if not isinstance(value, str) or not is_id(value):
        raise InvalidId(f"{key} gives no valid id for the user with the primary key {user.pk}")
    return value


def _function(path: Any) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = path if callable(path) else import_string(path)
    return function


class _Inverse(NamedTuple):
    before: str
    field: str
    after: str


@functools.lru_cache(maxsize=8)
def _fields(form: str) -> tuple[str, ...]:
    return tuple(name for _, name, _, _ in string.Formatter().parse(form) if name is not None)


@functools.lru_cache(maxsize=8)
def _inverse(form: str) -> _Inverse | None:
    fields = _fields(form)
    if len(fields) != 1:
        return None
    before, after = "", ""
    is_after = False
    for literal, name, _, _ in string.Formatter().parse(form):
        if is_after:
            after += literal
        else:
            before += literal
        is_after = is_after or name is not None
    return _Inverse(before, fields[0], after)


@functools.lru_cache(maxsize=8)
def _pattern(form: str) -> re.Pattern[str]:
    """What values of several fields can become: each is at least one character."""
    parts = string.Formatter().parse(form)
    return re.compile("".join(re.escape(text) + ("" if name is None else ".+") for text, name, _, _ in parts))


def faults(found: Settings) -> Iterator[str]:
    """What is wrong with `USER_ID` and `TENANT` in this project: paths and fields that do not exist."""
    for key, path in (("USER_ID", found.user_id), ("TENANT", found.tenant)):
        if not is_dotted_path(path):
            continue
        try:
            if not callable(_function(path)):
                yield f"KEYPROXY[{key!r}] is not a function; it is {path!r}"
        except ImportError as error:
            yield f"KEYPROXY[{key!r}] is read as the path of a function, which cannot be imported: {error}"
    if isinstance(found.user_id, str) and not is_dotted_path(found.user_id):
        yield from _field_faults(found.user_id)


def _field_faults(form: str) -> Iterator[str]:
    model = get_user_model()
    names = _fields(form)
    for name in names:
        if not hasattr(model, name):
            yield f"KEYPROXY['USER_ID'] names {name!r}, which the user model does not have"
            return
    if not _may_be_unique(model, names):
        yield f"KEYPROXY['USER_ID'] gives two users one id: {', '.join(map(repr, names))} is not unique"


def _may_be_unique(model: Any, names: tuple[str, ...]) -> bool:
    """True for a property, of which Django has no description."""
    for name in names:
        try:
            if name == "pk" or model._meta.get_field(name).unique:
                return True
        except FieldDoesNotExist:
            return True
    return any(set(constraint.fields) <= set(names) for constraint in model._meta.total_unique_constraints)

"""The system checks of this application, and the faults that stop a process when it starts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as CheckWarning
from django.db import DatabaseError, connections
from django.utils.connection import ConnectionDoesNotExist
from django.utils.module_loading import import_string

from keyproxy_client.django import users
from keyproxy_client.django.checking import database_rights
from keyproxy_client.django.checking.view_classes import is_drf_class_in_settings, is_drf_class_in_views
from keyproxy_client.django.directory.sql_connection import explained
from keyproxy_client.django.settings import Settings, SettingsInvalid, settings

MIDDLEWARE: Final = "keyproxy_client.django.middleware.KeyproxyMiddleware"


def start_errors() -> list[CheckMessage]:
    """E001 and E002: with one of these, requests could be served without a trust rule, or users get wrong ids."""
    return [*_setting_errors(), *_trust_errors()]


def _setting_errors() -> Iterator[CheckMessage]:
    try:
        found = settings()
    except SettingsInvalid as error:
        yield from (Error(fault, id="keyproxy.E001") for fault in error.faults)
        return
    for fault in users.faults(found):
        yield Error(fault, id="keyproxy.E001")
    if found.backend == "sql" and found.database not in connections.settings:
        yield Error(f"KEYPROXY['DATABASE'] is not in DATABASES; it is {found.database!r}", id="keyproxy.E001")


def _trust_errors() -> Iterator[CheckMessage]:
    """From the raw values: other faults of the settings do not hide these."""
    values = getattr(django_settings, "KEYPROXY", None)
    values = values if isinstance(values, Mapping) else {}
    if values.get("TRUST") is None and (MIDDLEWARE in django_settings.MIDDLEWARE or is_drf_class_in_settings()):
        yield _no_trust("The middleware or a DRF class of keyproxy_client")
    if values.get("DEV_IDENTITY") is not None and not django_settings.DEBUG:
        yield Error(
            "KEYPROXY['DEV_IDENTITY'] is set and DEBUG is off",
            hint="Set it only in the settings of your own machine: it identifies requests that keyproxy did not verify.",
            id="keyproxy.E002",
        )


def _no_trust(user: str) -> CheckMessage:
    return Error(
        f"KEYPROXY['TRUST'] is missing: {user} needs it",
        hint="'unix' or 'loopback' if only keyproxy reaches this server that way, else 'signed'.",
        id="keyproxy.E002",
    )


@register("keyproxy")
def check_settings(**_kwargs: Any) -> list[CheckMessage]:
    """E001 to E005 and the warnings."""
    found = start_errors()
    if not any(error.id == "keyproxy.E002" for error in found):
        found += _view_errors()
    try:
        values = settings()
    except SettingsInvalid:
        return found
    return [
        *found,
        *_fallback_errors(values),
        *_database_kind(values),
        *_sealing(values),
        *_extras(values),
        *_warnings(values),
    ]


def _view_errors() -> list[CheckMessage]:
    """Views import late, so that these faults cannot stop the start; such a view refuses requests instead."""
    values = getattr(django_settings, "KEYPROXY", None)
    is_trusting = isinstance(values, Mapping) and values.get("TRUST") is not None
    return (
        [] if is_trusting or not is_drf_class_in_views() else [_no_trust("A view with a DRF class of keyproxy_client")]
    )


def _fallback_errors(found: Settings) -> Iterator[CheckMessage]:
    fallback = found.has_api_key_fallback
    if not isinstance(fallback, str):
        return
    try:
        permission = import_string(fallback)
    except ImportError as error:
        yield Error(f"KEYPROXY['HAS_API_KEY_FALLBACK'] cannot be imported: {error}", id="keyproxy.E001")
        return
    if not callable(permission):
        yield Error(f"KEYPROXY['HAS_API_KEY_FALLBACK'] is not a permission of DRF: {fallback!r}", id="keyproxy.E001")


def _database_kind(found: Settings) -> Iterator[CheckMessage]:
    if found.backend != "sql":
        return
    try:
        connection = connections[found.database]
    except ConnectionDoesNotExist:
        return
    if connection.vendor != "postgresql":
        yield Error(
            f"KEYPROXY['DATABASE'] {found.database!r} is not PostgreSQL",
            hint="Name the alias of the database that has keyproxy's schema, or set BACKEND to 'api'.",
            id="keyproxy.E003",
        )
    elif not connection.settings_dict.get("ATOMIC_REQUESTS"):
        yield CheckWarning(
            f"KEYPROXY['BACKEND'] is 'sql' without ATOMIC_REQUESTS of the database {found.database!r}",
            hint="In autocommit mode Django commits its user first; keyproxy_sync repairs a failure after that.",
            id="keyproxy.W001",
        )


def _sealing(found: Settings) -> Iterator[CheckMessage]:
    if found.credentials != "per_user":
        return
    try:
        keys = found.read_secret_keys()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not ASCII"
        yield Error(f"KEYPROXY['SECRET_KEYS_FILE'] cannot be read: {why}", id="keyproxy.E004")
        return
    if not keys or not all(_is_fernet_key(key) for key in keys):
        yield Error(
            "KEYPROXY['CREDENTIALS'] is 'per_user' without valid SECRET_KEYS",
            hint="Make one with cryptography.fernet.Fernet.generate_key() and keep it in SECRET_KEYS_FILE.",
            id="keyproxy.E004",
        )


def _is_fernet_key(key: str) -> bool:
    try:
        return len(base64.urlsafe_b64decode(key)) == 32
    except (ValueError, binascii.Error):
        return False


def _extras(found: Settings) -> Iterator[CheckMessage]:
    needed: list[tuple[str, str, tuple[str, ...]]] = []
    if found.trust == "signed":
        needed.append(("signed", "KEYPROXY['TRUST'] 'signed'", ("jwt", "cryptography")))
    if found.credentials == "per_user":
        needed.append(("sealed", "KEYPROXY['CREDENTIALS'] 'per_user'", ("cryptography",)))
    for extra, what, modules in needed:
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            yield Error(
                f"{what} needs {' and '.join(missing)}",
                hint=f"pip install 'keyproxy-client[{extra}]'",
                id="keyproxy.E005",
            )


def _warnings(found: Settings) -> Iterator[CheckMessage]:
    if found.backend == "off" and not django_settings.DEBUG:
        yield CheckWarning(
            "KEYPROXY['BACKEND'] is 'off': keyproxy does not follow this project's users", id="keyproxy.W002"
        )
    if MIDDLEWARE in list(django_settings.MIDDLEWARE)[1:]:
        yield CheckWarning(
            "KeyproxyMiddleware is not the first of MIDDLEWARE",
            hint="A middleware before it sees identity headers that are not verified.",
            id="keyproxy.W003",
        )
    if found.has_api_key_fallback is not None:
        yield CheckWarning(
            "KEYPROXY['HAS_API_KEY_FALLBACK'] is set: requests that bypass keyproxy are accepted with an old key",
            id="keyproxy.W004",
        )


@register("keyproxy", Tags.database)
def check_database(databases: Sequence[str] | None = None, **_kwargs: Any) -> list[CheckMessage]:
    """E010, E011 and W010: the schema and the rights of the role of `DATABASE`, by `check --database ALIAS`."""
    try:
        found = settings()
    except SettingsInvalid:
        return []
    if found.backend != "sql" or found.database not in (databases or ()):
        return []
    connection = connections[found.database]
    return [] if connection.vendor != "postgresql" else list(database_messages(connection))


def database_messages(connection: Any) -> Iterator[CheckMessage]:
    """E010, E011 and W010 of a connection to PostgreSQL."""
    try:
        access = database_rights.access(connection)
    except DatabaseError as error:
        yield Error(f"keyproxy's schema cannot be read: {explained(error)}", id="keyproxy.E010")
        return
    if not access.has_schema:
        yield Error("keyproxy's schema does not exist", hint="keyproxy migrate", id="keyproxy.E010")
        return
    if access.is_old:
        found = "" if access.migration is None else f"it has migration {access.migration}, "
        yield Error(
            f"keyproxy's schema is too old: {found}migration {database_rights.OLDEST_MIGRATION} is needed",
            hint="keyproxy migrate",
            id="keyproxy.E010",
        )
    if access.missing:
        yield Error(
            "The database role lacks rights in keyproxy's schema: " + "; ".join(access.missing),
            hint="keyproxy migrate --roles keyproxy, then GRANT keyproxy_app TO the role of this project",
            id="keyproxy.E011",
        )
    if access.excessive:
        yield CheckWarning(
            "The database role " + ", ".join(access.excessive),
            hint="Grant it keyproxy_app, and nothing else in keyproxy's schema.",
            id="keyproxy.W010",
        )

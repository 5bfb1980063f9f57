"""The authorizer of the `http` functions: from their arguments, or from `KEYPROXY` in Django's settings."""

from __future__ import annotations

import functools
import os
from typing import Any, TypedDict

from keyproxy_client.acting import Acting, acting
from keyproxy_client.outgoing.authorizer import HEADER_PREFIX, WAIT_MAX_SECONDS, ActFor, Authorizer
from keyproxy_client.outgoing.key_sources import Key, KeyFile, SecretUnavailable


class Options(TypedDict, total=False):
    """Whom to authenticate with, and for whom. Without `origin` and `key`, Django's settings have both."""

    origin: str
    key: Key
    test_key: Key | None
    act_for: ActFor
    wait_max_seconds: float
    header_prefix: str


def authorizer(options: Options) -> Authorizer:
    """The authorizer of these options. Raises ValueError, or ImproperlyConfigured for settings of Django."""
    act_for = options.get("act_for", acting)
    wait_max_seconds = options.get("wait_max_seconds", WAIT_MAX_SECONDS)
    if "origin" in options and "key" in options:
        return Authorizer(
            options["origin"],
            options["key"],
            act_for,
            wait_max_seconds,
            test_key=options.get("test_key"),
            header_prefix=options.get("header_prefix", HEADER_PREFIX),
        )
    if set(options) & {"origin", "key", "test_key", "header_prefix"}:
        raise TypeError("origin and key belong together; without both, KEYPROXY in Django's settings applies")
    return _from_django(act_for, wait_max_seconds)


def _from_django(act_for: ActFor, wait_max_seconds: float) -> Authorizer:
    found = _settings()
    if found.credentials == "per_user":
        key: Key = _PerUserKeys()
        test_key: Key | None = None
    else:
        if not found.service_key_file:
            raise _invalid("KEYPROXY['SERVICE_KEY_FILE'] is missing: outgoing requests need it")
        key = _service_key(found, found.service_key_file)
        test_path = found.service_test_key_file
        test_key = _service_key(found, test_path) if test_path else None
    if not found.origin:
        raise _invalid("KEYPROXY['ORIGIN'] is missing: outgoing requests need it")
    return Authorizer(
        found.origin, key, act_for, wait_max_seconds, test_key=test_key, header_prefix=found.header_prefix
    )


def _service_key(found: Any, template: str) -> Key:
    file = _key_file(template, found.fixed_tenant)
    if found.provision != "first_use":
        return file
    from keyproxy_client.django.first_use import FirstUseKeys

    return FirstUseKeys(file)


def _settings() -> Any:
    try:
        from django.conf import settings as django_settings
    except ImportError:
        is_configured = False
    else:
        is_configured = django_settings.configured or "DJANGO_SETTINGS_MODULE" in os.environ
    if not is_configured:
        raise TypeError("pass origin= and key=: there are no Django settings to take them from")
    from keyproxy_client.django.settings import settings

    return settings()


def _invalid(fault: str) -> Exception:
    from keyproxy_client.django.settings import SettingsInvalid

    return SettingsInvalid([fault])


@functools.lru_cache(maxsize=64)
def _key_file(template: str, tenant: str | None) -> KeyFile:
    """One object per file, so that a process reads it once, whatever the number of clients."""
    return KeyFile(template, tenant)


class _PerUserKeys:
    """The keys of the acting users themselves, from `keyproxy_credential`. They name no other user in Act-For."""

    delegates = False
    chooses_mode = True

    def secret(self, acting: Acting | None) -> str:
        """The secret of the acting user's key. Raises SecretUnavailable, and the errors of `credentials.secret_for`."""
        from keyproxy_client.django import credentials

        return credentials.secret_for(_present(acting))

    async def secret_async(self, acting: Acting | None) -> str:
        """The same from coroutines, which may not use Django's database connections themselves."""
        from keyproxy_client.django import credentials

        return await credentials.secret_for_async(_present(acting))

    def forget(self) -> None:
        """The row is read for each request."""


def _present(acting: Acting | None) -> Acting:
    if acting is None:
        raise SecretUnavailable("with CREDENTIALS 'per_user' there is no key without acting user")
    return acting

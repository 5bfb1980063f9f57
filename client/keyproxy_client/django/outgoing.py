"""The keys of outgoing requests, as `KEYPROXY` in Django's settings has them."""

from __future__ import annotations

import os

from django.conf import settings as django_settings

from keyproxy_client.acting import Acting
from keyproxy_client.django.provisioning.first_use import FirstUseKeys
from keyproxy_client.django.settings import Settings, SettingsInvalid, settings
from keyproxy_client.outgoing.authorizer import ActFor, Authorizer
from keyproxy_client.outgoing.key_sources import Key, SecretUnavailable, key_file


def is_configured() -> bool:
    """Whether this process has settings of Django."""
    return django_settings.configured or "DJANGO_SETTINGS_MODULE" in os.environ


def authorizer(act_for: ActFor, wait_max_seconds: float) -> Authorizer:
    """The authorizer for `ORIGIN`. Raises SettingsInvalid."""
    found = settings()
    if not found.origin:
        raise SettingsInvalid(["KEYPROXY['ORIGIN'] is missing: outgoing requests need it"])
    test_key: Key | None = None
    if found.credentials == "per_user":
        key: Key = PerUserKeys()
    elif not found.service_key_file:
        raise SettingsInvalid(["KEYPROXY['SERVICE_KEY_FILE'] is missing: outgoing requests need it"])
    else:
        key = _service_key(found, found.service_key_file)
        if found.service_test_key_file:
            test_key = _service_key(found, found.service_test_key_file)
    return Authorizer(
        found.origin, key, act_for, wait_max_seconds, test_key=test_key, header_prefix=found.header_prefix
    )


def _service_key(found: Settings, template: str) -> Key:
    file = key_file(template, found.fixed_tenant)
    return FirstUseKeys(file) if found.provision == "first_use" else file


class PerUserKeys:
    """The keys of the acting users themselves. They name no other user in Act-For."""

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

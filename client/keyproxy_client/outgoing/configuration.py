"""The authorizer of the `http` functions: from their arguments, or from `KEYPROXY` in Django's settings."""

from __future__ import annotations

import importlib.util
from typing import TypedDict

from keyproxy_client.acting import acting
from keyproxy_client.outgoing.authorizer import HEADER_PREFIX, WAIT_MAX_SECONDS, ActFor, Authorizer
from keyproxy_client.outgoing.key_sources import Key


class Options(TypedDict, total=False):
    """The key, the user to act for, and where to. Without `origin` and `key`, Django's settings have both."""

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
    if importlib.util.find_spec("django") is not None:
        from keyproxy_client.django import outgoing

        if outgoing.is_configured():
            return outgoing.authorizer(act_for, wait_max_seconds)
    raise TypeError("pass origin= and key=: there are no settings of Django to take them from")

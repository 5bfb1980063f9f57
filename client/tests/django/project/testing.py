"""Settings for the length of a test."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.test import override_settings


def keyproxy_settings(**changes: Any) -> override_settings:
    """The project with these keys of `KEYPROXY` changed: a context manager and a decorator. None of them is a default."""
    return override_settings(KEYPROXY={**settings.KEYPROXY, **changes})

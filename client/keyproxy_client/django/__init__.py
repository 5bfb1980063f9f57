"""keyproxy for Django: identity of requests, users and keys that follow the application's users, settings and checks."""

from __future__ import annotations

from keyproxy_client.missing_extra import missing_extra

try:
    import django  # noqa: F401 - every module here needs it
except ImportError as error:
    raise missing_extra("django", error) from error

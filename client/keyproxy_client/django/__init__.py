"""keyproxy for Django: identity of requests, users and keys that follow the application's users, settings and checks."""

from __future__ import annotations

from keyproxy_client.missing_extra import missing_extra

# Here for all modules of the package: whichever is imported first, the error names what to install.
try:
    import django as _django  # noqa: F401
except ImportError as error:
    raise missing_extra("django", error, "drf") from error

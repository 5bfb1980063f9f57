"""Credentials of upstreams: `[[providers]]`, and the keys that seal stored ones, `[secrets]`."""

from __future__ import annotations

from dataclasses import dataclass

from keyproxy.config import value_checks
from keyproxy.config.value_types import setting


@dataclass(frozen=True, slots=True)
class SecretSettings:
    """What seals secrets in the database. Lines `kid:base64 of 32 bytes`: the first key seals, all of them open."""

    key_file: str = setting("")


@dataclass(frozen=True, slots=True)
class ProviderRow:
    """One row of `[[providers]]`, as configured."""

    name: str = setting("", value_checks.tool_name)
    header: str = setting("Authorization")
    #: With exactly one `{secret}`.
    format: str = setting("Bearer {secret}")
    secret_file: str = setting("")
    test_secret_file: str = setting("")
    #: Whether secrets are stored in the database too, sealed.
    sealed: bool = setting(False)
    #: Whether the secret may go to an upstream without TLS that is not on this machine.
    allow_plaintext: bool = setting(False)

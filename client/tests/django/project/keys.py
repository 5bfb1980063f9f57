"""Users and keys in keyproxy, made as a superuser by SQL: a test of identities does not need provisioning."""

from __future__ import annotations

import psycopg

from deployment import Deployment
from keyproxy_client import keys


def issued_key(
    deployment: Deployment, user: str, *, tenant: str = "acme", scopes: tuple[str, ...] = ("jobs:write",)
) -> str:
    """The secret of a new live key of this user, which is created if it does not exist."""
    secret = keys.make()
    with psycopg.connect(deployment.dsn, autocommit=True) as superuser:
        superuser.execute(
            "INSERT INTO keyproxy.users (id, tenant_id) VALUES (%s, %s) ON CONFLICT (id) DO NOTHING", [user, tenant]
        )
        superuser.execute(
            "INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, scopes) VALUES (%s, %s, %s, %s, %s)",
            [keys.new_key_id(), user, keys.digest(secret), keys.hint(secret), list(scopes)],
        )
    return secret

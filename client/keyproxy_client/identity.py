"""The identity of incoming requests, and the rules by which requests are trusted.

`read` does not decide on trust: call it for requests that only keyproxy can have sent. The middlewares of `asgi`, `wsgi`
and `django.middleware` apply a `Trust` first.
"""

from __future__ import annotations

from keyproxy_client.incoming.identity_headers import DEFAULT_PREFIX, read
from keyproxy_client.incoming.trust import Trust
from keyproxy_client.incoming.verified_identity import ENVIRON_KEY, Identity, IdentityInvalid

__all__ = ["DEFAULT_PREFIX", "ENVIRON_KEY", "Identity", "IdentityInvalid", "Trust", "read"]

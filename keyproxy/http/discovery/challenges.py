"""The WWW-Authenticate lines of a refusal. RFC 9110 section 11.6.1, RFC 6750 section 3, RFC 9728 section 5.1.

Where OAuth access tokens are accepted, the first challenge is always `Bearer`: clients of MCP read no other one, and some
read only the first. It leads them to the authorization server.
"""

from __future__ import annotations

import http
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from keyproxy.http import error_shapes
from keyproxy.reasons import Reason, Refusal

_API_KEY: Final = 'Api-Key realm="keyproxy"'

#: Of missing scopes, for clients of MCP.
_SCOPE_CHALLENGES: Final[Mapping[str, str]] = {error_shapes.MCP: "Bearer"}


class Challenges:
    """The challenges of one configuration.

    `metadata_url`: where the metadata of the protected resource are; empty: OAuth access tokens are not accepted.
    `scopes`: that clients request for a start.
    """

    __slots__ = ("_metadata", "_scopes")

    def __init__(self, metadata_url: str = "", scopes: Sequence[str] = ()) -> None:
        self._metadata: Final = f'resource_metadata="{metadata_url}"' if metadata_url else ""
        self._scopes: Final = f', scope="{" ".join(scopes)}"' if scopes else ""

    def of(self, refusal: Refusal, status: int, error_shape: str, *, route_scopes: Collection[str] = ()) -> list[str]:
        """The challenges of a refusal with this status, none if no other credential would do.

        `route_scopes`: that every request on the route needs.
        """
        if status == http.HTTPStatus.UNAUTHORIZED:
            if not self._metadata:
                return [_API_KEY]
            # No error if the request shows no credential, RFC 6750 section 3.1.
            error = "" if refusal.reason is Reason.KEY_MISSING else 'error="invalid_token", '
            return [f"Bearer {error}{self._metadata}{self._scopes}", _API_KEY]
        if not refusal.missing_scopes:
            return []
        missing = f'error="insufficient_scope", scope="{" ".join(refusal.missing_scopes)}"'
        if not self._metadata:
            return [f"{_SCOPE_CHALLENGES.get(error_shape, f'{_API_KEY},')} {missing}"]
        # A new token replaces the old one, so that it needs all scopes of the route.
        needed = " ".join(sorted({*route_scopes, *refusal.missing_scopes}))
        bearer = f'Bearer error="insufficient_scope", scope="{needed}", {self._metadata}'
        return [bearer, f"{_API_KEY}, {missing}"]

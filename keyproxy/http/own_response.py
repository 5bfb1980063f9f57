"""The responses that the proxy makes itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, NamedTuple

_CREATED: Final = 201
_CREATED_FIELDS: Final = b"Content-Type: application/json\r\nCache-Control: no-store\r\n"


class OwnResponse(NamedTuple):
    """A complete response of the proxy. `fields` are header lines, without framing and X-Request-Id."""

    status: int
    reason_phrase: bytes
    fields: bytes
    body: bytes


def created(content: Mapping[str, object]) -> OwnResponse:
    """The response with what was made, which no cache may store."""
    return OwnResponse(_CREATED, b"Created", _CREATED_FIELDS, json.dumps(content).encode("utf-8"))

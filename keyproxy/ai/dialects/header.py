"""Any other upstream: its responses report a total in the header `X-Usage-Tokens`."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import Dialect, Endpoint, EndpointClass

HEADER: Final = Dialect(
    name="header", endpoints=(), usual=Endpoint(name="", kind=EndpointClass.UNKNOWN), model_member=False
)

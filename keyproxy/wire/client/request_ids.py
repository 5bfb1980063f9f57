"""Choose the id of a request: the client's X-Request-Id if it is well-formed and free of keys, else a new one."""

from __future__ import annotations

from keyproxy.auth.agent_token_format import signature_of
from keyproxy.auth.api_key import KeyFormat
from keyproxy.http import headers
from keyproxy.http_messages import RequestHead


class RequestIds:
    """The request ids of one process: unique, not secret. `instance` distinguishes them from those of other processes."""

    def __init__(self, instance: bytes) -> None:
        self._instance = instance
        self._serial = 0

    def choose(self, head: RequestHead | None, key_format: KeyFormat) -> bytes:
        """The id of the request with this head; None: of bytes that are no request."""
        sent = head.request_id if head is not None else None
        if head is not None and sent is not None and headers.sane_request_id(sent):
            # A key in this field would be logged and echoed. Only the signature of a token is secret: the rest is ids.
            keys = (token for field in head.credentials for token in field.value.split()[-1:])
            if not key_format.is_within(sent) and not any((signature_of(key) or key) in sent for key in keys):
                return sent
        self._serial += 1
        return b"%b%010x" % (self._instance, self._serial)

"""Choose the id of a request: the client's X-Request-Id if it is well-formed and free of keys, else a new one."""

from __future__ import annotations

from typing import Final

from keyproxy.auth.agent_token_format import signature_of
from keyproxy.auth.api_key import KeyFormat
from keyproxy.http import headers
from keyproxy.http_messages import RequestHead

_END_BYTES: Final = 4
_SPACE: Final = 0x20


class RequestIds:
    """The request ids of one process: unique, not secret. `instance` distinguishes them from those of other processes."""

    def __init__(self, instance: bytes) -> None:
        self._instance = instance
        self._serial = 0

    def choose(self, head: RequestHead | None, key_format: KeyFormat) -> bytes:
        """The id of the request with this head; None: of bytes that are no request."""
        if head is not None:
            sent = head.request_id
            if sent is not None and headers.sane_request_id(sent) and not _shows_key(sent, head, key_format):
                return sent
        self._serial += 1
        return b"%b%010x" % (self._instance, self._serial)


def _shows_key(sent: bytes, head: RequestHead, key_format: KeyFormat) -> bool:
    """Whether an id contains a key, which would be logged and echoed. Only the signature of a token is secret: the rest
    is ids."""
    if key_format.is_within(sent):
        return True
    for field in head.credentials:
        # The key, and so the signature of a token, is at the end of the value. If the last characters belong to it and
        # are not in the id, then neither is the key: nearly always, without finding the key first.
        value = field.value
        if value and value[-1] > _SPACE and value[-1] not in sent:
            continue
        end = value[-_END_BYTES:]
        if end.isalnum() and sent.find(end) < 0:
            continue
        for key in field.value.split()[-1:]:
            if sent.find(signature_of(key) or key) >= 0:
                return True
    return False

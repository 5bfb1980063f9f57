"""Which responses are followed by one repetition of the request: those that keyproxy made before it sent anything on."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Callable
from typing import Final

#: The codes of keyproxy with these statuses. The request was refused before it reached the upstream.
CODES: Final = frozenset(
    {
        "rate_limited", "concurrency_limited", "quota_exhausted", "token_budget_exhausted", "spend_budget_exhausted",
        "store_unavailable", "ledger_unavailable", "approvals_unavailable", "upstream_credential_unavailable",
        "overloaded",
    }
)  # fmt: skip
STATUSES: Final = frozenset({429, 503})

#: A refusal of keyproxy is shorter. A longer response comes from the upstream and may be a stream.
_BODY_BYTES_MAX: Final = 65_536
_LENGTH_DIGITS_MAX: Final = 9

_UNAUTHORIZED: Final = 401
_CHALLENGE = re.compile(r'(?:^|[\s,])Api-Key\s+realm="keyproxy"', re.IGNORECASE)
_JSON = re.compile(r"application/(?:[a-z.+-]+\+)?json(?:\s*;|$)", re.IGNORECASE)

#: Returns the value of a header of the response.
HeaderOf = Callable[[str], str | None]


class Repetitions:
    """The repetitions that one request still has: one with a secret that was read again, and one after a wait."""

    __slots__ = ("_may_renew", "_may_wait", "_wait_max_seconds")

    def __init__(self, wait_max_seconds: float) -> None:
        self._wait_max_seconds = wait_max_seconds
        self._may_renew = True
        self._may_wait = True

    def may_renew(self, status: int, header_of: HeaderOf) -> bool:
        """Whether to read the secret again after this response. True once."""
        if status != _UNAUTHORIZED or not self._may_renew:
            return False
        self._may_renew = False
        return _CHALLENGE.search(header_of("www-authenticate") or "") is not None

    def wait_seconds(self, status: int, header_of: HeaderOf) -> float | None:
        """How long to wait after this response if its body proves to be a refusal of keyproxy; None: not at all."""
        if status not in STATUSES or not self._may_wait:
            return None
        seconds = retry_after_seconds(header_of("retry-after"))
        length = header_of("content-length") or ""
        is_short = length.isdecimal() and len(length) <= _LENGTH_DIGITS_MAX and int(length) <= _BODY_BYTES_MAX
        if seconds is None or seconds > self._wait_max_seconds or not is_short:
            return None
        if _JSON.match(header_of("content-type") or "application/json") is None:
            return None
        self._may_wait = False
        return seconds


def is_refusal(body: bytes) -> bool:
    """Whether the body of a 429 or 503 is keyproxy's: its `code`, or that of its `error`, is one of `CODES`."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(document, dict):
        return False
    error = document.get("error")
    codes = (document.get("code"), error.get("code") if isinstance(error, dict) else None)
    return any(isinstance(code, str) and code in CODES for code in codes)


def retry_after_seconds(value: str | None) -> float | None:
    """The seconds of a Retry-After header, from its number or date; None if it is absent or malformed."""
    if value is None:
        return None
    text = value.strip()
    if text.isdecimal() and text.isascii():
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, math.ceil(at - time.time()))

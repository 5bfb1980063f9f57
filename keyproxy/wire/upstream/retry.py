"""Decide whether a request may be sent again after its upstream connection was lost."""

from __future__ import annotations

from typing import Final

from keyproxy.http_messages import RequestHead
from keyproxy.reasons import Reason, Refusal

#: RFC 9110 section 9.2.2.
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})


def is_idempotent(head: RequestHead | None) -> bool:
    """Whether the request may be executed twice without harm."""
    return head is not None and head.line.method in _IDEMPOTENT


def may_retry(head: RequestHead | None, refusal: Refusal, *, is_reused: bool) -> bool:
    """Whether a request without any response may be sent again: it is idempotent and has no body.

    `is_reused`: only a connection that was idle before may have been closed just as the pool lent it.
    """
    is_lost = refusal.reason is Reason.UPSTREAM_UNREACHABLE and is_reused
    return is_lost and is_idempotent(head) and head is not None and not head.has_body

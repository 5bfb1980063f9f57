"""A message that is claimed from an outbox, to be sent to a webhook now."""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

#: Well beyond the duration of an attempt: a sender with an older claim is presumed dead.
CLAIM_LEASE: Final = timedelta(seconds=60)

REASON_CHARACTERS_MAX: Final = 500


#: The kinds of messages: the `type` of their content.
KEY_EXPIRING: Final = "key.expiring"
ADMIN_TOKEN_EXPIRING: Final = "admin_token.expiring"  # noqa: S105 - no secret
LIMIT_THRESHOLD: Final = "limit.threshold"
APPROVAL_REQUESTED: Final = "approval.requested"
APPROVAL_DECIDED: Final = "approval.decided"
KEY_ANOMALY: Final = "key.anomaly"
KEY_SUSPENDED: Final = "key.suspended"
KINDS: Final = (
    KEY_EXPIRING,
    ADMIN_TOKEN_EXPIRING,
    LIMIT_THRESHOLD,
    APPROVAL_REQUESTED,
    APPROVAL_DECIDED,
    KEY_ANOMALY,
    KEY_SUSPENDED,
)


class Message(NamedTuple):
    """`id` and `content` are the same in every attempt. `attempts`: the number of this one. `kind`: one of KINDS.

    `subject` describes the message in a log line, such as "reminder of key key_…".
    """

    id: str
    subject: str
    content: bytes
    attempts: int
    kind: str


class Abandoned(NamedTuple):
    """A message that is not sent any more, and why."""

    subject: str
    why: str
    kind: str

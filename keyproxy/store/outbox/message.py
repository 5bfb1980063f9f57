"""A message that is claimed from an outbox, to be sent to a webhook now."""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

#: Well beyond the duration of an attempt: a sender with an older claim is presumed dead.
CLAIM_LEASE: Final = timedelta(seconds=60)

REASON_CHARACTERS_MAX: Final = 500


class Message(NamedTuple):
    """`id` and `content` are the same in every attempt. `attempts`: the number of this one.

    `subject` describes the message in a log line, such as "reminder of key key_…".
    """

    id: str
    subject: str
    content: bytes
    attempts: int


class Abandoned(NamedTuple):
    """A message that is not sent any more, and why."""

    subject: str
    why: str

"""The rate limits of the authorization server: per address, or per /64 for IPv6."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from keyproxy.auth.throttle import Throttle
from keyproxy.model import Moment


class _Bucket(NamedTuple):
    """`name`: distinguishes buckets of one size. `burst`: how many at once. `seconds_each`: then one in this time."""

    name: str
    burst: int
    seconds_each: float


class Rate(enum.Enum):
    """What is limited."""

    REGISTER = _Bucket("register", 20, 3.0)
    AUTHORIZE = _Bucket("authorize", 60, 1.0)
    CONSENT = _Bucket("consent", 30, 2.0)
    #: Fetches of metadata documents that are not in the cache.
    NEW_DOCUMENTS = _Bucket("new_documents", 30, 2.0)
    #: Only failures count, so that successes are never slowed.
    FAILED_LOGINS = _Bucket("failed_logins", 10, 6.0)
    FAILED_TOKEN_REQUESTS = _Bucket("failed_token_requests", 10, 6.0)


class RateLimits:
    """The rate limits of one process. They outlive a reload."""

    def __init__(self, now: Callable[[], Moment]) -> None:
        self._now = now
        self._throttles = {
            rate: Throttle(burst=rate.value.burst, seconds_each=rate.value.seconds_each) for rate in Rate
        }

    def count(self, rate: Rate, address: str) -> int:
        """Count one request, or one failure. Returns the seconds that the address must wait, 0 for none."""
        return self._throttles[rate].count(address, self._now().mono_seconds)

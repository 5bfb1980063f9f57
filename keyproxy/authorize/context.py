"""What the endpoints are made of: the configuration, the store, the clock, randomness, limits and counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from keyproxy.auth.api_key import KeyFormat
from keyproxy.authorize.metrics import OAuthCounts
from keyproxy.authorize.rate_limits import RateLimits
from keyproxy.config.schema import Settings
from keyproxy.model import Moment
from keyproxy.store.postgres.database import Database


@dataclass(frozen=True, slots=True)
class Context:
    """The dependencies of the endpoints. A reload makes a new one; `rate_limits` and `counts` stay.

    `ticket_secrets`: the content of `oauth.secret_file`, then that of `oauth.secret_previous_file`, if configured.
    `entropy`: returns this number of random bytes. `login_secret`: that of `oauth.login.client_secret_file`, if any.
    `store_now`: a clock in place of the database's, for tests.
    """

    settings: Settings
    database: Database
    key_format: KeyFormat
    ticket_secrets: tuple[bytes, ...] = field(repr=False)
    now: Callable[[], Moment]
    entropy: Callable[[int], bytes]
    rate_limits: RateLimits
    counts: OAuthCounts
    login_secret: str | None = field(default=None, repr=False)
    store_now: Callable[[], datetime] | None = None

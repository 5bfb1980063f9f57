"""A batch of usage: sums by day, key and route, and the events of single requests, encoded once."""

from __future__ import annotations

from datetime import date
from typing import Final

import orjson

from keyproxy.model import Identity
from keyproxy.ports import Exchange

#: Cached common parts of events per group; the cache is cleared when it is full.
_ALIKE_MAX: Final = 64

_EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()


class UsageGroup:
    """The exchanges of one day that share key and route."""

    __slots__ = ("alike", "day", "estimated", "identity", "refusals", "requests", "route", "tokens_in", "tokens_out")

    def __init__(self, day: int, identity: Identity, route: str) -> None:
        self.day = day
        self.identity = identity
        self.route = route
        self.requests = self.refusals = self.tokens_in = self.tokens_out = self.estimated = 0
        #: The part of an event that is the same for requests that are alike, by method, status, code and policy.
        self.alike: dict[tuple[bytes, int, str, str], orjson.Fragment] = {}

    def event(self, exchange: Exchange, code: str, wall_offset: float) -> tuple[object, ...]:
        """One event, in the order in which the view keyproxy.usage_events reads it."""
        head, use, started = exchange.head, exchange.token_use, exchange.started_mono
        key = (b"" if head is None else head.line.method, exchange.status, code, exchange.policy)
        return (
            int((started + wall_offset) * 1_000),
            exchange.request_id.decode("ascii"),
            self.alike.get(key) or self._alike(key),
            exchange.bytes_in,
            exchange.bytes_out,
            int((exchange.ended_mono - started) * 1_000_000),
            None if use is None else use.tokens_in,
            None if use is None else use.tokens_out,
            exchange.is_estimated,
        )

    def _alike(self, key: tuple[bytes, int, str, str]) -> orjson.Fragment:
        # Clients can send any method, so this needs a bound.
        if len(self.alike) >= _ALIKE_MAX:
            self.alike.clear()
        who, (method, status, code, policy) = self.identity, key
        common: list[object] = [who.tenant_id, who.user_id, who.key_id, who.mode, self.route, method.decode("ascii")]
        common += [status, code, policy] if policy else [status, code]
        fragment = self.alike[key] = orjson.Fragment(orjson.dumps(common))
        return fragment


class UsageBatch:
    """The unit of writing. `events`: JSON arrays without their brackets."""

    __slots__ = ("by_key", "event_bytes", "event_count", "events", "groups", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.groups: list[UsageGroup] = []
        self.by_key: dict[tuple[Identity, str], UsageGroup] = {}
        self.events: list[bytes] = []
        self.event_bytes = self.event_count = 0

    def columns(self) -> tuple[object, ...]:
        """The batch as the arguments of `record_usage`."""
        groups = self.groups
        return (
            self.number,
            [date.fromordinal(group.day + _EPOCH_ORDINAL) for group in groups],
            [group.identity.tenant_id for group in groups],
            [group.identity.user_id for group in groups],
            [group.identity.key_id for group in groups],
            [group.identity.is_test for group in groups],
            [group.route for group in groups],
            [group.requests for group in groups],
            [group.refusals for group in groups],
            [group.tokens_in for group in groups],
            [group.tokens_out for group in groups],
            [group.estimated for group in groups],
            (b"[" + b",".join(self.events) + b"]").decode("utf-8") if self.events else None,
        )

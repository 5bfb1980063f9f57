"""A batch of usage: sums by day, key, route and model, and the events of single requests, encoded once."""

from __future__ import annotations

from datetime import date
from typing import Final

import orjson

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.model import Identity
from keyproxy.platform.decimal_text import decimal
from keyproxy.ports.exchange import Exchange
from keyproxy.store.postgres.array_text import array_text

#: Cached common parts of events per group; the cache is cleared when it is full.
_ALIKE_MAX: Final = 256

#: Identities whose groups are cached per batch; the cache is cleared when it is full.
_CACHED_MAX: Final = 10_000

#: A batch is divided into portions of about these sizes. The usage of half a second at 2,000 requests/s keeps a core of
#: the server busy for 10 ms, which delays requests of proxies on the same machine; a portion of it for 1 ms. The number
#: of portions is bounded, as each takes 0.2 ms of the proxy's CPU.
_PORTION_GROUPS: Final = 64
_PORTION_EVENT_BYTES: Final = 64 << 10
_PORTIONS_MAX: Final = 8

#: The place of the actor in the common part of an event: after the fields about models.
_ACTOR_PLACE: Final = 14

#: What the parts of events that are alike depend on: method, status, code, policy, client, and whether the fields about
#: tokens stand between the two parts.
_Alike = tuple[bytes, int, str, str, bytes, bool]

_EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()


class UsageGroup:
    """The exchanges of one day that share key, route and model."""

    __slots__ = (
        "alike",
        "cache_write",
        "cached",
        "cost_micros",
        "day",
        "estimated",
        "identity",
        "model",
        "reasoning",
        "refusals",
        "requests",
        "route",
        "tokens_in",
        "tokens_out",
    )  # fmt: skip

    def __init__(self, day: int, identity: Identity, route: str, model: str) -> None:
        self.day = day
        self.identity = identity
        self.route = route
        self.model = model
        self.requests = self.refusals = self.tokens_in = self.tokens_out = self.estimated = 0
        self.cached = self.cache_write = self.reasoning = self.cost_micros = 0
        #: The parts of an event that similar requests share; fields about tokens, if any, stand between them.
        self.alike: dict[_Alike, tuple[bytes, bytes]] = {}

    def add(self, exchange: Exchange) -> None:
        """Add an exchange to the sums."""
        if exchange.sent_mono:
            self.requests += 1
        elif exchange.reason is not None:
            self.refusals += 1
        use = exchange.token_use
        if use is not None:
            self.tokens_in += use.tokens_in
            self.tokens_out += use.tokens_out
            self.cached += use.cached
            self.cache_write += use.cache_write
            self.reasoning += use.reasoning
            self.cost_micros += exchange.cost_micros
            if exchange.is_estimated:
                self.estimated += use.tokens_in + use.tokens_out

    def event(self, exchange: Exchange, code: str, wall_offset: float) -> bytes:
        """One event as a JSON array, in the order in which the view keyproxy.usage_events reads it."""
        head, use, started, peer = exchange.head, exchange.token_use, exchange.started_mono, exchange.peer
        method = b"" if head is None else head.line.method
        client = b"" if peer is None else peer.recorded_address(head)
        key = (method, exchange.status, code, exchange.policy, client, use is not None)
        common, tail = self.alike.get(key) or self._alike(key)
        return b'[%b,"%b",%b%b%b,%b,%b,%b,%b,%b]' % (
            decimal(int((started + wall_offset) * 1_000)),
            exchange.request_id,
            common,
            b"" if use is None else _token_details(use, exchange.cost_micros),
            tail,
            decimal(exchange.bytes_in),
            decimal(exchange.bytes_out),
            decimal(int((exchange.ended_mono - started) * 1_000_000)),
            b"null,null" if use is None else b"%b,%b" % (decimal(use.tokens_in), decimal(use.tokens_out)),
            b"true" if exchange.is_estimated else b"false",
        )

    def _alike(self, key: _Alike) -> tuple[bytes, bytes]:
        # Clients can send any method, so this needs a bound.
        if len(self.alike) >= _ALIKE_MAX:
            self.alike.clear()
        who, (method, status, code, policy, client, has_tokens) = self.identity, key
        common: list[object] = [who.tenant_id, who.user_id, who.key_id, who.mode, self.route, method.decode("ascii")]
        common += [status, code]
        tail = _tail(who, client)
        if policy or self.model or has_tokens or tail:
            common.append(policy or None)
        if self.model or has_tokens:
            common.append(self.model)
        if has_tokens:
            parts = orjson.dumps(common)[:-1], b"".join([b",", orjson.dumps(tail)[1:]]) if tail else b"]"
        else:
            padding = [None] * (_ACTOR_PLACE - len(common)) if tail else []
            parts = orjson.dumps([*common, *padding, *tail]), b""
        self.alike[key] = parts
        return parts


def _token_details(use: TokenUse, cost_micros: int) -> bytes:
    """The fields about tokens in the middle of an event."""
    return b",%b,%b,%b,%b" % (
        decimal(use.cached), decimal(use.cache_write), decimal(use.reasoning), decimal(cost_micros),
    )  # fmt: skip


def _value(identity: Identity, route: str, model: str) -> tuple[str | None, ...]:
    """What the sums and the events of a group have in common."""
    token = identity.agent_token
    token_id = None if token is None else token.token_id
    return (
        identity.tenant_id, identity.user_id, identity.key_id, identity.mode, identity.actor_user_id, token_id,
        route, model,
    )  # fmt: skip


def _tail(identity: Identity, client: bytes) -> list[str | None]:
    """The end of the common part of an event: the actor, the agent, the token and the client, if there are any."""
    token = identity.agent_token
    agent_id, token_id = (None, None) if token is None else (token.agents[0], token.token_id)
    who = [identity.actor_user_id, agent_id, token_id]
    if client:
        return [*who, client.decode("ascii")]
    return [] if token is None and identity.actor_user_id is None else who


class UsageBatch:
    """The unit of writing. `events`: a JSON array of each request.

    `by_key` caches the groups of identities. An identity that is read again is another object, and so is each of those
    that a key is refused as; their groups are found by value.
    """

    __slots__ = ("_by_value", "by_key", "event_bytes", "events", "groups", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.groups: list[UsageGroup] = []
        self.by_key: dict[tuple[Identity, str, str], UsageGroup] = {}
        self._by_value: dict[tuple[str | None, ...], UsageGroup] = {}
        self.events: list[bytes] = []
        self.event_bytes = 0

    def existing(self, identity: Identity, route: str, model: str) -> UsageGroup | None:
        """The group of an identity, if there is one."""
        group = self._by_value.get(_value(identity, route, model))
        if group is not None:
            self._cache(identity, group)
        return group

    def group(self, day: int, identity: Identity, route: str, model: str) -> UsageGroup:
        """The group of an identity, a new one if there is none."""
        group = self.existing(identity, route, model)
        if group is None:
            group = self._by_value[_value(identity, route, model)] = UsageGroup(day, identity, route, model)
            self.groups.append(group)
            self._cache(identity, group)
        return group

    def forget_groups(self) -> None:
        """Begin a new group for each identity, since the day has changed."""
        self.by_key.clear()
        self._by_value.clear()

    def _cache(self, identity: Identity, group: UsageGroup) -> None:
        if len(self.by_key) >= _CACHED_MAX:
            self.by_key.clear()
        self.by_key[identity, group.route, group.model] = group

    def portions(self) -> list[UsageBatch]:
        """The batch as several smaller ones with consecutive numbers, or itself if it is small."""
        groups, events = self.groups, self.events
        count = max(-(-len(groups) // _PORTION_GROUPS), -(-self.event_bytes // _PORTION_EVENT_BYTES))
        if count <= 1:
            return [self]
        count = min(count, _PORTIONS_MAX)
        portions = []
        for place in range(count):
            portion = UsageBatch(self.number + place)
            portion.groups = groups[place * len(groups) // count : (place + 1) * len(groups) // count]
            portion.events = events[place * len(events) // count : (place + 1) * len(events) // count]
            portion.event_bytes = sum([len(event) for event in portion.events])
            portions.append(portion)
        return portions

    def columns(self) -> tuple[object, ...]:
        """The batch as the arguments of `record_usage`."""
        groups = self.groups
        return (
            self.number,
            array_text([date.fromordinal(group.day + _EPOCH_ORDINAL) for group in groups]),
            array_text([group.identity.tenant_id for group in groups]),
            array_text([group.identity.user_id for group in groups]),
            array_text([group.identity.key_id for group in groups]),
            array_text([group.identity.is_test for group in groups]),
            array_text([group.route for group in groups]),
            array_text([group.model for group in groups]),
            array_text([group.requests for group in groups]),
            array_text([group.refusals for group in groups]),
            array_text([group.tokens_in for group in groups]),
            array_text([group.tokens_out for group in groups]),
            array_text([group.estimated for group in groups]),
            array_text([group.cached for group in groups]),
            array_text([group.cache_write for group in groups]),
            array_text([group.reasoning for group in groups]),
            array_text([group.cost_micros for group in groups]),
            (b"[" + b",".join(self.events) + b"]").decode("utf-8") if self.events else None,
        )

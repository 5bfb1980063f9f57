"""Explain how a proxy would decide a request with a given key now, without such a request.

The same functions decide: the route table, `admission`, and the ledger's own `take` with its full time budget, over a
backend that responds as the real one would and writes nothing. So nothing is charged, reserved or recorded; units that
are idle in other proxies' leases are waited for, as a proxy without any leases does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from keyproxy.auth import authorization
from keyproxy.config import schema
from keyproxy.config.access_settings import access_rules
from keyproxy.config.tools.tool_rules import tool_table
from keyproxy.http import request_target
from keyproxy.limits import gcra
from keyproxy.limits.allowance import NO_SELECTION, Allowance, Hold, Need, applies, is_of_mode
from keyproxy.limits.calendar_windows import span
from keyproxy.limits.ledger.accounts import Holder, WindowAccount
from keyproxy.limits.ledger.rules import LedgerRules
from keyproxy.limits.ledger_protocol import (
    CONCURRENCY,
    SPEND,
    SPEND_PER_REQUEST,
    TOKEN_RATE,
    TOKENS,
    TOKENS_PER_REQUEST,
    LeaseGrant,
    LeaseReport,
    Pool,
    Window,
)
from keyproxy.limits.plan import PER_REQUEST, Limit, Plan
from keyproxy.model import NO_TOKENS, Identity, Missing, Moment, Route
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.approvals.explained_tool import CalledTool, ExplainedTool, called_tool, stated_tool
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.ledger.body_reservation import BodyReservation, RequestUrl, no_reservation, reservation_of
from keyproxy.store.ledger.explained_access import ExplainedAccess, OwnerReader, StatedValues
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.postgres_backend import WindowState
from keyproxy.store.ledger.select_backend import ledger_backend
from keyproxy.store.postgres.database import Database

_TOKENS: Final = (*TOKENS, TOKEN_RATE, TOKENS_PER_REQUEST)
_SPEND: Final = (*SPEND, SPEND_PER_REQUEST)

#: A route that needs no scope.
_ANY_ROUTE: Final = Route("")


class WindowReader(Protocol):
    """A source of the current state of windows."""

    async def windows(self, windows: Sequence[Window]) -> Sequence[WindowState | None]:
        """The current state of windows, in their order; None for a window that was never used."""
        ...


class Question(NamedTuple):
    """The request to explain. `path` empty: only the credential. `tokens`: the maximum that it may use; None if it does
    not state one.

    `spend`: what these may cost, in micro-units; None: the model has no price. `body`: read instead of both, on a route
    that counts tokens or judges what the body names; `model` then replaces the one that the request names.
    `categories`, `namespaces`: what the request would contain; see `StatedValues`. `act_for`: the user that the key acts
    for; None: its owner's requests are explained. `tool`: the name of the tool that it calls, where the route does not
    name it. `has_certificate`: a verified certificate of the client is on its connection.
    """

    method: str
    path: str
    tokens: int | None = None
    model: str = ""
    spend: int | None = 0
    body: bytes | None = None
    categories: tuple[str, ...] = ()
    namespaces: tuple[tuple[str, str], ...] = ()
    act_for: str | None = None
    tool: str = ""
    has_certificate: bool = False


class Explanation(NamedTuple):
    """The decision. `refusal` None: it would be forwarded. `limits`: the state of each, and whether it would refuse.

    `reservation`: what a body reserves, as `BodyReservation.shown` returns it. `access`: see `ExplainedAccess.shown` and
    `ExplainedTool.shown`.
    """

    route: str | None
    refusal: Refusal | None
    limits: Sequence[Mapping[str, Any]]
    reservation: Mapping[str, Any]
    access: Mapping[str, Any]


class DryBackend:
    """Reply as the ledger would, from the state of its windows, and change nothing. Implements LedgerBackend."""

    def __init__(self, windows: WindowReader, now: Callable[[], Moment]) -> None:
        self._windows = windows
        self._now = now
        self.seen: dict[Window, WindowState] = {}

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        """Apply the ledger's rules to the current state of the windows, with this holder as the only one."""
        states = await self.states([line.window for line in lines])
        now = self._now().wall_seconds
        rules = LedgerRules(lease_seconds=math.inf)
        # The holder's earlier grants exist only in its own reports.
        rules.holders[holder] = Holder(serial - 1, math.inf)
        for line, state in zip(lines, states, strict=True):
            rules.windows[line.window, span(line.window.measure, now)[0]] = WindowAccount(
                state.spent, state.held, state.forfeited, state.credited, now + state.ahead_seconds
            )
        replies = rules.sync(holder, serial, lines, now)
        if replies is None:
            return None
        # When the window ends is known by the ledger's clock. Start 0: every message is about the current window.
        return [
            reply._replace(starts=0, ends_seconds=state.ends_seconds)
            for reply, state in zip(replies, states, strict=True)
        ]

    async def states(self, windows: Sequence[Window]) -> Sequence[WindowState]:
        """The current state of windows; an unused one has its initial state."""
        found = await self._windows.windows(windows)
        wall = self._now().wall_seconds
        states = [
            WindowState(0, 0, 0, span(window.measure, wall)[1] - wall, 0.0) if state is None else state
            for window, state in zip(windows, found, strict=True)
        ]
        self.seen.update(zip(windows, states, strict=True))
        return states

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        """End no holder."""
        del portion
        return False

    async def forget(self, portion: int) -> bool:
        """Delete nothing."""
        del portion
        return False

    async def end(self, holder: str) -> None:
        """Do nothing: there is no holder."""

    async def close(self) -> None:
        """Do nothing: the caller closes the windows."""


async def explain_identity(
    database: Database,
    identity: Identity,
    question: Question,
    configured: schema.Settings,
    *,
    now: Callable[[], Moment],
) -> Explanation:
    """The decision on a request of this identity. Raises Invalid, StoreUnavailable."""
    windows = ledger_backend(database, configured.ledger)
    try:
        if not question.path:
            return await _explain_credential(identity, question, configured, windows, owners=database, now=now)
        return await explain(identity, question, configured, windows, owners=database, now=now)
    finally:
        await windows.close()


async def _explain_credential(
    identity: Identity,
    question: Question,
    configured: schema.Settings,
    windows: WindowReader,
    *,
    owners: OwnerReader,
    now: Callable[[], Moment],
) -> Explanation:
    """The decision as far as it depends on no route: on the credential itself, a tool, and its limits."""
    backend = DryBackend(windows, now)
    refusal, need = None, _need(question, None)
    tool = _explained_tool(question, stated_tool(tool_table(configured), question.tool))
    try:
        authorization.admit(identity, _ANY_ROUTE, now())
        tool.judge(identity, _ANY_ROUTE)
        if identity.allowance is not None:
            await _take(backend, identity.allowance, need, ledger=configured.ledger, now=now)
        await tool.require_approval(owners, identity, now())
    except Refusal as error:
        refusal = error
    limits = await _limits(identity.allowance, backend, need, refusal)
    access = ExplainedAccess(None, StatedValues(b""), identity)
    return Explanation(None, refusal, limits, no_reservation(), access.shown() | tool.shown())


def _explained_tool(question: Question, called: CalledTool | None) -> ExplainedTool:
    return ExplainedTool(called, has_certificate=question.has_certificate)


async def explain(
    identity: Identity,
    question: Question,
    configured: schema.Settings,
    windows: WindowReader,
    *,
    owners: OwnerReader,
    now: Callable[[], Moment],
) -> Explanation:
    """The decision on a request of this identity. Raises StoreUnavailable if the windows cannot be read, and Invalid."""
    backend = DryBackend(windows, now)
    route, need, refusal, reservation, hold = None, None, None, None, None
    of_body: Refusal | None = None
    access, tool = ExplainedAccess(None, StatedValues(b""), identity), _explained_tool(question, None)
    try:
        method = question.method.encode("ascii")
        table, path = configured.route_table(), question.path.encode("utf-8", "surrogateescape")
        target = request_target.judge(method, path, b"localhost", accepts_encoded_slash=table.forwards_encoded_slash)
        route = table.match(method, target.path)
        if route is not None and route.is_public:
            return Explanation(route.name, None, [], no_reservation(), access.shown() | tool.shown())
        try:
            reservation = _reservation(question, configured, route, identity.allowance)
        except Refusal as error:
            of_body = error
        need = _need(question, route) if reservation is None else reservation.need
        grant = authorization.admit(identity, route, now())
        called = called_tool(tool_table(configured), grant.route, question.tool, question.body)
        tool = _explained_tool(question, called)
        tool.judge(identity, grant.route)
        # In the order of a proxy: it reads the body, judges the request, and then reserves for it.
        if of_body is not None and of_body.reason is not Reason.OUTPUT_MAXIMUM_REQUIRED:
            raise of_body
        rules = access_rules(configured, table, None).get(grant.route)
        stated = StatedValues(target.target, question.model, question.categories, question.namespaces, question.body)
        access = ExplainedAccess(rules, stated, identity)
        await access.judge(owners)
        if of_body is not None:
            raise of_body
        if identity.allowance is not None:
            hold = await _take(backend, identity.allowance, need, ledger=configured.ledger, now=now)
        await tool.require_approval(owners, identity, now())
    except Refusal as error:
        refusal = error
    limits = await _limits(identity.allowance, backend, need, refusal)
    shown = no_reservation() if reservation is None else reservation.shown(hold)
    return Explanation(None if route is None else route.name, refusal, limits, shown, access.shown() | tool.shown())


def _reservation(
    question: Question, configured: schema.Settings, route: Route | None, limits: Allowance | None
) -> BodyReservation | None:
    """What the body reserves; None: none is given, or its route does not count tokens."""
    if question.body is None or route is None or route.tokens == NO_TOKENS:
        return None
    row = next(one for one in configured.routes if (one.name or one.match) == route.name)
    path, _, query = question.path.encode("utf-8", "surrogateescape").partition(b"?")
    target = RequestUrl(question.method.encode("ascii"), path, query)
    return reservation_of(configured, row, target, question.body, model=question.model, limits=limits)


async def _take(
    backend: DryBackend,
    allowance: Allowance,
    need: Need | None,
    *,
    ledger: schema.LedgerSettings,
    now: Callable[[], Moment],
) -> Hold | None:
    """Proceed as the gateway does: take, fetch what is missing, take again. Raises a Refusal."""
    taking = Ledger(backend, ledger, now)
    taking.start()
    try:
        try:
            hold: Hold | None = taking.take(allowance, now(), need)
        except Missing as missing:
            hold = await missing.fetch_and_decide(lambda: taking.take(allowance, now(), need), lambda: False)
        if hold is not None:
            taking.settle(hold, was_sent=False)
        return hold
    finally:
        await taking.close()


def _need(question: Question, route: Route | None) -> Need | None:
    tokens = question.tokens
    if tokens is None:
        tokens = 1 if route is not None and route.tokens != NO_TOKENS else 0
    spend, models = question.spend or 0, (question.model,) if question.model else ()
    name = "" if route is None else route.name
    return Need(tokens, tokens, spend, spend, route=name, models=models, is_priced=question.spend is not None)


async def _limits(
    allowance: Allowance | None, backend: DryBackend, need: Need | None, refusal: Refusal | None
) -> list[dict[str, Any]]:
    """The state of each limit at the decision, and whether it `refuses`."""
    pools = () if allowance is None else allowance.pools
    wanted = windows_of(pools)
    unseen = [window for window, _ in wanted if window not in backend.seen]
    if unseen:
        await backend.states(unseen)
    selection = NO_SELECTION if allowance is None else allowance.selection(need)
    limits: list[dict[str, Any]] = []
    for window, limit in wanted:
        one = window_state(window, limit, backend.seen[window])
        one["refuses"] = applies(limit, selection) and _needed(window.measure, need) > one["remaining"]
        limits.append({"owner": window.pool.owner, **one})
    for pool, plan in pools:
        for limit in plan.limits:
            if limit.per == PER_REQUEST and is_of_mode(limit, pool):
                window = Window(pool, limit.window_measure, limit.selector)
                refuses = applies(limit, selection) and _needed(window.measure, need) > limit.quota
                one = {"policy": window.policy, "selector": limit.selector, "limit": limit.quota}
                one |= {"remaining": limit.quota, "refuses": refuses}
                limits.append({"owner": pool.owner, **one})
    for one in limits:
        if refusal is not None and refusal.limit is not None and refusal.limit.policy.name == one["policy"]:
            one["refuses"] = True
    return limits


def _needed(measure: str, need: Need | None) -> int:
    """The units of a measure that a request needs at least."""
    if measure in _TOKENS:
        return 0 if need is None else need.tokens_least
    if measure in _SPEND:
        return 0 if need is None else need.spend_least
    return 1


def windows_of(pools: Sequence[tuple[Pool, Plan]]) -> list[tuple[Window, Limit]]:
    """The windows that limits of these plans count in."""
    return [
        (Window(pool, limit.window_measure, limit.selector), limit)
        for pool, plan in pools
        for limit in plan.limits
        if limit.per != PER_REQUEST and is_of_mode(limit, pool)
    ]


def window_state(window: Window, rule: Limit, state: WindowState) -> dict[str, Any]:
    """The state of one window, for display and JSON. Times in seconds from now; None if time does not change it."""
    if rule.is_rate:
        left = gcra.units_available(state.ahead_seconds, rule.quota, rule.interval_seconds)
        return {
            "policy": window.policy,
            "selector": window.selector,
            "limit": rule.quota,
            "per_second": rule.per_second,
            "remaining": max(0, left),
            "reset_seconds": round(state.ahead_seconds, 3),
        }
    shown: dict[str, Any] = {"policy": window.policy, "selector": window.selector, "limit": rule.quota}
    if window.measure == CONCURRENCY:
        shown["held"] = state.held
    else:
        shown |= {
            "credited": state.credited,
            "spent": state.spent,
            "held": state.held,
            "forfeited": state.forfeited,
        }
    shown["remaining"] = max(0, rule.quota + state.credited - state.spent - state.held)
    shown["reset_seconds"] = None if math.isinf(state.ends_seconds) else round(state.ends_seconds, 3)
    return shown

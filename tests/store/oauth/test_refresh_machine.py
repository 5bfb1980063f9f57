"""Whatever is refreshed, lost, crashed and delayed, the store decides like a model of the verdicts; so do two at once.

The model knows of each token when it was used, whether it was replaced, and its successors. After each step the rows of
the store are those of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import asyncpg
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.oauth.token_values import IssuedTokens, RefreshExchange
from keyproxy.store.postgres.database import Database, Row, StoreUnavailable, Transaction
from tests.store.harness import Sql
from tests.store.oauth.token_requests import CLIENT, WallClock, exchange, token_store
from tests.store.oauth_rows import add_code

_EXAMPLES = itertools.count(1)
_GRACE_SECONDS = 60
_LIFE_SECONDS = 30 * 86_400
_SUCCESSORS_MAX = 8

#: Each side of the grace, and nearly the life of a refresh token.
_PASSING = st.sampled_from([1.0, 59.0, 60.0, 61.0, 61.0, 61.0, 3600.0, 3600.0, _LIFE_SECONDS - 200.0])
_PLACES = st.integers(0, 1_000)


@dataclass
class _Token:
    """A token of the model. `used`: when, in seconds of the model."""

    issued: float
    used: float | None = None
    is_replaced: bool = False
    successors: list[int] = field(default_factory=list)


@dataclass
class _Model:
    """One session."""

    grace: int
    now: float = 0.0
    is_alive: bool = True
    tokens: list[_Token] = field(default_factory=lambda: [_Token(0.0)])

    def use(self, place: int) -> str:
        """Use a token. The verdict."""
        verdict = self._verdict(self.tokens[place])
        if verdict == "reuse":
            self.is_alive = False
        if verdict in ("rotate", "repeat", "replace"):
            token = self.tokens[place]
            if verdict != "repeat":
                token.used = self.now
                for successor in token.successors:
                    self.tokens[successor].is_replaced = True
            token.successors.append(len(self.tokens))
            self.tokens.append(_Token(self.now))
        return verdict

    def _verdict(self, token: _Token) -> str:
        if not self.is_alive or self.now - token.issued >= _LIFE_SECONDS:
            return "unknown"
        successors = [self.tokens[place] for place in token.successors]
        is_full = len(successors) >= _SUCCESSORS_MAX
        is_late = token.used is not None and self.now - token.used > self.grace
        if token.is_replaced or (is_late and (is_full or any(one.used is not None for one in successors))):
            return "reuse"
        if token.used is None:
            return "rotate"
        if self.grace == 0:
            return "reuse"
        if is_full:
            return "too many"
        return "replace" if is_late else "repeat"


#: An ended session is only used once more.
_is_alive = precondition(lambda machine: machine.model.is_alive)

#: What the client sees of a verdict.
_SEEN = {"unknown": "invalid_grant", "reuse": "invalid_grant", "too many": "temporarily_unavailable"}


class _CrashingTransaction(Transaction):
    """A transaction that breaks at its last statement."""

    async def fetch(self, name: str, *arguments: object) -> Any:
        rows = await super().fetch(name, *arguments)
        if name in ("issue_oauth_tokens", "end_oauth_session"):
            raise StoreUnavailable("the process has crashed")
        return rows


class _CrashingDatabase(Database):
    """A database whose transactions never commit."""

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with super().transaction() as begun:
            yield _CrashingTransaction(begun._connection, begun._statements, begun.where)


class _Store(NamedTuple):
    """Two processes and one that crashes, with the loop that they run on."""

    runner: asyncio.Runner
    databases: tuple[Database, Database]
    crashing: Database
    sql: Sql


class Refreshes(RuleBasedStateMachine):
    """One session of a client that loses replies, crashes, and shares its tokens between processes."""

    def __init__(self, store: _Store) -> None:
        super().__init__()
        self.store = store
        self.clock = WallClock()

    @initialize(grace=st.sampled_from([_GRACE_SECONDS, _GRACE_SECONDS, 0]))
    def begin(self, grace: int) -> None:
        """Redeem a code."""
        self.model = _Model(grace)
        changes: dict[str, Any] = {"refresh_grace_seconds": grace, "session_days": 3650}
        self.processes = [token_store(one, self.clock, **changes) for one in self.store.databases]
        self.crashing = token_store(self.store.crashing, self.clock, **changes)
        issued = self._run(self._redeemed())
        self.session = issued.session_id
        self.digests = [_digest(issued)]

    async def _redeemed(self) -> IssuedTokens:
        sql = self.store.sql
        await sql.execute("DELETE FROM keyproxy.oauth_sessions")
        return await self.processes[0].redeem(
            CLIENT, exchange(await add_code(sql, next(_EXAMPLES), expires="'infinity'"))
        )

    def _run(self, work: Any) -> Any:
        return self.store.runner.run(work)

    async def _used(self, process: int, place: int) -> IssuedTokens | str:
        try:
            return await self.processes[process].refresh(CLIENT, RefreshExchange(self.digests[place]))
        except OAuthError as error:
            return error.code

    @precondition(lambda machine: not machine.model.is_alive)
    @rule(place=_PLACES)
    def begin_again(self, place: int) -> None:
        """Nothing of an ended session works; the user signs in again."""
        self.use(place, 0)
        self.begin(self.model.grace)

    @_is_alive
    @rule(seconds=_PASSING)
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.model.now += seconds
        self.clock.advance(seconds)

    @_is_alive
    @rule(place=_PLACES, process=st.integers(0, 1))
    def use(self, place: int, process: int) -> None:
        """A client uses a token that it has or had."""
        place %= len(self.digests)
        verdict = self.model.use(place)
        event(verdict)
        seen = self._run(self._used(process, place))
        if isinstance(seen, str):
            assert seen == _SEEN.get(verdict, ""), verdict
        else:
            assert verdict in ("rotate", "repeat", "replace")
            self.digests.append(_digest(seen))

    @_is_alive
    @rule(place=st.integers(0, 3), times=st.sampled_from([1, 1, 1, 2, 9]))
    def use_recent(self, place: int, times: int) -> None:
        """A client uses one of its last tokens, and again if it loses the replies."""
        recent = max(0, len(self.digests) - 1 - place)
        for _ in range(times):
            self.use(recent, 0)

    @_is_alive
    @rule(place=_PLACES)
    def crash(self, place: int) -> None:
        """A process crashes within a refresh, which then has no effect."""
        shown = RefreshExchange(self.digests[place % len(self.digests)])
        with contextlib.suppress(OAuthError):
            try:
                self._run(self.crashing.refresh(CLIENT, shown))
            except StoreUnavailable:
                return
            raise AssertionError("the transaction has committed")

    @_is_alive
    @rule(first=_PLACES, second=_PLACES)
    def use_two_at_once(self, first: int, second: int) -> None:
        """Two processes use tokens at once: as if one came after the other."""
        places = first % len(self.digests), second % len(self.digests)
        seen = self._run(self._both(places))
        shown = [one if isinstance(one, str) else "" for one in seen]
        for order in ((0, 1), (1, 0)):
            model = copy.deepcopy(self.model)
            verdicts = {which: model.use(places[which]) for which in order}
            if [_SEEN.get(verdicts[which], "") for which in (0, 1)] == shown and self._fits(model, order, seen):
                self.model = model
                self.digests += [_digest(seen[which]) for which in order if not isinstance(seen[which], str)]
                return
        raise AssertionError(f"no order explains {shown}")

    async def _both(self, places: tuple[int, int]) -> list[IssuedTokens | str]:
        return list(await asyncio.gather(*(self._used(process, place) for process, place in enumerate(places))))

    def _fits(self, model: _Model, order: tuple[int, int], seen: list[IssuedTokens | str]) -> bool:
        """Whether the rows are those of the model after the uses in this order."""
        digests = self.digests + [_digest(one) for which in order if not isinstance(one := seen[which], str)]
        return bool(self._rows() == _expected(model, digests))

    def _rows(self) -> dict[bytes, tuple[bool, bool]]:
        rows: list[Row] = self._run(
            self.store.sql.fetch(
                "SELECT digest, used_at IS NOT NULL AS is_used, replaced_at IS NOT NULL AS is_replaced"
                " FROM keyproxy.oauth_refresh_tokens WHERE session_id = $1",
                self.session,
            )
        )
        return {row["digest"]: (row["is_used"], row["is_replaced"]) for row in rows}

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        """The refresh tokens of the session."""
        if hasattr(self, "session"):
            assert self._rows() == _expected(self.model, self.digests)


def _expected(model: _Model, digests: list[bytes]) -> dict[bytes, tuple[bool, bool]]:
    if not model.is_alive:
        return {}
    return {
        digest: (token.used is not None, token.is_replaced) for digest, token in zip(digests, model.tokens, strict=True)
    }


def _digest(issued: IssuedTokens | str) -> bytes:
    assert not isinstance(issued, str)
    assert issued.refresh_token is not None
    return issued.refresh_token.digest()


@pytest.fixture
def store(dsn: str) -> Iterator[_Store]:
    """The store over an empty database."""
    with asyncio.Runner() as runner:
        first, second = (Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0) for _ in range(2))
        databases = first, second
        crashing = _CrashingDatabase(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
        for database in (*databases, crashing):
            runner.run(database.open())
        sql: Sql = runner.run(asyncpg.connect(dsn))
        yield _Store(runner, databases, crashing, sql)
        runner.run(sql.close())
        for database in (*databases, crashing):
            runner.run(database.close())


def test_store_judges_refreshes_like_the_model_whatever_happens_at_once(store: _Store) -> None:
    class RefreshesInStore(Refreshes):
        def __init__(self) -> None:
            super().__init__(store)

    run_state_machine_as_test(
        RefreshesInStore,
        settings=settings(
            max_examples=6, stateful_step_count=14, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip

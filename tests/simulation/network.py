"""The ledger and its network, which loses, delays, duplicates and reorders messages and replies."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keyproxy.limits.ledger.rules import LateMessageError
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.ledger.charge_dedup import Answer, Claim, Cover
from keyproxy.store.postgres.database import StoreUnavailable
from tests.reference_claims import ReferenceClaims
from tests.reference_ledger import ReferenceLedger
from tests.simulation.clockwork import Clock, VirtualLoop

#: The database timeout of a proxy.
_TIMEOUT_SECONDS = 2.0
_FORGOTTEN_SECONDS = 10.0


@dataclass
class Weather:
    """How bad the network is: probabilities per message, seconds."""

    lost: float = 0.0
    answer_lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    late_seconds: float = 4.0
    delay_seconds: float = 0.004


class Network:
    """The network between the ledger and all processes."""

    def __init__(self, clock: Clock, chance: random.Random, ledger: ReferenceLedger, weather: Weather) -> None:
        self.clock, self.ledger, self.weather = clock, ledger, weather
        self.claims = ReferenceClaims(lambda: 1e9 + clock.now)
        self.is_down = False
        #: The latest history will be lost: a replica that does not receive it is about to be promoted.
        self.is_lagging = False
        self.after_message: Callable[[], None] = lambda: None
        self._chance = chance

    def send(self, call: Callable[[], Any], answer: Callable[[Any], None], *, is_cut: bool) -> None:
        """Call the ledger after a delay, and deliver the response after another one."""
        chance, weather = self._chance, self.weather
        for _ in range(2 if chance.random() < weather.doubled else 1):
            if is_cut or chance.random() < weather.lost:
                continue
            self.clock.at(self.clock.now + self._delay(), lambda: self._deliver(call, answer))

    def _deliver(self, call: Callable[[], Any], answer: Callable[[Any], None]) -> None:
        if self.is_down:
            return
        try:
            result = call()
        except (TimeoutError, LateMessageError):
            return
        self.after_message()
        if self._chance.random() >= self.weather.answer_lost:
            self.clock.at(self.clock.now + self._delay(), lambda: answer(result))

    def _delay(self) -> float:
        delay = self._chance.expovariate(1 / self.weather.delay_seconds)
        if self._chance.random() < self.weather.late:
            delay += self._chance.uniform(0, self.weather.late_seconds)
        return delay


class _Remote:
    """A server that one process reaches over the network."""

    def __init__(self, network: Network, loop: VirtualLoop) -> None:
        self._network, self._loop = network, loop
        #: A partition: no message of this process arrives, nor any response.
        self.is_cut = False
        self.is_dead = False

    async def _call(self, call: Callable[[], Any]) -> Any:
        reply = self._loop.create_future()

        def receive() -> Any:
            if self.is_dead and self._network.is_lagging:
                # It would be lost and never sent again: docs/ledger.md describes the cost.
                raise TimeoutError
            return call()

        def respond(result: Any) -> None:
            if not self.is_cut and not reply.done():
                self._loop.call_soon(settle, result)

        def settle(result: Any) -> None:
            if not reply.done():
                reply.set_result(result)

        def give_up() -> None:
            if not reply.done():
                reply.set_exception(StoreUnavailable("no response"))

        timer = self._loop.call_later(_TIMEOUT_SECONDS, give_up)
        self._network.send(receive, respond, is_cut=self.is_cut)
        try:
            return await reply
        finally:
            timer.cancel()


class RemoteClaims(_Remote):
    """The record of charges as one process reaches it. Implements ClaimStore."""

    async def claim(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        answers: Sequence[Answer] | None
        answers = await self._call(lambda: self._network.claims.hear(process, number, claims))
        return answers

    async def cover(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, Cover]:
        found: Mapping[bytes, Cover] = await self._call(lambda: self._network.claims.look(fingerprints))
        return found

    async def forget(self, portion: int) -> bool:
        """Nothing expires here."""
        del portion
        return False


class RemoteLedger(_Remote):
    """The ledger as one process reaches it. Implements the port LedgerBackend."""

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> list[LeaseGrant] | None:
        replies: list[LeaseGrant] | None = await self._call(lambda: self._network.ledger.sync(holder, serial, lines))
        return replies

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        del portion
        await self._call(self._network.ledger.reap)
        return False

    async def forget(self, portion: int) -> bool:
        """Forget ended holders: sooner than in production, but later than any message arrives.

        Does nothing after history was lost: claims of a process that was suspended before that would count twice, see
        docs/ledger.md.
        """
        del portion
        ledger = self._network.ledger
        await self._call(lambda: None if ledger.rules.has_lost_history else ledger.forget(_FORGOTTEN_SECONDS))
        return False

    async def end(self, holder: str) -> None:
        await self._call(lambda: self._network.ledger.end(holder))

    async def close(self) -> None:
        """Nothing to close."""

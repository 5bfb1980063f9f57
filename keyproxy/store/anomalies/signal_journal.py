"""Stores habits of keys and reports signals, in the background: see `decision.anomalies.watcher`.

Habits are learned in batches; the store decides whether one is new to its key. Signals are reported one by one, each in
one transaction with its event, its row of the audit log, and the suspension of its key. At most `_QUEUE_MAX` of both
wait; what exceeds that, or cannot be written because the store is unavailable, is dropped and counted. A habit that was
dropped is learned when the key is next used with it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from typing import Final

import orjson

from keyproxy.config.tools.anomaly_settings import SIGNALS, AnomalySettings
from keyproxy.ports.signals import MANY, Habit, Signal, Signals
from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.postgres.database import Database, Row, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_QUEUE_MAX: Final = 1_000
_BATCH_MAX: Final = 200

_TEND_SECONDS: Final = 600.0
_RETRY_SECONDS: Final = 60.0
_PORTION: Final = 1_000


class SignalJournal(Signals):
    """The queue of habits and signals, and the task that writes them. Implements the port Signals."""

    def __init__(self, database: Database) -> None:
        self.terms = AnomalySettings()
        #: Reported signals by kind, dropped ones, and suspensions that did not take place.
        self.reported = dict.fromkeys(SIGNALS, 0)
        self.dropped = self.withheld = 0
        self.lasting = BackgroundTask("signals")
        self.tending = Chore("anomalies", "delete old records of anomalies", portion=_PORTION)
        self._database = database
        self._habits: dict[tuple[str, str, bytes], Habit] = {}
        self._signals: deque[Signal] = deque()
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Start the background tasks."""
        self.lasting.start(self._write_forever)
        self.lasting.start(self._tend_forever, pause_seconds=_RETRY_SECONDS)

    async def close(self) -> None:
        """Write what is queued, if the store is available, and stop."""
        await self.lasting.end()
        await self.flush()

    def learn(self, habit: Habit) -> None:
        key = (habit.key_id, habit.kind, habit.value)
        if key not in self._habits and self._has_room():
            self._habits[key] = habit
            self._wake.set()

    def report(self, signal: Signal) -> None:
        if self._has_room():
            self._signals.append(signal)
            self._wake.set()

    def _has_room(self) -> bool:
        if len(self._habits) + len(self._signals) < _QUEUE_MAX:
            return True
        self.dropped += 1
        return False

    async def flush(self) -> None:
        """Write all that is queued. What cannot be written is dropped."""
        while self._habits or self._signals:
            taken = [self._habits.pop(key) for key in list(self._habits)[:_BATCH_MAX]]
            try:
                if taken:
                    await self._learn(taken)
                taken = []
                while self._signals:
                    await self._report(self._signals.popleft())
            except (StoreUnavailable, StoreConflict) as error:
                self.dropped += len(taken) or 1
                _log.debug("signals cannot be recorded, dropping them: %s", error)

    async def _learn(self, habits: list[Habit]) -> None:
        rows = await self._database.fetch(
            "learn_habits",
            [habit.key_id for habit in habits],
            [habit.kind for habit in habits],
            [habit.value.decode("utf-8") for habit in habits],
            self.terms.networks_max,
        )
        for row in rows:
            habit, outcome = habits[row["place"] - 1], row["outcome"]
            if outcome == "none":
                continue
            is_many = outcome.startswith(MANY.decode())
            habit.known.add(MANY if is_many else habit.value)
            if outcome in ("new", "many_new"):
                value = (MANY if is_many else habit.value).decode("utf-8")
                self._signals.append(Signal(habit.kind, habit.key_id, "", value, habit.client, {}, may_suspend=True))

    async def _report(self, signal: Signal) -> None:
        suspends = signal.may_suspend and signal.kind in self.terms.suspend
        rows: list[Row] = list(
            await self._database.fetch(
                "note_anomaly",
                signal.kind,
                signal.key_id,
                signal.network or None,
                signal.value,
                signal.client,
                orjson.dumps(dict(signal.observed)).decode(),
                self.terms.suspensions_per_hour_max if suspends else None,
                signal.shared_since,
                signal.baseline,
            )
        )
        outcome: str = rows[0]["outcome"]
        if outcome in ("known", "none"):
            return
        self.reported[signal.kind] += 1
        if outcome == "withheld":
            self.withheld += 1
        what = f"key {signal.key_id}" if signal.key_id is not None else f"network {signal.network}"
        _log.warning(
            "signal %s of %s%s%s", signal.kind, what, f": {signal.value}" if signal.value else "",
            {"suspended": "; the key is suspended", "withheld": "; its suspension is withheld"}.get(outcome, ""),
        )  # fmt: skip

    async def _write_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def tend(self, portion: int = _PORTION) -> bool:
        """Delete one portion. Return whether there may be more."""
        (row,) = await self._database.fetch("tend_anomalies", portion)
        return bool(row["is_more"])

    async def _tend_forever(self) -> None:
        pause = _TEND_SECONDS
        while True:
            # Not at the same time in all processes.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
            pause = _TEND_SECONDS if await self.tending.finish(self.tend) else _RETRY_SECONDS

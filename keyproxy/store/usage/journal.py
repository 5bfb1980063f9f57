"""Usage by key: collected in memory from finished exchanges, written in batches, each of which counts once.

    take    sum finished exchanges by (day, key, mode, route, model), and keep each as an event
    seal    turn what was collected into small numbered batches, each resent unchanged until its write is confirmed
    write   one statement, one transaction; the number of this process' last batch is stored with the sums

A batch whose response is lost is sent again under its number, and counts once. While the store is unavailable, exchanges
are added to the sums that wait already, so that memory grows with the number of keys and not of requests. A process that
dies loses what it collected since its last write: `settle_seconds` of attribution, never money. Limits are charged by the
ledger, independently of this module.

Requests without a known key are attributed to no key: they are counted in the metrics only.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from keyproxy.config import schema
from keyproxy.model import Identity, Moment
from keyproxy.ports.exchange import Exchange
from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.outage import Outage
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable
from keyproxy.store.usage.model_names import ModelNames
from keyproxy.store.usage.usage_batch import UsageBatch, UsageGroup

_log = logging.getLogger(__name__)

#: What was collected is sealed at either bound, before it is due.
_BATCH_GROUPS_MAX: Final = 5_000
_BATCH_EVENT_BYTES_MAX: Final = 1 << 20

#: How much may wait while the store is unavailable. If full, events and requests of further keys and routes are not
#: recorded, but counted in `dropped`. Sums that wait already go on being updated.
_WAITING_GROUPS_MAX: Final = 100_000
_WAITING_EVENT_BYTES_MAX: Final = 16 << 20

_TEND_SECONDS: Final = 1_800.0
_TEND_RETRY_SECONDS: Final = 10.0
_TEND_PORTION: Final = 2_000
_WINDOWS_PORTION: Final = 1_000
_RETRY_SECONDS: Final = 1.0

#: The pause between two batches, in which the server's core serves others. With many batches the pauses are shorter.
_PAUSE_SECONDS: Final = 0.005
_PAUSES_SHARE: Final = 0.125

_DAY_SECONDS: Final = 86_400

#: An exchange with its labels: route, mode, code.
Row = tuple[Exchange, str, str, str]


class UsageJournal:
    """Collect usage and write it in batches."""

    def __init__(
        self,
        database: Database,
        usage: schema.Usage,
        now: Callable[[], Moment],
        *,
        settle_seconds: float,
        server_ahead_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`server_ahead_seconds`: how far the ledger's clock is ahead of this one. Days are the ledger's."""
        self.counts = dict.fromkeys(("batches", "events", "failures"), 0)
        #: What was not recorded because too much was waiting.
        self.dropped = dict.fromkeys(("requests", "events"), 0)
        self.down_because = ""
        #: Logs outages of the store.
        self.outage = Outage("the store")
        self._database = database
        self._usage = usage
        self._settle_seconds = settle_seconds
        self._now = now
        self._server_ahead_seconds = server_ahead_seconds
        #: Bounds the model names of each user. Its listed names are those of the configuration.
        self.model_names = ModelNames()
        self._process = secrets.token_hex(8)
        self._batch = UsageBatch(1)
        self._sealed: deque[UsageBatch] = deque()
        self._sealed_groups = self._sealed_event_bytes = 0
        self._day = -1
        self._written_mono = now().mono_seconds
        self.lasting = BackgroundTask("usage")
        self.tending = Chore("usage", "delete old usage and windows", portion=_TEND_PORTION)
        self.sweeping = Chore("windows", "delete unused rates and slots", portion=_WINDOWS_PORTION)
        #: The last window that the sweep has visited.
        self._swept = 0

    def start(self) -> None:
        """Start the background tasks."""
        self.lasting.start(self._write_forever, self._note_failure)
        self.lasting.start(self._tend_forever, pause_seconds=_TEND_SECONDS)

    async def close(self) -> None:
        """Write everything. What cannot be written now is lost, and the loss is logged."""
        await self.lasting.end()
        await self.flush()
        if self._sealed:
            requests = sum(group.requests for batch in self._sealed for group in batch.groups)
            _log.error("lost the usage of %d requests: could not write it at shutdown: %s", requests, self.down_because)

    @property
    def pending_events(self) -> int:
        """The number of events that wait to be written."""
        return len(self._batch.events) + sum(len(batch.events) for batch in self._sealed)

    def unwritten_seconds(self) -> float:
        """The maximum age of unwritten usage; 0.0 if nothing waits."""
        is_waiting = bool(self._sealed or self._batch.groups)
        return self._now().mono_seconds - self._written_mono if is_waiting else 0.0

    # -- collecting

    def take(self, rows: Sequence[Row]) -> None:
        """Record finished exchanges. Never waits."""
        now = self._now()
        day = int((now.wall_seconds + self._server_ahead_seconds()) // _DAY_SECONDS)
        if day != self._day:
            self._day = day
            self._batch.forget_groups()
        by_key = self._batch.by_key
        records_events = self._usage.event_days > 0 and self._has_room_for(rows)
        wall_offset = now.wall_seconds - now.mono_seconds
        events = self._batch.events
        for exchange, route, _, code in rows:
            identity = exchange.identity
            if identity is None:
                continue
            model = exchange.model
            if model:
                model = exchange.model = self.model_names.kept(model, identity.user_id, day)
            group = by_key.get((identity, route, model))
            if group is None:
                group = self._group(identity, route, model)
                if group is None:
                    self.dropped["requests"] += 1
                    continue
            group.add(exchange)
            if records_events:
                event = group.event(exchange, code, wall_offset)
                events.append(event)
                self._batch.event_bytes += len(event)
        if len(self._batch.groups) >= _BATCH_GROUPS_MAX or self._batch.event_bytes >= _BATCH_EVENT_BYTES_MAX:
            self._seal()

    def _group(self, identity: Identity, route: str, model: str) -> UsageGroup | None:
        """The group of an identity that is new to this batch. None: there is none, and no room for another."""
        batch = self._batch
        if self._sealed_groups + len(batch.groups) < _WAITING_GROUPS_MAX:
            return batch.group(self._day, identity, route, model)
        return batch.existing(identity, route, model)

    def _has_room_for(self, rows: Sequence[Row]) -> bool:
        if self._sealed_event_bytes + self._batch.event_bytes < _WAITING_EVENT_BYTES_MAX:
            return True
        self.dropped["events"] += sum(exchange.identity is not None for exchange, *_ in rows)
        return False

    def _seal(self) -> None:
        batch = self._batch
        if batch.groups:
            portions = batch.portions()
            self._sealed.extend(portions)
            self._sealed_groups += len(batch.groups)
            self._sealed_event_bytes += batch.event_bytes
            self._batch = UsageBatch(batch.number + len(portions))

    # -- writing

    async def flush(self, *, is_paced: bool = False) -> None:
        """Write everything that has been collected so far, if the store is available. `is_paced`: pause in between."""
        for batch in self._to_write():
            try:
                await self._database.fetch("record_usage", self._process, *batch.columns())
            except StoreUnavailable as error:
                self._note_failure(error)
                return
            except StoreConflict as conflict:
                # A retry would be rejected every time, and block all later batches.
                requests = sum(group.requests + group.refusals for group in batch.groups)
                _log.error("the store rejected the usage of %d requests, dropping it: %s", requests, conflict)
                self.dropped["requests"] += requests
                self.dropped["events"] += len(batch.events)
            else:
                self.counts["batches"] += 1
                self.counts["events"] += len(batch.events)
                self._note_success()
            self._sealed.popleft()
            self._sealed_groups -= len(batch.groups)
            self._sealed_event_bytes -= batch.event_bytes
            if is_paced and self._sealed:
                share = self._settle_seconds * _PAUSES_SHARE / len(self._sealed)
                await asyncio.sleep(min(_PAUSE_SECONDS, share))

    def _to_write(self) -> Iterator[UsageBatch]:
        """The sealed batches, then the current one, sealed; each is repeated until the caller has removed it."""
        while self._sealed:
            yield self._sealed[0]
        self._seal()
        while self._sealed:
            yield self._sealed[0]

    def _note_failure(self, error: Exception) -> None:
        self.counts["failures"] += 1
        self.outage.met(f"usage cannot be written, retrying: {error or type(error).__name__}")
        self.down_because = str(error) or type(error).__name__

    def _note_success(self) -> None:
        self._written_mono = self._now().mono_seconds
        self.down_because = ""

    async def _write_forever(self) -> None:
        while True:
            await asyncio.sleep(max(self._settle_seconds, _RETRY_SECONDS if self.down_because else 0.0))
            if not (self._sealed or self._batch.groups):
                self._written_mono = self._now().mono_seconds
                continue
            await self.flush(is_paced=True)

    async def _tend_forever(self) -> None:
        """Prepare partitions for coming days, and delete expired ones."""
        while True:
            is_done = await self.tending.finish(self.tend)
            is_done = await self.sweeping.finish(self.sweep) and is_done
            await asyncio.sleep(_TEND_SECONDS if is_done else _TEND_RETRY_SECONDS)

    async def tend(self, portion: int = _TEND_PORTION) -> bool:
        """Clean up one portion. Return whether there is more."""
        usage = self._usage
        rows = await self._database.fetch("tend_usage", usage.event_days, usage.days, portion)
        return bool(rows[0]["is_more"])

    async def sweep(self, portion: int = _WINDOWS_PORTION) -> bool:
        """Delete unused windows among the next `portion` endless ones. Return whether to continue at once."""
        rows = await self._database.fetch("forget_windows", self._swept, portion)
        following: int | None = rows[0]["next"]
        self._swept = following or 0
        return following is not None and bool(rows[0]["gone"])

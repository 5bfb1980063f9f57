"""Read usage: sums for reports and billing, events for export.

Long results are read in pages by key, so that no transaction stays open and an interrupted export can be resumed. Events
are delivered at least once, each under an id that never changes; resuming after an id misses no event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final

import orjson

from keyproxy.problem_spec import Blame
from keyproxy.reasons import Reason
from keyproxy.store.directory.errors import Invalid
from keyproxy.store.postgres.database import Database, Row, StoreUnavailable
from keyproxy.store.postgres.json_values import read_json
from keyproxy.store.postgres.times import FIRST_DAY, day_text

_log = logging.getLogger(__name__)

#: What sums can be grouped by, in output order.
DIMENSIONS: Final = ("day", "tenant", "user", "key", "mode", "route", "model")
MEASURES: Final = (
    "requests", "refusals", "tokens_in", "tokens_out", "tokens_estimated", "tokens_cached", "tokens_cache_write",
    "tokens_reasoning", "cost_micros",
)  # fmt: skip

_ROWS: Final = 1_000
_EVENT_BATCHES: Final = 20
_HORIZON_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.05
_EVENT_ID = re.compile(r"([0-9a-f]{16}):(\d{1,18}):(\d{1,9})")

#: Clients whose use of a key is summed one by one, and the name for all others together.
ORIGINS_MAX: Final = 10_000
_OTHER_CLIENTS: Final = "other"
_ORIGIN_SUMS: Final = ("requests", "refusals", "tokens_in", "tokens_out")

#: The codes of requests that were not sent upstream, but for those that were cut off in the middle of the response.
_REFUSAL_CODES: Final = frozenset([reason.code for reason in Reason if reason.value.blame is not Blame.UPSTREAM])

#: The fields of the third element of an event in keyproxy.usage_event_batches: those that many events share. It ends
#: before what does not apply: the policy of a limit that refused, models and tokens, the actor, the agent, the client.
_ALIKE: Final = (
    "tenant", "user", "key", "mode", "route", "method", "status", "code", "policy", "model", "tokens_cached",
    "tokens_cache_write", "tokens_reasoning", "cost_micros", "actor_user_id", "agent_id", "agent_token_id", "client",
)  # fmt: skip


class NoSuchEventError(Invalid):
    """The event to resume after does not exist, or is no longer retained."""


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """What to read. All given conditions apply.

    `since` and `until`: aware times; the first is inclusive, the second exclusive. Sums cover whole days: every day that
    overlaps that time.
    """

    tenant: str | None = None
    user: str | None = None
    key: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def first_day(self) -> date | None:
        """The first day that is included."""
        return None if self.since is None else self.since.astimezone(UTC).date()

    @property
    def end_day(self) -> date | None:
        """The day after the last one that is included."""
        if self.until is None:
            return None
        until = self.until.astimezone(UTC)
        is_whole = until.time() == time.min
        # date.max has no following day.
        return until.date() if is_whole or until.date() == date.max else until.date() + timedelta(days=1)


class UsageReader:
    """Read sums and events. All methods raise StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def sums(self, wanted: UsageFilter, by: Sequence[str], limit: int) -> list[dict[str, Any]]:
        """Usage grouped by some of DIMENSIONS, in their order; at most `limit` rows."""
        rows = await self._database.fetch("usage_by", list(by), *_filters(wanted), limit)
        kept = [name for name in DIMENSIONS if name in by]
        return [_sum(row, kept) for row in rows]

    async def all_sums(self, wanted: UsageFilter) -> AsyncIterator[dict[str, Any]]:
        """All rows, in the order of days."""
        after: tuple[object, ...] = (FIRST_DAY, "", "", "", False, "", "")
        while rows := await self._database.fetch("usage_after", *after, *_filters(wanted), _ROWS):
            for row in rows:
                yield _sum(row, DIMENSIONS)
            last = rows[-1]
            after = (
                last["day"], last["tenant"], last["user"], last["key"], last["mode"] == "test", last["route"],
                last["model"],
            )  # fmt: skip

    async def events(self, wanted: UsageFilter, after: str | None = None) -> AsyncGenerator[dict[str, Any]]:
        """All events that have been written by now, in the order of writing; only those after the id `after`, if given.

        Raises NoSuchEventError.
        """
        serial, skipped = (0, 0) if after is None else await self._place(after)
        horizon = await self._horizon()
        # Events are written on the day of their end or later; one day of tolerance for clock differences.
        first = wanted.first_day or date.min
        first -= timedelta(days=first > date.min)
        start = serial - 1 if skipped else serial
        while rows := await self._database.fetch("event_batches", start, horizon, first, _EVENT_BATCHES):
            for row in rows:
                for place, event in _readable_events(row):
                    if row["serial"] == serial and place <= skipped:
                        continue
                    if _is_wanted(event, wanted):
                        yield event
            start = rows[-1]["serial"]

    async def origins(self, key_id: str, since: datetime) -> list[dict[str, Any]]:
        """Where a key was used since then: the sums of the events that are kept, by client, the latest client first.

        `client` None: it was not recorded. At most `ORIGINS_MAX` clients; the sums of all further ones are those of the
        client `other`.
        """
        found: dict[str | None, dict[str, Any]] = {}
        async with contextlib.aclosing(self.events(UsageFilter(key=key_id, since=since))) as events:
            async for event in events:
                client = event["client"]
                if client not in found and len(found) >= ORIGINS_MAX:
                    client = _OTHER_CLIENTS
                origin = found.setdefault(
                    client,
                    {"client": client, **dict.fromkeys(_ORIGIN_SUMS, 0), "first": event["time"], "last": event["time"]},
                )
                _add_to_origin(origin, event)
        return sorted(found.values(), key=lambda origin: str(origin["last"]), reverse=True)

    async def _place(self, event_id: str) -> tuple[int, int]:
        """The serial of the event's batch, and its place in that batch."""
        match = _EVENT_ID.fullmatch(event_id)
        rows = await self._database.fetch("event_batch_serial", match[1], int(match[2])) if match else []
        if match is None or not rows:
            raise NoSuchEventError(f"there is no event {event_id!r}, or it is no longer retained")
        return rows[0]["serial"], int(match[3])

    async def _horizon(self) -> int:
        """The serial up to which batches are complete: serials are assigned before transactions commit."""
        row = (await self._database.fetch("event_horizon"))[0]
        deadline = asyncio.get_running_loop().time() + _HORIZON_SECONDS
        while not (await self._database.fetch("have_all_ended", row["not_begun"]))[0]["have_ended"]:
            if asyncio.get_running_loop().time() > deadline:
                raise StoreUnavailable(
                    "timeout: a transaction that may have written events is still open; try again later"
                )
            await asyncio.sleep(_LOOK_SECONDS)
        newest: int = row["newest"]
        return newest


def _add_to_origin(origin: dict[str, Any], event: Mapping[str, Any]) -> None:
    origin["refusals" if event["code"] in _REFUSAL_CODES else "requests"] += 1
    origin["tokens_in"] += event["tokens_in"] or 0
    origin["tokens_out"] += event["tokens_out"] or 0
    origin["first"] = min(origin["first"], event["time"])
    origin["last"] = max(origin["last"], event["time"])


def _filters(wanted: UsageFilter) -> tuple[object, ...]:
    return wanted.tenant, wanted.user, wanted.key, wanted.first_day, wanted.end_day


def _sum(row: Row, dimensions: Sequence[str]) -> dict[str, Any]:
    sums: dict[str, Any] = {name: row[name] for name in dimensions}
    if "day" in sums:
        sums["day"] = day_text(sums["day"])
    return sums | {name: int(row[name]) for name in MEASURES}


def _readable_events(row: Row) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events of a batch with their places. Invalid entries written by other programs are skipped."""
    batch = f"{row['process']}:{row['batch']}"
    events = read_json(row["events"])
    for place, entry in enumerate(events if isinstance(events, list) else [], start=1):
        try:
            event = _event(f"{batch}:{place}", entry)
            orjson.dumps(event)  # fails for half of a surrogate pair, which no JSON response can contain
        except (ValueError, TypeError, ArithmeticError, OSError) as error:
            _log.warning("skipping invalid usage event %s:%d: %s", batch, place, error)
        else:
            yield place, event


def _event(event_id: str, entry: Sequence[Any]) -> dict[str, Any]:
    started_ms, request_id, alike, bytes_in, bytes_out, micros, tokens_in, tokens_out, estimated = entry
    when = datetime.fromtimestamp(started_ms // 1_000, UTC).replace(microsecond=started_ms % 1_000 * 1_000)
    return {
        "id": event_id,
        "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": request_id,
        **dict.fromkeys(_ALIKE),
        **dict(zip(_ALIKE, alike, strict=False)),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "estimated": estimated,
        "request_bytes": bytes_in,
        "response_bytes": bytes_out,
        "duration_seconds": micros / 1_000_000,
    }


def _is_wanted(event: dict[str, Any], wanted: UsageFilter) -> bool:
    for name in ("tenant", "user", "key"):
        value = getattr(wanted, name)
        if value is not None and event[name] != value:
            return False
    when = datetime.fromisoformat(event["time"])
    return (wanted.since is None or when >= wanted.since) and (wanted.until is None or when < wanted.until)

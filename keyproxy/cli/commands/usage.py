"""keyproxy usage show|windows|export."""

from __future__ import annotations

import csv
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click
import orjson

from keyproxy.cli.commands.keys.explain import LIMIT_COLUMNS
from keyproxy.cli.context import Call, Progress, say, takes_call
from keyproxy.cli.options import instant
from keyproxy.store.usage.usage_queries import DIMENSIONS, MEASURES, UsageFilter
from keyproxy.store.usage.usage_service import UsageOperations

_ROWS_MAX: Final = 10_000
_USUAL_DAYS: Final = 30
_FLUSHED_ROWS: Final = 500
_EVENT_COLUMNS: Final = (
    "id", "time", "request_id", "tenant", "user", "key", "mode", "route", "method", "status", "code", "tokens_in",
    "tokens_out", "estimated", "request_bytes", "response_bytes", "duration_seconds", "policy",
)  # fmt: skip


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--until", callback=instant, metavar="WHEN", help="Before that: a time, or 7d for so long ago."),
        click.option("--since", callback=instant, metavar="WHEN", help="From then on: 2026-01-31, …T12:00Z, or 7d."),
        click.option("--key", metavar="KEY", help="Of this key."),
        click.option("--user", metavar="USER", help="Of this user."),
        click.option("--tenant", metavar="TENANT", help="Of this tenant."),
    ):
        command = option(command)
    return command


@click.group("usage")
def usage_group() -> None:
    """Show usage per user, and the state of limit windows."""


@usage_group.command("show", short_help="Show requests, refusals and tokens.")
@_filters
@click.option("--day", callback=instant, metavar="DAY", help="On this day, UTC: 2026-01-31.")
@click.option("--by", multiple=True, type=click.Choice(DIMENSIONS), help="Sum by this; repeatable. Default: by all.")
@takes_call
def usage_show(call: Call, day: datetime | None, by: tuple[str, ...], **wanted: Any) -> None:
    """Show requests, refusals and tokens, of the last 30 days if no time is said.

    Requests are those that were sent upstream, refusals those that were charged nothing. Days are UTC. Written every
    [ledger] settle_seconds.

    \b
    keyproxy usage show --tenant acme --by user --since 2026-01-01
    keyproxy usage show --user u_42 --day 2026-01-31
    """
    which = UsageFilter(**wanted)
    if day is not None:
        if which.since or which.until:
            raise click.UsageError("give --day, or --since and --until")
        start = day.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        which = replace(which, since=start, until=start + timedelta(days=1))
    elif not (which.since or which.until):
        which = replace(which, since=datetime.now(UTC) - timedelta(days=_USUAL_DAYS))
    chosen = [name for name in DIMENSIONS if name in (by or DIMENSIONS)]
    rows = call.run_usage(lambda usage: usage.sums(which, chosen, _ROWS_MAX))
    call.tell(rows, (*chosen, *MEASURES))
    if len(rows) == _ROWS_MAX:
        say(f"these are the first {_ROWS_MAX} rows: ask for less, or use `keyproxy usage export`")


@usage_group.command("windows", short_help="Show how the limits of a user and its tenant stand.")
@click.option("--user", required=True, metavar="USER", help="Its limits and its tenant's.")
@click.option("--test", "is_test", is_flag=True, help="Of test traffic.")
@takes_call
def usage_windows(call: Call, user: str, *, is_test: bool) -> None:
    """Show how the limits of a user and its tenant stand: spent, held by proxies, remaining, when they reset.

    Forfeited is the part of what is spent that was charged because a proxy died with it.

    \b
    keyproxy usage windows --user u_42
    """
    call.tell(call.run_usage(lambda usage: usage.windows(user, is_test=is_test)), LIMIT_COLUMNS)


@usage_group.command("export", short_help="Write sums or events to stdout.")
@_filters
@click.option("--format", "form", type=click.Choice(("jsonl", "csv", "cloudevents")), default="jsonl",
              show_default=True, help="CloudEvents 1.0 are one per request, as with --events.")  # fmt: skip
@click.option("--events", "is_of_events", is_flag=True, help="One row per request, as long as usage.event_days says.")
@click.option("--after", metavar="ID", help="Only events after the one with this id: to go on where an export ended.")
@takes_call
def usage_export(call: Call, form: str, after: str | None, *, is_of_events: bool, **wanted: Any) -> None:
    """Write usage to stdout: sums by day, tenant, user, key, mode and route, or with --events each request.

    Events come in the order in which they were written; each has an id that never changes. Whoever goes on with --after
    and the last id gets all that came since, and may get some again: drop what has an id that is known.

    \b
    keyproxy usage export --format csv --since 2026-01-01 --until 2026-02-01
    keyproxy usage export --events --after 0123456789abcdef:41:7
    """
    which, is_of_events = UsageFilter(**wanted), is_of_events or form == "cloudevents"
    if after is not None and not is_of_events:
        raise click.UsageError("--after is for --events")

    async def work(usage: UsageOperations) -> int:
        if is_of_events:
            return await _write(usage.events(which, after), form, _EVENT_COLUMNS)
        return await _write(usage.all_sums(which), form, (*DIMENSIONS, *MEASURES))

    call.run_usage(work)


async def _write(rows: AsyncIterator[Mapping[str, Any]], form: str, columns: Iterable[str]) -> int:
    """Write rows as they come; how many there were."""
    names, count, progress = tuple(columns), 0, Progress("rows")
    table = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    if form == "csv":
        table.writeheader()
    try:
        async with aclosing(rows):  # type: ignore[type-var]
            async for row in rows:
                if form == "csv":
                    table.writerow(row)
                else:
                    told = _cloud_event(row) if form == "cloudevents" else row
                    sys.stdout.write(orjson.dumps(told).decode("utf-8") + "\n")
                count += 1
                if count % _FLUSHED_ROWS == 0:
                    sys.stdout.flush()
                    progress.at(count)
    finally:
        sys.stdout.flush()
        progress.end()
    return count


def _cloud_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """CloudEvents 1.0, JSON format. `source` and `id` together are unique; the process is part of the id."""
    content = {name: value for name, value in event.items() if name not in ("id", "time")}
    return {
        "specversion": "1.0",
        "id": event["id"],
        "source": "/keyproxy",
        "type": "keyproxy.request.ended",
        "subject": event["user"],
        "time": event["time"],
        "datacontenttype": "application/json",
        "data": content,
    }

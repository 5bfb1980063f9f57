"""keyproxy usage show|windows|export, and the commands of `credit`."""

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

from keyproxy.cli.commands.credit import usage_adjust, usage_credit
from keyproxy.cli.commands.keys.explain import LIMIT_COLUMNS, shown_limits
from keyproxy.cli.context import Call, takes_call
from keyproxy.cli.output import Progress, print_message
from keyproxy.cli.parameters import instant
from keyproxy.limits.limit_text import money_text
from keyproxy.store.usage.usage_queries import DIMENSIONS, MEASURES, UsageFilter
from keyproxy.store.usage.usage_service import UsageOperations

_ROWS_MAX: Final = 10_000
_USUAL_DAYS: Final = 30
_FLUSHED_ROWS: Final = 500
_SHOWN_MEASURES: Final = (*(name for name in MEASURES if name not in ("tokens_cache_write", "cost_micros")), "cost")
_EVENT_COLUMNS: Final = (
    "id", "time", "request_id", "tenant", "user", "key", "mode", "route", "method", "status", "code", "tokens_in",
    "tokens_out", "estimated", "request_bytes", "response_bytes", "duration_seconds", "policy", "model",
    "tokens_cached", "tokens_cache_write", "tokens_reasoning", "cost_micros", "actor_user_id", "agent_id",
    "agent_token_id", "client",
)  # fmt: skip


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--until",
            callback=instant,
            metavar="WHEN",
            help="End, exclusive: 2026-01-31, 2026-01-31T12:00Z, or 7d (7 days ago).",
        ),
        click.option(
            "--since",
            callback=instant,
            metavar="WHEN",
            help="Start, inclusive: 2026-01-31, 2026-01-31T12:00Z, or 7d (7 days ago).",
        ),
        click.option("--key", metavar="KEY", help="Only this key."),
        click.option("--user", metavar="USER", help="Only this user."),
        click.option("--tenant", metavar="TENANT", help="Only this tenant."),
    ):
        command = option(command)
    return command


@click.group("usage", short_help="Show usage and limit windows, and credit windows.")
def usage_group() -> None:
    """Show usage per user and the state of limit windows, and change the limits of windows."""


usage_group.add_command(usage_credit)
usage_group.add_command(usage_adjust)


@usage_group.command("show", short_help="Show requests, refusals and tokens.")
@_filters
@click.option("--day", callback=instant, metavar="DAY", help="Only this UTC day: 2026-01-31.")
@click.option("--by", multiple=True, type=click.Choice(DIMENSIONS), help="Group by this; repeatable. [all of them]")
@takes_call
def usage_show(call: Call, day: datetime | None, by: tuple[str, ...], **wanted: Any) -> None:
    """Show requests, refusals, tokens and cost; the last 30 days by default.

    Requests were sent upstream; refusals were not charged. Cached and reasoning tokens are parts of tokens in and out.
    Days are UTC. Proxies write usage every [ledger] settle_seconds.

    \b
    keyproxy usage show --tenant acme --by user --since 2026-01-01
    keyproxy usage show --user u_42 --day 2026-01-31
    keyproxy usage show --tenant acme --by model
    """
    which = UsageFilter(**wanted)
    if day is not None:
        if which.since or which.until:
            raise click.UsageError("pass either --day, or --since and --until")
        start = day.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        which = replace(which, since=start, until=start + timedelta(days=1))
    elif not (which.since or which.until):
        which = replace(which, since=datetime.now(UTC) - timedelta(days=_USUAL_DAYS))
    chosen = [name for name in DIMENSIONS if name in (by or DIMENSIONS)]
    rows = call.run_usage(lambda usage: usage.sums(which, chosen, _ROWS_MAX))
    shown = rows if call.as_json else [{**row, "cost": money_text(row["cost_micros"])} for row in rows]
    call.print_result(shown, (*chosen, *_SHOWN_MEASURES), units={} if call.as_json else {"cost": call.money_unit})
    if len(rows) == _ROWS_MAX:
        print_message(f"these are the first {_ROWS_MAX} rows: narrow the filters, or use `keyproxy usage export`")


@usage_group.command("windows", short_help="Show the state of the limits of a user, its tenant and its agents.")
@click.option("--user", required=True, metavar="USER", help="Show the limits of this user, its tenant and its agents.")
@click.option("--test", "is_test", is_flag=True, help="Show the limits of test traffic.")
@takes_call
def usage_windows(call: Call, user: str, *, is_test: bool) -> None:
    """Show the state of limits: spent, held by proxies, remaining, and the reset time.

    They are those of the user, its tenant, its agents, and their live tokens (the 1,000 that expire last). Budgets of
    tokens never reset.

    Credited is added to the limit of this window alone. Forfeited is the part of spent that was charged because a proxy
    died while holding it.

    \b
    keyproxy usage windows --user u_42
    """
    limits = call.run_usage(lambda usage: usage.windows(user, is_test=is_test))
    call.print_result(limits if call.as_json else shown_limits(limits, call.money_unit), LIMIT_COLUMNS)


@usage_group.command("export", short_help="Write usage totals or events to stdout.")
@_filters
@click.option(
    "--format",
    "form",
    type=click.Choice(("jsonl", "csv", "cloudevents")),
    default="jsonl",
    show_default=True,
    help="cloudevents: CloudEvents 1.0, one per request, as with --events.",
)
@click.option("--events", "is_of_events", is_flag=True, help="One row per request, for the last usage.event_days days.")
@click.option("--after", metavar="ID", help="Only events after this id, to resume an export.")
@takes_call
def usage_export(call: Call, form: str, after: str | None, *, is_of_events: bool, **wanted: Any) -> None:
    """Write usage to stdout: totals by day, tenant, user, key, mode, route and model, or each request with --events.

    Events are in the order of writing, and each has an id that never changes. To resume, pass the last id with --after:
    the export contains every later event and may repeat some, so drop ids that you already have.

    \b
    keyproxy usage export --format csv --since 2026-01-01 --until 2026-02-01
    keyproxy usage export --events --after 0123456789abcdef:41:7
    """
    which, is_of_events = UsageFilter(**wanted), is_of_events or form == "cloudevents"
    if after is not None and not is_of_events:
        raise click.UsageError("--after requires --events")

    async def work(usage: UsageOperations) -> int:
        if is_of_events:
            return await _write(usage.events(which, after), form, _EVENT_COLUMNS)
        return await _write(usage.all_sums(which), form, (*DIMENSIONS, *MEASURES))

    call.run_usage(work)


async def _write(rows: AsyncIterator[Mapping[str, Any]], form: str, columns: Iterable[str]) -> int:
    """Write rows as they arrive. Returns their number."""
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
                    line = _cloud_event(row) if form == "cloudevents" else row
                    sys.stdout.write(orjson.dumps(line).decode("utf-8") + "\n")
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

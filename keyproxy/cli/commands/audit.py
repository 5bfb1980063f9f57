"""keyproxy audit list|export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
import orjson

from keyproxy.cli.context import PAGE, Call, Progress, say, takes_call
from keyproxy.cli.options import Failure, instant
from keyproxy.store.directory.audit import ACTIONS, ENTITIES
from keyproxy.store.directory.directory import AuditFilter, Entity
from keyproxy.store.directory.interface import Operations

_COLUMNS: Final = ("id", "at", "actor", "origin", "db_role", "action", "entity", "entity_id", "tenant", "changed")
_TAIL_BYTES: Final = 1 << 20
_ROW_START: Final = b'{"id":'


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--until", callback=instant, metavar="WHEN", help="Before that: a time, or 7d for so long ago."),
        click.option("--since", callback=instant, metavar="WHEN", help="From then on: 2026-01-31, …T12:00Z, or 7d."),
        click.option("--action", type=click.Choice(ACTIONS), help="What was done."),
        click.option("--actor", metavar="WHO", help="By whom, as the log writes it: cli:ann, sql:app."),
        click.option("--tenant", metavar="TENANT", help="About this tenant, its users and its keys."),
        click.option("--id", "entity_id", metavar="ID", help="About the thing with this id."),
        click.option(
            "--entity", type=click.Choice(ENTITIES), help="About this kind of thing; token: of the admin API."
        ),
    ):
        command = option(command)
    return command


@click.group("audit", short_help="The audit log: every change, before and after.")
def audit_group() -> None:
    """The audit log: every change, by whom, from where, before and after."""


@audit_group.command("list")
@_filters
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="At most so many.")
@takes_call
def audit_list(call: Call, limit: int, **wanted: Any) -> None:
    """List what was changed, the newest first.

    \b
    keyproxy audit list --tenant acme --since 7d
    keyproxy audit list --entity key --id key_…
    """

    async def work(directory: Operations) -> list[Entity]:
        found: list[Entity] = []
        cursor: str | None = None
        while True:
            page = await directory.audit(cursor, min(PAGE, limit - len(found)), AuditFilter(**wanted))
            found += page.items
            cursor = page.next
            if cursor is None or len(found) >= limit:
                return found

    call.tell(call.run(work), _COLUMNS)


@audit_group.command("export", short_help="Write changes as JSON lines, the oldest first.")
@_filters
@click.option("--after", type=click.IntRange(0, 2**53), metavar="N", help="Only rows with an id greater than N.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Add to this file, after the last row that is in it. Without it: stdout.")  # fmt: skip
@takes_call
def audit_export(call: Call, after: int | None, output: Path | None, **wanted: Any) -> None:
    """Write what was changed as JSON lines, the oldest first, complete up to now.

    Interrupted or run again with the same --output it goes on after the last row that was written. If the log does not
    have that row, as when the database was restored from a backup, it says so: begin another file then.

    \b
    keyproxy audit export --output audit.jsonl
    """
    wish = AuditFilter(**wanted)
    if output is None:
        call.run(lambda directory: _export(directory, after or 0, wish, sys.stdout.buffer))
        return
    with output.open("ab+") as file:
        last = _last_row(file, output) if after is None else None
        try:
            count = call.run(
                lambda directory: _export(directory, after or 0, wish, file, last=last)
            )  # fmt: skip
        except _OtherHistoryError as error:
            raise Failure(
                f"{output}: its last row is not in this log, which is another database's, was restored from a backup, or"
                " is asked for other rows: begin another file"
            ) from error
    say(f"{count} rows added to {output}")


class _OtherHistoryError(Exception):
    """The row to go on after is not there."""


async def _export(
    directory: Operations, after: int, wanted: AuditFilter, file: BinaryIO, *, last: Entity | None = None
) -> int:
    """`last`: the row to go on after, in place of `after`."""
    horizon = await directory.audit_horizon()
    progress, count = Progress("rows"), 0
    cursor = str(after) if last is None else str(last["id"] - 1)
    try:
        while (page := await directory.audit_export(cursor, PAGE, wanted, horizon=horizon)).items:
            cursor = str(page.items[-1]["id"])
            rows = page.items
            if last is not None:
                # Files begun before a column existed can be continued: a missing value was null.
                if rows[0] != dict.fromkeys(rows[0]) | last:
                    raise _OtherHistoryError
                rows, last = rows[1:], None
            file.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
            file.flush()
            count += len(rows)
            progress.at(count)
    finally:
        progress.end()
    if last is not None:
        raise _OtherHistoryError
    return count


def _last_row(file: BinaryIO, path: Path) -> Entity | None:
    """The last whole row of a file, which is cut off behind it: a row may have been written in part."""
    size = file.seek(0, 2)
    start = max(0, size - _TAIL_BYTES)
    file.seek(start)
    tail = file.read()
    whole = tail[: tail.rfind(b"\n") + 1]
    try:
        last: Entity | None = orjson.loads(whole[:-1].rpartition(b"\n")[2]) if whole else None
        if last is not None and not isinstance(last["id"], int):
            raise TypeError("an id is a number")
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{path}: its last line is no row of the audit log") from error
    cut = tail[len(whole) :]
    if cut and not (cut.startswith(_ROW_START[: len(cut)]) and start + len(whole) < size):
        raise Failure(f"{path}: it ends with something that is no row of the audit log")
    file.truncate(start + len(whole))
    return last

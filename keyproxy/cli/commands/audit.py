"""keyproxy audit list|export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
import orjson

from keyproxy.cli.context import PAGE, Call, takes_call
from keyproxy.cli.output import Failure, Progress, print_message
from keyproxy.cli.parameters import instant
from keyproxy.store.directory.audit import ACTIONS, ENTITIES
from keyproxy.store.directory.directory import AuditFilter, Entity
from keyproxy.store.directory.interface import DirectoryOperations

_COLUMNS: Final = ("id", "at", "actor", "origin", "db_role", "action", "entity", "entity_id", "tenant", "changed")
_TAIL_BYTES: Final = 1 << 20
_ROW_START: Final = b'{"id":'


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
        click.option("--action", type=click.Choice(ACTIONS), help="Only this action."),
        click.option(
            "--db-role", metavar="ROLE", help="Only changes by connections that logged in to the database as this role."
        ),
        click.option("--actor", metavar="ACTOR", help="Only this actor, as the log writes it: cli:ann, sql:app."),
        click.option("--tenant", metavar="TENANT", help="Only this tenant, its users and its keys."),
        click.option("--id", "entity_id", metavar="ID", help="Only the object with this id."),
        click.option(
            "--entity", type=click.Choice(ENTITIES), help="Only this kind of object; token: an admin API token."
        ),
    ):
        command = option(command)
    return command


@click.group("audit", short_help="Show or export the audit log.")
def audit_group() -> None:
    """Show or export the audit log: every change, with its actor, origin, and the values before and after."""


@audit_group.command("list")
@_filters
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="Maximum number of rows."
)
@takes_call
def audit_list(call: Call, limit: int, **wanted: Any) -> None:
    """List changes, newest first.

    \b
    keyproxy audit list --tenant acme --since 7d
    keyproxy audit list --entity key --id key_…
    """

    async def work(directory: DirectoryOperations) -> list[Entity]:
        found: list[Entity] = []
        cursor: str | None = None
        while True:
            page = await directory.audit.list_newest(cursor, min(PAGE, limit - len(found)), AuditFilter(**wanted))
            found += page.items
            cursor = page.next
            if cursor is None or len(found) >= limit:
                return found

    call.print_result(call.run(work), _COLUMNS)


@audit_group.command("export", short_help="Write changes as JSON lines, oldest first.")
@_filters
@click.option("--after", type=click.IntRange(0, 2**53), metavar="N", help="Only rows with an id greater than N.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Append to this file, starting after its last row; - is stdout. [stdout]",
)
@takes_call
def audit_export(call: Call, after: int | None, output: Path | None, **wanted: Any) -> None:
    """Write changes as JSON lines, oldest first, complete up to now.

    With --output, a repeated or interrupted export resumes after the last row in the file. If the log does not contain
    that row, for example after a restore from a backup, the command fails: export to a new file then.

    \b
    keyproxy audit export --output audit.jsonl
    """
    wish = AuditFilter(**wanted)
    if output is None or str(output) == "-":
        call.run(lambda directory: _export(directory, after or 0, wish, sys.stdout.buffer))
        return
    with output.open("ab+") as file:
        last = _last_row(file, output) if after is None else None
        try:
            count = call.run(lambda directory: _export(directory, after or 0, wish, file, last=last))
        except _OtherHistoryError as error:
            raise Failure(
                f"{output}: the audit log does not contain its last row: the file is from another database, from before a"
                " restore, or was exported with other filters. Export to a new file"
            ) from error
    print_message(f"{count} rows added to {output}")


class _OtherHistoryError(Exception):
    """The row to resume after is not in the log."""


async def _export(
    directory: DirectoryOperations, after: int, wanted: AuditFilter, file: BinaryIO, *, last: Entity | None = None
) -> int:
    """`last`: the row to resume after; replaces `after`."""
    horizon = await directory.audit.horizon()
    progress, count = Progress("rows"), 0
    cursor = str(after) if last is None else str(last["id"] - 1)
    try:
        while (page := await directory.audit.export(cursor, PAGE, wanted, horizon=horizon)).items:
            cursor = str(page.items[-1]["id"])
            rows = page.items
            if last is not None:
                # A file from before a column existed can be continued: a missing value was null.
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
    """Return the last complete row of a file and truncate the file after it: the final write may be partial."""
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
        raise Failure(f"{path}: its last line is not an audit log row") from error
    cut = tail[len(whole) :]
    if cut and not (cut.startswith(_ROW_START[: len(cut)]) and start + len(whole) < size):
        raise Failure(f"{path}: its end is not an audit log row")
    file.truncate(start + len(whole))
    return last

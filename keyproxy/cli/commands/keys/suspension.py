"""keyproxy key suspend, resume, origins: stop a key that may have been stolen, and show where it was used."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import click

from keyproxy.cli.context import KEY_COLUMNS, Call, takes_call
from keyproxy.cli.parameters import instant
from keyproxy.store.directory.interface import DirectoryOperations
from keyproxy.store.usage.usage_service import UsageOperations

_ORIGIN_COLUMNS: Final = ("client", "requests", "refusals", "tokens_in", "tokens_out", "first", "last")

_id_argument = click.argument("key_id", metavar="ID")


@click.command("suspend", short_help="Suspend a key until it is resumed.")
@_id_argument
@click.option("--reason", default="", help="The reason, kept with the key while it is suspended.")
@takes_call
def key_suspend(call: Call, key_id: str, reason: str) -> None:
    """Suspend a key and its agent tokens until it is resumed. Takes effect everywhere within a second.

    \b
    keyproxy key suspend key_… --reason "used from two countries"
    """
    call.print_result(call.run(lambda directory: directory.keys.suspend(key_id, reason)), KEY_COLUMNS)


@click.command("resume", short_help="Resume a suspended key.")
@_id_argument
@takes_call
def key_resume(call: Call, key_id: str) -> None:
    """Resume a suspended key. Takes effect everywhere within a second.

    For an hour, the signal of [anomalies] that suspended the key does not suspend it again.

    \b
    keyproxy key resume key_…
    """
    call.print_result(call.run(lambda directory: directory.keys.resume(key_id)), KEY_COLUMNS)


@click.command("origins", short_help="Show where a key was used.")
@_id_argument
@click.option(
    "--since",
    default="7d",
    show_default=True,
    callback=instant,
    metavar="WHEN",
    help="Start, inclusive: 2026-01-31, 2026-01-31T12:00Z, or 7d (7 days ago).",
)
@takes_call
def key_origins(call: Call, key_id: str, since: datetime) -> None:
    """Show the clients that have used a key: requests, refusals and tokens of each, and when it was first and last seen.

    The records are the events of requests, which are kept for [usage] event_days, and have as much of the client's
    address as [log] client_address allows. The client is empty for events of earlier releases.

    \b
    keyproxy key origins key_… --since 24h
    """

    async def exists(directory: DirectoryOperations) -> None:
        await directory.keys.get(key_id)

    async def work(usage: UsageOperations) -> list[dict[str, Any]]:
        return await usage.origins(key_id, since)

    if call.admin_url is None:  # else the endpoint checks it, and usage:read does not include reading keys
        call.run(exists)
    call.print_result(call.run_usage(work), _ORIGIN_COLUMNS)

"""keyproxy key remind."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from keyproxy.cli.context import Call
from keyproxy.cli.options import Failure, config_option, json_option
from keyproxy.config.loader import ConfigError
from keyproxy.store.directory.reminders import Reminders
from keyproxy.store.postgres.database import Database

_SHOWN_MAX: Final = 10_000
_COLUMNS: Final = (
    "key", "token", "user", "tenant", "hint", "name", "is_test", "expires_at", "before_days", "attempts", "last_error",
)  # fmt: skip


@click.command("remind", short_help="Send the reminders that are due.")
@click.option(
    "--dry-run", is_flag=True, help="Only list what would be sent, and what was tried and is still to be sent."
)
@config_option
@json_option
def key_remind(config_path: Path | None, *, dry_run: bool, as_json: bool) -> None:
    """Send the due reminders of keys and admin tokens that expire soon to [reminders] webhook_url.

    A running `keyproxy admin` does so by itself; this is for a cron job where there is none. What was received is not
    sent again, whoever sent it. Status 1 if something was not received; it is tried again when this is run later, up to
    nine times.

    \b
    keyproxy key remind --dry-run
    """
    call = Call(config_path, as_json)
    terms = call.settings().reminders
    if dry_run:
        call.tell(call.run_in_store(lambda database: _listed(database, terms.before_days)), _COLUMNS)
        return
    if not terms.webhook_url:
        raise ConfigError(["reminders.webhook_url: is not set, so there is nobody to remind"])
    # What this needs takes longer to import than a command takes.
    from keyproxy.admin.reminder_sender import ReminderSender

    outcome = call.run_in_store(lambda database: ReminderSender(Reminders(database)).turn(terms))
    call.tell(asdict(outcome), ())
    if outcome.failed or outcome.given_up:
        raise Failure("not all reminders were received: `keyproxy key remind --dry-run` says why")


async def _listed(database: Database, before_days: list[int]) -> list[dict[str, Any]]:
    reminders = Reminders(database)
    return await reminders.waiting(_SHOWN_MAX) + await reminders.due(before_days, _SHOWN_MAX)

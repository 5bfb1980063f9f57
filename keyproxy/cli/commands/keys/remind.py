"""keyproxy key remind."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from keyproxy.cli.context import Call
from keyproxy.cli.options import config_option, json_option
from keyproxy.cli.output import Failure
from keyproxy.config.loader import ConfigError
from keyproxy.store.directory.reminders import ReminderQueue
from keyproxy.store.postgres.database import Database

_SHOWN_MAX: Final = 10_000
_COLUMNS: Final = (
    "key",
    "token",
    "user",
    "tenant",
    "hint",
    "name",
    "is_test",
    "expires_at",
    "before_days",
    "attempts",
    "last_error",
)


@click.command("remind", short_help="Send the reminders that are due.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only list the reminders to send, including failed ones that will be retried.",
)
@config_option
@json_option
def key_remind(config_path: Path | None, *, dry_run: bool, as_json: bool) -> None:
    """Send due reminders about keys and admin tokens that expire soon to [reminders] webhook_url.

    A running `keyproxy admin` sends them itself; use this command in a cron job where none runs. A delivered reminder is
    not sent again by either. Status 1 if a delivery failed; a later run retries it, up to nine attempts in total.

    \b
    keyproxy key remind --dry-run
    """
    call = Call(config_path, as_json)
    terms = call.settings().reminders
    if dry_run:
        call.print_result(call.run_in_store(lambda database: _listed(database, terms.before_days)), _COLUMNS)
        return
    if not terms.webhook_url:
        raise ConfigError(["reminders.webhook_url: not set, so reminders cannot be sent"])
    # These imports take longer than a command runs.
    from keyproxy.admin.reminder_sender import ReminderSender

    outcome = call.run_in_store(lambda database: ReminderSender(ReminderQueue(database)).turn(terms))
    call.print_result(asdict(outcome), ())
    if outcome.failed or outcome.given_up:
        raise Failure("some reminders were not delivered: run `keyproxy key remind --dry-run` for the errors")


async def _listed(database: Database, before_days: list[int]) -> list[dict[str, Any]]:
    reminders = ReminderQueue(database)
    return await reminders.waiting(_SHOWN_MAX) + await reminders.due(before_days, _SHOWN_MAX)

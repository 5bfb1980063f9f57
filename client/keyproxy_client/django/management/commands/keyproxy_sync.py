"""manage.py keyproxy_sync"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Any, Final

from django.core.management.base import CommandError, CommandParser

from keyproxy_client.django.management.reporting import Misuse, ReportingCommand
from keyproxy_client.django.provisioning.synchronising import Report, Wish, synchronise
from keyproxy_client.django.settings import settings

_BATCH_MAX: Final = 100_000

#: What a report counts, and the text for it.
_KINDS: Final = {
    "delivered": "delivered {} events of the outbox",
    "created": "created {} users",
    "disabled": "disabled {} users",
    "enabled": "enabled {} users",
    "deleted": "deleted {} users that do not exist in Django",
    "left_disabled": "left {} users disabled that are active in Django: --enable enables them",
    "kept": "kept {} owners of service keys",
    "without_id": "skipped {} users without a valid id for keyproxy",
}


class Command(ReportingCommand):
    """Make the users of keyproxy match the users of Django."""

    help = (
        "Create users that are missing in keyproxy, disable those that are inactive in Django, and deliver the events of "
        "the outbox. Run it after the installation, after bulk operations, and regularly with BACKEND 'api'."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--batch", type=_batch, default=1000, help="How many users are read at a time. [1000]")
        parser.add_argument("--dry-run", action="store_true", help="Change nothing; print what would be done.")
        parser.add_argument(
            "--enable", action="store_true",
            help="Also enable users that are active in Django and disabled in keyproxy, also by an operator.",
        )  # fmt: skip
        parser.add_argument(
            "--prune", action="store_true",
            help="Also delete users of keyproxy that are not in Django, with their keys; owners of service keys stay.",
        )  # fmt: skip
        super().add_arguments(parser)

    def perform(self, options: Mapping[str, Any]) -> None:
        """Run, and fail if a user could not be changed or an event could not be delivered."""
        if settings().backend == "off":
            raise Misuse('KEYPROXY["BACKEND"] is "off": there is nothing to synchronise')
        is_dry_run = options["dry_run"]
        report = synchronise(Wish(options["batch"], is_dry_run, options["enable"], options["prune"]))
        self.report(_result(report, is_dry_run=is_dry_run), _lines(report, is_dry_run), as_json=options["as_json"])
        for user, problem in report.failed.items():
            self.stderr.write(f"user {user}: {problem}")
        waiting = 0 if is_dry_run else report.waiting
        if report.failed or waiting:
            raise CommandError(f"{len(report.failed)} users failed; {waiting} events wait in the outbox")


def _batch(value: str) -> int:
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= _BATCH_MAX:
        raise ArgumentTypeError(f"{value!r} is not a number from 1 to {_BATCH_MAX}")
    return int(value)


def _result(report: Report, *, is_dry_run: bool) -> dict[str, Any]:
    failed = [{"user": user, "problem": problem} for user, problem in report.failed.items()]
    counts = {kind: report.done[kind] for kind in _KINDS}
    return {"dry_run": is_dry_run, **counts, "waiting": report.waiting, "failed": failed}


def _lines(report: Report, is_dry_run: bool) -> list[str]:
    start = "dry run: " if is_dry_run else ""
    lines = [f"{start}{text.format(report.done[kind])}" for kind, text in _KINDS.items() if report.done[kind]]
    if report.waiting:
        lines.append(f"{report.waiting} events wait in the outbox")
    return lines or [f"{start}nothing to do"]

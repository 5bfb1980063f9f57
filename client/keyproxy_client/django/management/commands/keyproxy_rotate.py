"""manage.py keyproxy_rotate"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import DatabaseError
from django.db.models import Max
from django.utils import timezone

from keyproxy_client.django import credentials
from keyproxy_client.django.directory.errors import DirectoryError
from keyproxy_client.django.management.reporting import ReportingCommand, duration
from keyproxy_client.django.models import Credential
from keyproxy_client.django.sealing import CredentialUnusable
from keyproxy_client.django.users import InvalidId

_log = logging.getLogger("keyproxy_client.rotation")


class Command(ReportingCommand):
    """Replace credentials past half their life, and encrypt all under the first Fernet key."""

    help = (
        "Replace the keys of per-user credentials that are past half their life, encrypt all credentials under the first "
        "key of SECRET_KEYS, and delete those whose keys have expired."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "--grace", type=duration, default=timedelta(hours=24), metavar="24h",
            help="How long the old keys keep working. [24h]",
        )  # fmt: skip
        parser.add_argument("--all", action="store_true", help="Replace all credentials, whatever their age.")
        parser.add_argument("--dry-run", action="store_true", help="Change nothing; print what would be done.")
        super().add_arguments(parser)

    def perform(self, options: Mapping[str, Any]) -> None:
        """Rotate, then encrypt; one failure does not prevent the others."""
        rotated, failed = self._rotate(options)
        resealed, unreadable = self._reseal(is_dry_run=options["dry_run"])
        deleted = 0 if options["dry_run"] else credentials.delete_expired()
        failed += unreadable
        result = {
            "dry_run": options["dry_run"],
            "rotated": rotated,
            "reencrypted": resealed,
            "deleted": deleted,
            "failed": failed,
        }
        verb = "would rotate" if options["dry_run"] else "rotated"
        self.report(
            result,
            [
                *(f"{verb} {one['old']} of the user {one['user']}" for one in rotated),
                f"{verb} {len(rotated)}; encrypted {resealed} under the first key; deleted {deleted} that had expired",
            ],
            as_json=options["as_json"],
        )
        for failure in failed:
            self.stderr.write(f"{failure['key']}: {failure['problem']}")
        if failed:
            raise CommandError("1 credential failed" if len(failed) == 1 else f"{len(failed)} credentials failed")

    def _rotate(self, options: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        rotated: list[dict[str, Any]] = []
        failed: list[dict[str, str]] = []
        now = timezone.now()
        for row in _rows(retired_at=None):
            if not options["all"] and not credentials.is_due(row, now):
                continue
            done: dict[str, Any] = {"user": str(row.user_id), "is_test": row.is_test, "old": row.key_id, "new": None}
            if not options["dry_run"]:
                try:
                    made = credentials.rotate(row, options["grace"])
                except (DirectoryError, CredentialUnusable, DatabaseError, InvalidId) as error:
                    failed.append({"key": row.key_id, "problem": str(error).partition("\n")[0]})
                    continue
                if made is None:
                    continue
                done["new"] = made.key_id
                _log.info("credential %s of user %s replaced by %s", row.key_id, row.user_id, made.key_id)
            rotated.append(done)
        return rotated, failed

    def _reseal(self, *, is_dry_run: bool) -> tuple[int, list[dict[str, str]]]:
        count, failed = 0, []
        for row in _rows():
            try:
                count += credentials.needs_resealing(row) if is_dry_run else credentials.reseal(row)
            except CredentialUnusable as error:
                failed.append({"key": row.key_id, "problem": str(error)})
        return count, failed


def _rows(**conditions: Any) -> Iterator[Credential]:
    """The present credentials by id, in parts: rows change while they are read, and rotation adds others."""
    after = 0
    last = Credential.objects.aggregate(last=Max("pk", default=0))["last"]
    while page := list(Credential.objects.filter(pk__gt=after, pk__lte=last, **conditions).order_by("pk")[:500]):
        yield from page
        after = page[-1].pk

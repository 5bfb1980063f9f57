"""manage.py keyproxy_import_drf"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

from django.core.management.base import CommandError, CommandParser
from django.db import connections

from keyproxy_client.django.checking.setting_checks import Fault, scopes
from keyproxy_client.django.importing.by_api import ApiImport
from keyproxy_client.django.importing.by_sql import SqlImport
from keyproxy_client.django.importing.csv_file import CsvFile
from keyproxy_client.django.importing.old_keys import ModelUnusable, OldKey, key_models, owner_fields, read_keys
from keyproxy_client.django.importing.report import ImportReport
from keyproxy_client.django.management.reporting import Misuse, ReportingCommand
from keyproxy_client.django.settings import settings

_PROBLEMS_SHOWN_MAX: Final = 20
_BATCH: Final = 1000


class _Way(Protocol):
    """One of the ways by which keys reach keyproxy."""

    def put(self, keys: Sequence[OldKey]) -> ImportReport: ...


class _Counting:
    """A dry run without keyproxy: of the file, or before a way is chosen. Which keys are there already is not known."""

    def __init__(self, *, to_file: bool) -> None:
        self._to_file = to_file

    def put(self, keys: Sequence[OldKey]) -> ImportReport:
        return ImportReport(written=len(keys)) if self._to_file else ImportReport(imported=len(keys))


class Command(ReportingCommand):
    """Import the keys of djangorestframework-api-key."""

    help = (
        "Import the keys of djangorestframework-api-key into keyproxy, where they keep working: by the admin API "
        "(ADMIN_URL of the settings), into a file for `keyproxy key import` (--csv), or by SQL on a connection with the "
        "rights of keyproxy's admin role (--using). Keys that are there already are skipped, so it can be run again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "models",
            nargs="*",
            metavar="MODEL",
            help="A model of keys, app.Model. Default: all subclasses of AbstractAPIKey.",
        )
        parser.add_argument("--dry-run", action="store_true", help="Change nothing; print what would be imported.")
        parser.add_argument(
            "--scope",
            action="append",
            default=[],
            metavar="SCOPE",
            dest="scopes",
            help="A scope of the keys; repeatable.",
        )
        parser.add_argument(
            "--user-field", metavar="FIELD",
            help="The reference to a key's owner, such as user or team__owner. Default: the only one to the user model.",
        )  # fmt: skip
        ways = parser.add_mutually_exclusive_group()
        ways.add_argument("--csv", type=Path, metavar="FILE", help="Write a file for `keyproxy key import`.")
        ways.add_argument("--using", metavar="ALIAS", help="Import by SQL on this connection of DATABASES.")
        super().add_arguments(parser)

    def perform(self, options: Mapping[str, Any]) -> None:
        """Import the keys; a problem of one does not prevent the others."""
        try:
            wanted = scopes(options["scopes"])
            models = owner_fields(key_models(options["models"]), options["user_field"])
        except Fault as error:
            raise Misuse(f"--scope: {error}") from error
        except ModelUnusable as error:
            raise Misuse(str(error)) from error
        report = ImportReport()
        with ExitStack() as stack:
            way = _way(options, stack)
            for model, field in models:
                rows = read_keys(model, field, wanted)
                while batch := list(islice(rows, _BATCH)):
                    report.problems += [one for one in batch if not isinstance(one, OldKey)]
                    keys = [one for one in batch if isinstance(one, OldKey)]
                    if keys:
                        report.add(way.put(keys))
        self._print(report, [model._meta.label for model, _ in models], options)

    def _print(self, report: ImportReport, labels: Sequence[str], options: Mapping[str, Any]) -> None:
        result = {"dry_run": options["dry_run"], "models": labels, **report.as_json()}
        counts = (
            f"{report.imported} imported, {report.present} present, {report.revoked} of them revoked now, "
            f"{report.users} users created, {len(report.problems)} problems"
        )
        if options["csv"]:
            counts = f"{report.written} written to {options['csv']}, {len(report.problems)} problems"
        self.report(result, [("dry run: " if options["dry_run"] else "") + counts], as_json=options["as_json"])
        for one in report.problems[:_PROBLEMS_SHOWN_MAX]:
            self.stderr.write(f"{one.place}: {one.problem}")
        if report.problems:
            more = len(report.problems)
            raise CommandError("1 key was not imported" if more == 1 else f"{more} keys were not imported")


def _way(options: Mapping[str, Any], stack: ExitStack) -> _Way:
    is_dry_run = options["dry_run"]
    if options["csv"]:
        if is_dry_run:
            return _Counting(to_file=True)
        try:
            return stack.enter_context(CsvFile(options["csv"]))
        except OSError as error:
            raise Misuse(f"{options['csv']} cannot be written: {error.strerror}") from error
    if options["using"]:
        if options["using"] not in connections:
            raise Misuse(f"DATABASES has no alias {options['using']!r}")
        return SqlImport(options["using"], is_dry_run)
    if not settings().admin_url:
        if is_dry_run:
            return _Counting(to_file=False)
        raise Misuse(
            "name a way to keyproxy: --csv FILE for `keyproxy key import`, --using ALIAS for a connection with the "
            "rights of keyproxy's admin role, or ADMIN_URL and ADMIN_TOKEN_FILE in the settings"
        )
    return ApiImport(is_dry_run)

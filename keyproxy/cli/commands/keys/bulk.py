"""keyproxy key revoke-all|issue-many|import: many keys at once. Each can be run again after an interruption."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import click
import orjson

from keyproxy.auth.api_key import masked
from keyproxy.cli.context import Call, confirm, takes_call, yes_option
from keyproxy.cli.output import Failure, Progress, print_message, showing_secret
from keyproxy.cli.parameters import duration, roles, scopes, span
from keyproxy.cli.rows import Rows, read_owners, read_rows
from keyproxy.store.directory.directory import ImportedKey, ImportReport, Invalid, KeyWish, Revocation
from keyproxy.store.directory.entities import ACTS_FOR
from keyproxy.store.directory.import_keys import read_key, read_wish
from keyproxy.store.directory.interface import DirectoryOperations
from keyproxy.store.directory.key_batches import BATCH_MAX

_PROBLEMS_SHOWN_MAX: Final = 20

_LOST: Final = (
    "secrets of issued keys are lost. Free disk space, then run the command again with --reissue-unseen, which revokes"
    " and reissues the keys that were never used"
)

_roles_option = click.option(
    "--role",
    "roles_wanted",
    multiple=True,
    callback=roles,
    metavar="ROLE",
    help="Role for rows without roles; repeatable.",
)
_acts_for_option = click.option(
    "--acts-for", type=click.Choice(ACTS_FOR), help="The users that keys of rows without acts_for may act for. [none]"
)
_file_argument = click.argument(
    "path", metavar="FILE", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path)
)


@click.command("revoke-all", short_help="Revoke many keys by user, tenant, age or last use.")
@click.option("--user", "user_id", metavar="USER", help="Only this user's keys.")
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Only keys of this tenant's users.")
@click.option(
    "--older-than", callback=span, metavar="TIME", help="Only keys issued longer ago than this, such as 365d."
)
@click.option("--unused", callback=span, metavar="TIME", help="Only keys not used for this long, such as 30d.")
@click.option("--reason", default="", help="The reason, kept with the keys.")
@click.option("--dry-run", is_flag=True, help="Only count the keys; revoke nothing.")
@yes_option
@takes_call
def key_revoke_all(
    call: Call,
    user_id: str | None,
    tenant_id: str | None,
    older_than: timedelta | None,
    unused: timedelta | None,
    reason: str,
    *,
    dry_run: bool,
    yes: bool,
) -> None:
    """Permanently revoke all keys that match every given option.

    \b
    keyproxy key revoke-all --user u_42 --reason "laptop stolen"
    keyproxy key revoke-all --tenant acme --older-than 365d --dry-run
    """
    try:
        wanted = Revocation(user_id, tenant_id, older_than, unused)
    except Invalid as error:
        raise click.UsageError(str(error)) from error
    total = call.run(lambda directory: directory.key_batches.count_to_revoke(wanted))
    if dry_run:
        call.print_result({"revoked": 0, "would_revoke": total}, ())
        return
    confirm(f"Revoke {total} keys? This cannot be undone.", yes=yes)
    call.print_result({"revoked": call.run(lambda directory: _revoke(directory, wanted, reason, total))}, ())


async def _revoke(directory: DirectoryOperations, wanted: Revocation, reason: str, total: int) -> int:
    progress, count = Progress("keys revoked", total), 0
    try:
        async for ids in directory.key_batches.revoke(wanted, reason):
            count += len(ids)
            progress.at(count)
    finally:
        progress.end()
    return count


@click.command("issue-many", short_help="Issue one key per row of a CSV or JSON file.")
@_file_argument
@click.option(
    "--scope",
    "wanted",
    multiple=True,
    callback=scopes,
    metavar="SCOPE",
    help="Scope for rows without scopes; repeatable.",
)
@_roles_option
@_acts_for_option
@click.option(
    "--expires-in", callback=duration, metavar="TIME", help="Lifetime, such as 90d, or never. [keys.age_days_max]"
)
@click.option("--plan", metavar="PLAN", help="Plan for rows without a plan.")
@click.option(
    "--reissue-unseen",
    is_flag=True,
    help="Revoke and reissue keys that were never used, because their secrets were lost.",
)
@takes_call
def key_issue_many(
    call: Call,
    path: Path,
    wanted: tuple[str, ...],
    roles_wanted: tuple[str, ...],
    acts_for: str | None,
    expires_in: timedelta | str | None,
    plan: str | None,
    *,
    reissue_unseen: bool,
) -> None:
    """Issue one key per row of a file: CSV with a header line, or JSON lines. FILE - is stdin.

    Columns: user (required); name, scopes, roles, acts_for, test, plan (optional). Each key is printed as soon as it is
    issued, with --json as JSON lines. If the user already has a working key of that name and mode, the row is skipped, so
    the command can be run again.

    If secrets were lost, as on a full disk, run the command again with --reissue-unseen: keys that match their row and
    were never used are revoked and issued again. Keys that were used, rotated or imported stay.

    \b
    printf 'user,name\\nu_1,nightly\\nu_2,nightly\\n' | keyproxy key issue-many - --scope jobs:write
    """
    life = call.life(expires_in)
    defaults = {"scopes": list(wanted), "roles": list(roles_wanted), "acts_for": acts_for, "plan": plan}
    wishes: list[tuple[str, KeyWish]] = []
    for place, row in read_rows(path, needs=(("user",), ("user_id",))):
        try:
            user, wish = read_wish(row, defaults)
        except Invalid as error:
            raise Failure(f"{place}: {error}") from error
        wishes.append((user, replace(wish, expires_in=life)))
    call.warn_of_scopes(*(wish.scopes for _, wish in wishes if wish.scopes or not wish.roles))
    made = call.run_for_secret(lambda directory: _issue(call, directory, wishes, reissue_unseen=reissue_unseen))
    if not call.as_json:
        present = len(wishes) - made
        then = "this is the only time the secrets are shown" if made else "if their secrets were lost: --reissue-unseen"
        print_message(f"{made} {'key' if made == 1 else 'keys'} issued, {present} already existed; {then}")


async def _issue(
    call: Call, directory: DirectoryOperations, wishes: Sequence[tuple[str, KeyWish]], *, reissue_unseen: bool
) -> int:
    progress, made = Progress("keys", len(wishes)), 0
    try:
        for start in range(0, len(wishes), BATCH_MAX):
            keys = await directory.key_batches.issue(wishes[start : start + BATCH_MAX], reissue_unseen=reissue_unseen)
            with showing_secret(_LOST):
                for key in keys:
                    call.print_warnings(key)
                    if call.as_json:
                        click.echo(orjson.dumps(key).decode("utf-8"))
                    elif key["created"]:
                        click.echo(f"{key['user']}  {key['name'] or '-'}  {key['id']}  {key['secret']}")
                    made += key["created"]
                sys.stdout.flush()
            progress.at(min(len(wishes), start + BATCH_MAX))
    finally:
        progress.end()
    return made


@click.command("import")
@_file_argument
@click.option("--dry-run", is_flag=True, help="Run the import, report the result, and roll it back.")
@click.option("--user", "user_id", metavar="USER", help="Owner of keys whose row names no user.")
@click.option("--user-column", metavar="NAME", help="The column that contains the key's owner. [user]")
@click.option(
    "--map",
    "map_path",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="CSV lines `prefix or name of the key,user` that assign owners; - is stdin.",
)
@click.option("--tenant", "tenant_id", metavar="TENANT", help="Create missing users in this tenant.")
@click.option(
    "--scope",
    "wanted",
    multiple=True,
    callback=scopes,
    metavar="SCOPE",
    help="Scope for rows without scopes; repeatable.",
)
@_roles_option
@_acts_for_option
@takes_call
def key_import(
    call: Call,
    path: Path,
    user_id: str | None,
    user_column: str | None,
    map_path: Path | None,
    tenant_id: str | None,
    wanted: tuple[str, ...],
    roles_wanted: tuple[str, ...],
    acts_for: str | None,
    *,
    dry_run: bool,
) -> None:
    """Import keys that another program issued. FILE is CSV with a header line, JSON lines or Django's dumpdata; - is
    stdin.

    A row contains the key's digest, which is the hexadecimal SHA-256 of the whole key; or the prefix and hashed_key of
    djangorestframework-api-key, whose digest is added when the key is first used. Other columns, all of them optional:
    user, tenant, name, scopes, roles, acts_for, is_test, plan, created, expires_at or expiry_date, revoked, id, hint.

    Invalid rows are reported and the exit status is 1; the other rows are imported. Existing keys are skipped.

    \b
    keyproxy key import keys.csv --map owners.csv --tenant acme --dry-run
    keyproxy key import keys.csv --map owners.csv --tenant acme
    """
    if str(path) == str(map_path) == "-":
        raise click.UsageError("only one of FILE and --map can be stdin")
    defaults = {
        "user": user_id,
        "tenant": tenant_id,
        "scopes": list(wanted),
        "roles": list(roles_wanted),
        "acts_for": acts_for,
    }
    owners = {} if map_path is None else read_owners(map_path)
    known_as = () if user_column is None else (user_column,)
    rows = read_rows(path, needs=(("digest",), ("prefix", "hashed_key"), ("prefix", "hashed")), beside=known_as)
    keys, report = _read(rows, defaults, owners, user_column)
    call.warn_of_scopes(*(key.scopes for key in keys if not key.is_revoked and (key.scopes or not key.roles)))
    report.add(call.run(lambda directory: _import(directory, keys, dry_run=dry_run)))
    for warning in report.warnings:
        print_message(f"warning: {warning}")
    for place, problem in report.problems[:_PROBLEMS_SHOWN_MAX]:
        print_message(f"{place}: {problem}")
    result = {
        "dry_run": dry_run,
        "imported": report.imported,
        "present": report.present,
        "users": report.users,
        "problems": [{"place": place, "problem": problem} for place, problem in report.problems],
    }
    call.print_result(result if call.as_json else {**result, "problems": len(report.problems)}, ())
    if report.problems:
        raise Failure("1 row is invalid" if len(report.problems) == 1 else f"{len(report.problems)} rows are invalid")


async def _import(directory: DirectoryOperations, keys: Sequence[ImportedKey], *, dry_run: bool) -> ImportReport:
    progress, report = Progress("keys checked", len(keys)), ImportReport()
    try:
        # A dry run rolls back, so it must see all rows in one transaction: later parts would not see earlier ones.
        size = max(1, len(keys)) if dry_run else BATCH_MAX
        for start in range(0, len(keys), size):
            report.add(await directory.key_importer.run(keys[start : start + size], dry_run=dry_run))
            progress.at(min(len(keys), start + size))
    finally:
        progress.end()
    return report


def _read(
    rows: Rows, defaults: Mapping[str, Any], owners: Mapping[str, str], user_column: str | None
) -> tuple[list[ImportedKey], ImportReport]:
    keys, report = [], ImportReport()
    for place, row in rows:
        owner = row.get(user_column) if user_column is not None else None
        for known_as in (row.get("prefix"), row.get("name")):
            owner = owner or owners.get(str(known_as))
        try:
            keys.append(read_key(place, {**row, "user": owner} if owner else row, defaults))
        except Invalid as error:
            report.problems.append((place, masked(str(error))))
    return keys, report

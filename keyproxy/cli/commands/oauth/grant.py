"""keyproxy oauth grant and keyproxy oauth session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import click

from keyproxy.cli.context import PAGE, Call, all_pages, chosen_plan, confirm, plan_arguments, takes_call, yes_option
from keyproxy.cli.output import Progress
from keyproxy.store.directory.directory import Entity
from keyproxy.store.directory.interface import DirectoryOperations

_GRANT_COLUMNS: Final = (
    "id", "user", "client", "client_name", "resource", "scopes", "is_test", "is_service", "plan", "granted_at",
    "sessions",
)  # fmt: skip
_SESSION_COLUMNS: Final = (
    "id", "grant", "user", "client_name", "scopes", "is_test", "created_at", "expires_at", "last_used_at",
)  # fmt: skip

_user_option = click.option("--user", "user_id", metavar="USER", help="Only those of this user.")


@click.group("grant", short_help="Manage what users have allowed clients.")
def grant_group() -> None:
    """Manage grants: what users have allowed clients. There is one for each user, client and resource."""


@grant_group.command("list")
@_user_option
@takes_call
def grant_list(call: Call, user_id: str | None) -> None:
    """List grants, with the number of their sessions."""
    rows = call.run(
        lambda directory: all_pages(lambda after: directory.oauth_grants.list_by_id(after, PAGE, user_id=user_id))
    )
    call.print_result(rows, _GRANT_COLUMNS)


@grant_group.command("revoke", short_help="Revoke grants with their sessions.")
@click.argument("grant_id", metavar="[ID]", required=False)
@click.option("--user", "user_id", metavar="USER", help="Revoke all of this user.")
@yes_option
@takes_call
def grant_revoke(call: Call, grant_id: str | None, user_id: str | None, *, yes: bool) -> None:
    """Revoke a grant, or all of a user, with the sessions. Tokens are refused within a second.

    The user can consent again.

    \b
    keyproxy oauth grant revoke gra_…
    keyproxy oauth grant revoke --user u_42
    """
    if (grant_id is None) == (user_id is None):
        raise click.UsageError("pass the id of a grant, or --user")
    if grant_id is not None:
        call.print_result(call.run(lambda directory: directory.oauth_grants.delete(grant_id)), ("id", "deleted"))
        return
    owner = str(user_id)
    confirm(f"Revoke all grants of user {owner} with their sessions?", yes=yes)
    ended = call.run(lambda directory: _all(lambda: directory.oauth_grants.delete_of_user(owner), "grants revoked"))
    call.print_result({"revoked": ended}, ())


@grant_group.command("set-plan", short_help="Set or remove the plan of grants.")
@click.argument("grant_id", metavar="[ID]", required=False)
@plan_arguments
@click.option("--user", "user_id", metavar="USER", help="All grants of this user, instead of ID.")
@takes_call
def grant_set_plan(
    call: Call, grant_id: str | None, plan: str | None, named: str | None, user_id: str | None, *, none: bool
) -> None:
    """Set or remove a grant's plan, which limits all its sessions together. Takes effect within a second.

    The plans of the user and the tenant apply as well.

    \b
    keyproxy oauth grant set-plan gra_… basic
    keyproxy oauth grant set-plan --user u_42 basic
    """
    if user_id is not None and plan is None:
        grant_id, plan = None, grant_id
    if (grant_id is None) == (user_id is None):
        raise click.UsageError("pass the id of a grant, or --user")
    changes = {"plan": chosen_plan(plan, named, none=none)}
    if grant_id is not None:
        call.print_result(call.run(lambda directory: directory.oauth_grants.change(grant_id, changes)), _GRANT_COLUMNS)
        return

    async def change_all(directory: DirectoryOperations) -> list[Entity]:
        found = await all_pages(lambda after: directory.oauth_grants.list_by_id(after, PAGE, user_id=user_id))
        return [await directory.oauth_grants.change(grant["id"], changes) for grant in found]

    call.print_result(call.run(change_all), _GRANT_COLUMNS)


@click.group("session", short_help="Manage sessions: clients on single devices.")
def session_group() -> None:
    """Manage sessions: clients on single devices, each with its own tokens."""


@session_group.command("list")
@_user_option
@click.option("--all", "lists_all", is_flag=True, help="Sessions of all users, as without --user.")
@takes_call
def session_list(call: Call, user_id: str | None, *, lists_all: bool) -> None:
    """List sessions."""
    if lists_all and user_id is not None:
        raise click.UsageError("pass --user or --all")
    rows = call.run(
        lambda directory: all_pages(lambda after: directory.oauth_sessions.list_by_id(after, PAGE, user_id=user_id))
    )
    call.print_result(rows, _SESSION_COLUMNS)


@session_group.command("revoke", short_help="End sessions.")
@click.argument("session_id", metavar="[ID]", required=False)
@click.option("--user", "user_id", metavar="USER", help="End all sessions of this user.")
@click.option("--all", "ends_all", is_flag=True, help="End all sessions of all users.")
@yes_option
@takes_call
def session_revoke(call: Call, session_id: str | None, user_id: str | None, *, ends_all: bool, yes: bool) -> None:
    """End a session, all of a user, or all there are. Their tokens are refused within a second.

    The client asks the user to sign in and consent again.

    \b
    keyproxy oauth session revoke ses_…
    keyproxy oauth session revoke --user u_42
    """
    if (session_id is not None) + (user_id is not None) + ends_all != 1:
        raise click.UsageError("pass the id of a session, or --user, or --all")
    if session_id is not None:
        call.print_result(call.run(lambda directory: directory.oauth_sessions.delete(session_id)), ("id", "deleted"))
        return
    confirm("End all sessions of all users?" if ends_all else f"End all sessions of user {user_id}?", yes=yes)
    ended = call.run(
        lambda directory: _all(lambda: directory.oauth_sessions.delete_many(user_id=user_id), "sessions ended")
    )
    call.print_result({"revoked": ended}, ())


async def _all(portion: Callable[[], Awaitable[Entity]], what: str) -> int:
    """Repeat until nothing remains, and return how many there were."""
    progress, count = Progress(what), 0
    try:
        while True:
            done = await portion()
            count += int(done["revoked"])
            progress.at(count)
            # Sessions may begin meanwhile: those are of users who consent now.
            if not done["revoked"] or not done["remaining"]:
                return count
    finally:
        progress.end()

"""keyproxy oauth subject."""

from __future__ import annotations

from typing import Final

import click

from keyproxy.cli.context import Call, confirm, every_page, takes_call, yes_option

_COLUMNS: Final = ("issuer", "subject", "user", "tenant", "created_at")

_subject_argument = click.argument("subject", metavar="SUBJECT")
_issuer_option = click.option("--issuer", metavar="URL", help="The identity provider. [oauth.login.issuer]")


@click.group("subject", short_help="Manage accounts at the identity provider.")
def subject_group() -> None:
    """Manage subjects: accounts at the identity provider, linked to the users that they sign in as.

    SUBJECT is the value of the claims in oauth.login.subject_claims, joined by |. The page of a failed sign-in shows it.

    \b
    keyproxy oauth subject link 00u1a2b3 --user u_42
    """


@subject_group.command("link")
@_subject_argument
@click.option("--user", "user_id", required=True, metavar="USER", help="The user that the account signs in as.")
@_issuer_option
@takes_call
def subject_link(call: Call, subject: str, user_id: str, issuer: str | None) -> None:
    """Link an account to a user. An account has one user; a user may have several accounts."""
    linked = call.run(lambda directory: directory.oauth_subjects.link(subject, user_id, issuer=issuer))
    call.print_result(linked, _COLUMNS)


@subject_group.command("unlink")
@_subject_argument
@_issuer_option
@yes_option
@takes_call
def subject_unlink(call: Call, subject: str, issuer: str | None, *, yes: bool) -> None:
    """Remove the link of an account. Its sessions end within a second, and it cannot sign in."""
    confirm(f"Unlink {subject} and end its sessions?", yes=yes)
    call.print_result(call.run(lambda directory: directory.oauth_subjects.unlink(subject, issuer=issuer)), _COLUMNS)


@subject_group.command("list")
@click.option("--user", "user_id", metavar="USER", help="Only those of this user.")
@takes_call
def subject_list(call: Call, user_id: str | None) -> None:
    """List linked accounts."""
    rows = call.run(
        lambda directory: every_page(
            lambda cursor, limit: directory.oauth_subjects.list_page(cursor, limit, user_id=user_id)
        )
    )
    call.print_result(rows, _COLUMNS)

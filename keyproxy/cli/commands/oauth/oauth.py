"""keyproxy oauth: the clients of the authorization server, and what they have."""

from __future__ import annotations

from typing import Final

import click

from keyproxy.cli.command_table import CommandTable

_COMMANDS: Final = {
    "client": "keyproxy.cli.commands.oauth.client:client_group",
    "grant": "keyproxy.cli.commands.oauth.grant:grant_group",
    "session": "keyproxy.cli.commands.oauth.grant:session_group",
    "subject": "keyproxy.cli.commands.oauth.subject:subject_group",
}


@click.group("oauth", cls=CommandTable, places=_COMMANDS, short_help="Manage OAuth clients, grants and sessions.")
def oauth_group() -> None:
    """Manage OAuth clients, and what they have: grants of users, and sessions, which are single devices.

    A user who consents creates all three; there is nothing to set up for each user or device. `client` registers programs
    that get tokens by themselves, and disables any program.

    \b
    keyproxy oauth client create worker --user u_42 --scope jobs:write --auth client_secret
    keyproxy oauth session list --user u_42
    keyproxy oauth session revoke ses_…
    """

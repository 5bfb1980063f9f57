"""The command line: argv in, exit code out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import click

from keyproxy import __version__
from keyproxy.cli.command_table import CommandTable

_COMMANDS: Final = {
    "admin": "keyproxy.cli.commands.admin:admin_group",
    "agent": "keyproxy.cli.commands.agents.agent:agent_group",
    "approval": "keyproxy.cli.commands.approvals.approval:approval_group",
    "audit": "keyproxy.cli.commands.audit:audit_group",
    "authorize": "keyproxy.cli.commands.authorize:authorize_command",
    "completion": "keyproxy.cli.commands.completion:completion_command",
    "config": "keyproxy.cli.commands.config:config_group",
    "consent": "keyproxy.cli.commands.approvals.consent:consent_group",
    "demo": "keyproxy.cli.commands.serve:demo_command",
    "drain": "keyproxy.cli.commands.process:drain_command",
    "health": "keyproxy.cli.commands.process:health_command",
    "key": "keyproxy.cli.commands.keys.lifecycle:key_group",
    "migrate": "keyproxy.cli.commands.migrate:migrate_command",
    "oauth": "keyproxy.cli.commands.oauth.oauth:oauth_group",
    "owned": "keyproxy.cli.commands.access.owned:owned_group",
    "plan": "keyproxy.cli.commands.plan:plan_group",
    "prompt": "keyproxy.cli.commands.prompt:prompt_group",
    "provider-key": "keyproxy.cli.commands.providers.provider_key:provider_key_group",
    "role": "keyproxy.cli.commands.access.role:role_group",
    "serve": "keyproxy.cli.commands.serve:serve_command",
    "tenant": "keyproxy.cli.commands.tenant:tenant_group",
    "usage": "keyproxy.cli.commands.usage:usage_group",
    "user": "keyproxy.cli.commands.user:user_group",
}


@click.group(
    cls=CommandTable,
    places=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Commands take --config FILE (or KEYPROXY_CONFIG); --help after a command describes it.",
)
@click.version_option(__version__, prog_name="keyproxy")
def root() -> None:
    """A reverse proxy that authenticates API keys, enforces limits and forwards the caller's identity upstream.

    \b
    Try it:          keyproxy demo
    First steps:     keyproxy migrate
                     keyproxy tenant create acme
                     keyproxy user create u_42 --tenant acme
                     keyproxy serve
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 1: refused or failed; 2: bad usage or bad configuration."""
    try:
        status = root.main(None if argv is None else list(argv), prog_name="keyproxy", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, Exception) as error:  # the outermost boundary: a defect is raised again
        # It imports the modules of the exceptions, which most commands need and the help does not.
        from keyproxy.cli import failures

        failed = failures.status_of(error)
        if failed is None:
            raise
        return failed
    return status if isinstance(status, int) else 0

"""The command line: argv in, exit code out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from keyproxy import __version__
from keyproxy.auth.api_key import masked
from keyproxy.cli.commands.access.owned import owned_group
from keyproxy.cli.commands.access.role import role_group
from keyproxy.cli.commands.admin import admin_group
from keyproxy.cli.commands.agents.agent import agent_group
from keyproxy.cli.commands.agents.token import TOKEN_COMMANDS
from keyproxy.cli.commands.approvals.approval import approval_group
from keyproxy.cli.commands.approvals.consent import consent_group
from keyproxy.cli.commands.audit import audit_group
from keyproxy.cli.commands.completion import completion_command
from keyproxy.cli.commands.config import config_group
from keyproxy.cli.commands.keys.bulk import BULK_COMMANDS
from keyproxy.cli.commands.keys.explain import key_explain
from keyproxy.cli.commands.keys.leaks import LEAK_COMMANDS
from keyproxy.cli.commands.keys.lifecycle import key_group
from keyproxy.cli.commands.keys.remind import key_remind
from keyproxy.cli.commands.keys.suspension import key_origins, key_resume, key_suspend
from keyproxy.cli.commands.migrate import migrate_command
from keyproxy.cli.commands.plan import plan_group
from keyproxy.cli.commands.process import drain_command, health_command
from keyproxy.cli.commands.prompt import prompt_group
from keyproxy.cli.commands.providers.provider_key import provider_key_group
from keyproxy.cli.commands.serve import demo_command, serve_command
from keyproxy.cli.commands.tenant import tenant_group
from keyproxy.cli.commands.usage import usage_group
from keyproxy.cli.commands.user import user_group
from keyproxy.cli.options import FAILED, MISUSED, refusals
from keyproxy.cli.output import UNWRITABLE, AdminApiUnavailable, Failure, print_message
from keyproxy.config.loader import ConfigError
from keyproxy.platform import standard_streams
from keyproxy.store.postgres.database import StoreUnavailable


@click.group(
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


for _key_command in (*BULK_COMMANDS, *LEAK_COMMANDS):
    key_group.add_command(_key_command)
key_group.add_command(key_explain)
key_group.add_command(key_remind)
key_group.add_command(key_suspend)
key_group.add_command(key_resume)
key_group.add_command(key_origins)
for _agent_command in TOKEN_COMMANDS:
    agent_group.add_command(_agent_command)

for _command in (
    demo_command,
    serve_command,
    drain_command,
    health_command,
    admin_group,
    migrate_command,
    config_group,
    tenant_group,
    user_group,
    key_group,
    agent_group,
    approval_group,
    consent_group,
    plan_group,
    role_group,
    owned_group,
    prompt_group,
    provider_key_group,
    audit_group,
    usage_group,
    completion_command,
):
    root.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 1: refused or failed; 2: bad usage or bad configuration."""
    try:
        status = root.main(None if argv is None else list(argv), prog_name="keyproxy", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        # The message is the help itself; as a usage error it would appear inside another usage line.
        click.echo(error.format_message(), err=True)
        return MISUSED
    except click.UsageError as error:
        click.UsageError(masked(error.format_message()), error.ctx).show()
        return MISUSED
    except ConfigError as error:
        for problem in error.problems:
            _print_problem(problem)
        return MISUSED
    except (click.Abort, KeyboardInterrupt):
        _print_problem("interrupted")
        return FAILED
    except (Failure, AdminApiUnavailable) as error:
        _print_problem(str(error))
        return FAILED
    except StoreUnavailable as error:
        _print_problem(f"the database is unavailable: {' '.join(str(error).split())}")
        return FAILED
    except refusals() as error:
        _print_problem(" ".join(str(error).split()))
        return FAILED
    except BrokenPipeError:
        # The reader of the output has closed the pipe.
        standard_streams.abandon(sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.filename is None and error.errno not in UNWRITABLE:
            raise
        if error.filename is None:
            standard_streams.abandon(sys.stdout.fileno())
        _print_problem(f"{error.filename or 'the output'} cannot be used: {error.strerror}")
        return FAILED
    return status if isinstance(status, int) else 0


def _print_problem(text: str) -> None:
    # An argument may be a key where an id belongs, and other people can read terminals and job logs.
    print_message(masked(text))

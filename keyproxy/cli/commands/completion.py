"""keyproxy completion."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

_SHELLS: Final = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print a script that completes keyproxy's commands and options in a shell.

    \b
    bash:   eval "$(keyproxy completion bash)"                  in ~/.bashrc
    zsh:    eval "$(keyproxy completion zsh)"                   in ~/.zshrc
    fish:   keyproxy completion fish > ~/.config/fish/completions/keyproxy.fish
    """
    of_shell = get_completion_class(shell)
    if of_shell is None:
        raise click.UsageError(f"completion is not supported for {shell}")
    click.echo(of_shell(context.find_root().command, {}, "keyproxy", "_KEYPROXY_COMPLETE").source())

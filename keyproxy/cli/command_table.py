"""A group of commands that imports each command when it is used: a start of the program pays for one of them only."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from keyproxy.platform import garbage


class CommandTable(click.Group):
    """A group whose commands are named by a table: their name, and `module:attribute`."""

    def __init__(self, *arguments: Any, places: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the help."""
        return sorted({*self._places, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is no such command."""
        place = self._places.get(cmd_name)
        if place is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = place.partition(":")
        with garbage.importing():
            command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

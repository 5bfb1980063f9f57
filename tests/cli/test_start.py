"""A start of the program imports what the command needs, and little else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from keyproxy import cli
from keyproxy.cli.command_table import CommandTable


def _tables(table: CommandTable) -> Iterator[CommandTable]:
    yield table
    context = click.Context(table)
    for name in table.list_commands(context):
        command = table.get_command(context, name)
        if isinstance(command, CommandTable):
            yield from _tables(command)


def test_a_command_is_listed_by_its_own_name() -> None:
    tables = list(_tables(cli.root))
    assert {table.name for table in tables} == {"root", "key", "agent", "oauth"}
    for table in tables:
        context = click.Context(table)
        for name in table.list_commands(context):
            command = table.get_command(context, name)
            assert command is not None
            assert command.name == name


SIGNATURES = ("cryptography", "jwt")


@pytest.mark.parametrize(
    ("line", "needless"),
    [
        ("cli.main(['--version'])", ("asyncio", "orjson", "keyproxy.config", "keyproxy.model", "keyproxy.store")),
        ("cli.main(['key', 'list', '--help'])", ("aiohttp", "pydantic", "redis", *SIGNATURES)),
        ("cli.main(['config', 'show'])", ("aiohttp", "pydantic", "redis", "keyproxy.process.app", *SIGNATURES)),
        # A proxy with `ledger.backend = "postgres"`, before it reads its configuration.
        ("import keyproxy.process.run", ("pydantic", "redis", "re2", "keyproxy.admin", "keyproxy.demo")),
        ("import keyproxy.admin.app", ("redis", "re2", "keyproxy.demo", "keyproxy.process.app")),
        ("import keyproxy.authorize.app", ("redis", "re2", "pydantic", "keyproxy.demo", "keyproxy.process.app")),
    ],
)
def test_a_start_imports_no_library_that_the_command_does_not_need(line: str, needless: tuple[str, ...]) -> None:
    script = f"import sys\nfrom keyproxy import cli\n{line}\nprint('imported', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = done.stdout.rpartition("imported ")[2].split()
    assert "keyproxy.cli.command_table" in imported
    assert set(imported) & set(needless) == set()

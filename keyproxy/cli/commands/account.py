"""The commands that tenants and users share: show, set-plan, set-roles, disable, enable, delete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import click

from keyproxy.cli.context import Call, chosen_plan, confirm, plan_arguments, takes_call, yes_option
from keyproxy.cli.parameters import roles
from keyproxy.store.directory.interface import AccountOperations, DirectoryOperations


@dataclass(frozen=True, slots=True)
class AccountKind:
    """A kind of account. `contents`: what is deleted with it. `examples`: of `set-plan`; the other one of `set-roles`."""

    noun: str
    columns: Sequence[str]
    contents: str
    examples: Sequence[str]
    ceiling_example: str
    operations: Callable[[DirectoryOperations], AccountOperations]

    def change(self, call: Call, account_id: str, changes: dict[str, object]) -> None:
        """Change an account and print it."""
        call.print_result(
            call.run(lambda directory: self.operations(directory).change(account_id, changes)), self.columns
        )


_CEILING: Final = (
    "Set or remove a {noun}'s ceiling. No key of the {noun} may do more than these roles allow. Takes effect within a"
    " second."
)

_id_argument = click.argument("account_id", metavar="ID")


def add_account_commands(group: click.Group, kind: AccountKind) -> None:
    """Add the commands to the group of this kind."""
    for add_command in (_add_show, _add_set_plan, _add_set_roles, _add_disable, _add_enable, _add_delete):
        add_command(group, kind)


def _add_show(group: click.Group, kind: AccountKind) -> None:
    @group.command("show", help=f"Show one {kind.noun}.")
    @_id_argument
    @takes_call
    def show(call: Call, account_id: str) -> None:
        call.print_result(call.run(lambda directory: kind.operations(directory).get(account_id)), kind.columns)


def _add_set_plan(group: click.Group, kind: AccountKind) -> None:
    sentence = f"Set or remove a {kind.noun}'s plan. Takes effect within a second."

    @group.command("set-plan", help="\n".join([sentence, "", "\b", *kind.examples]))
    @_id_argument
    @plan_arguments
    @click.option(
        "--test",
        "is_test",
        is_flag=True,
        help="Set the plan for test traffic; without one, test traffic has the live plan's limits.",
    )
    @takes_call
    def set_plan(
        call: Call, account_id: str, plan: str | None, named: str | None, *, none: bool, is_test: bool
    ) -> None:
        kind.change(call, account_id, {"test_plan" if is_test else "plan": chosen_plan(plan, named, none=none)})


def _add_set_roles(group: click.Group, kind: AccountKind) -> None:
    @group.command("set-roles", help=f"{_CEILING.format(noun=kind.noun)}\n\n\b\n{kind.ceiling_example}")
    @_id_argument
    @click.option("--role", "wanted", multiple=True, callback=roles, metavar="ROLE", help="A role; repeatable.")
    @click.option("--none", "none", is_flag=True, help="Allow no scopes at all.")
    @click.option("--no-ceiling", is_flag=True, help="Remove the ceiling.")
    @takes_call
    def set_roles(call: Call, account_id: str, wanted: tuple[str, ...], *, none: bool, no_ceiling: bool) -> None:
        if bool(wanted) + none + no_ceiling != 1:
            raise click.UsageError("pass the roles with --role, or --none, or --no-ceiling")
        kind.change(call, account_id, {"roles": None if no_ceiling else list(wanted)})


def _add_disable(group: click.Group, kind: AccountKind) -> None:
    @group.command(
        "disable", help=f"Refuse all keys of a {kind.noun} until it is enabled. Takes effect within a second."
    )
    @_id_argument
    @takes_call
    def disable(call: Call, account_id: str) -> None:
        kind.change(call, account_id, {"disabled": True})


def _add_enable(group: click.Group, kind: AccountKind) -> None:
    @group.command("enable", help=f"Accept the keys of a disabled {kind.noun} again.")
    @_id_argument
    @takes_call
    def enable(call: Call, account_id: str) -> None:
        kind.change(call, account_id, {"disabled": False})


def _add_delete(group: click.Group, kind: AccountKind) -> None:
    @group.command(
        "delete", help=f"Delete a {kind.noun} with all its {kind.contents}. The audit log keeps their last state."
    )
    @_id_argument
    @yes_option
    @takes_call
    def delete(call: Call, account_id: str, *, yes: bool) -> None:
        confirm(f"Delete {kind.noun} {account_id} with all its {kind.contents}?", yes=yes)
        call.print_result(call.run(lambda directory: kind.operations(directory).delete(account_id)), kind.columns)

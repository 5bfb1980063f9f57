"""keyproxy provider-key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import click

from keyproxy.cli.context import PAGE, Call, all_pages, confirm, takes_call, yes_option
from keyproxy.cli.output import Failure
from keyproxy.cli.parameters import grace as grace_period

_COLUMNS: Final = (
    "id",
    "provider",
    "tenant",
    "is_test",
    "state",
    "hint",
    "sealed_with",
    "starts_at",
    "ends_at",
    "revoked_at",
    "checked_at",
    "check_status",
)
_FILE_BYTES_MAX: Final = 65_536

_id_argument = click.argument("key_id", metavar="ID")


def _secret_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--secret-file and --check."""
    command = click.option(
        "--check",
        is_flag=True,
        help="Send a request with the secret to the upstream first; store it only unless refused.",
    )(command)
    return click.option(
        "--secret-file", "secret_path", required=True, metavar="FILE",
        type=click.Path(path_type=Path, allow_dash=True), help="The file with the secret; - is stdin.",
    )(command)  # fmt: skip


@click.group("provider-key", short_help="Manage stored provider credentials.")
def provider_key_group() -> None:
    """Manage stored provider credentials.

    The proxy sends them on routes with a `provider`. They are stored sealed with the first key of `secrets.key_file`. A
    secret is never shown again.

    \b
    keyproxy provider-key add openai --secret-file openai.txt
    keyproxy provider-key add openai --tenant acme --secret-file acme.txt --check
    keyproxy provider-key rotate pvk_… --secret-file new.txt --grace 24h
    """


@provider_key_group.command("add", short_help="Store a secret of a provider.")
@click.argument("provider", metavar="PROVIDER")
@click.option("--tenant", metavar="T", help="Use it for this tenant only. [all tenants without one of their own]")
@click.option("--test", "is_test", is_flag=True, help="Use it for test requests.")
@_secret_options
@takes_call
def provider_key_add(
    call: Call, provider: str, tenant: str | None, secret_path: Path, *, is_test: bool, check: bool
) -> None:
    """Store a secret of a provider. It is used within a second; older ones stay usable until they are revoked."""
    secret = _read(secret_path)
    made = call.run_with_secrets(
        lambda directory: directory.provider_keys.add(provider, secret, tenant_id=tenant, is_test=is_test, check=check)
    )
    call.print_result(made, _COLUMNS)


@provider_key_group.command("list")
@click.option("--provider", metavar="P", help="Only keys of this provider.")
@click.option("--tenant", metavar="T", help="Only this tenant's keys.")
@takes_call
def provider_key_list(call: Call, provider: str | None, tenant: str | None) -> None:
    """List provider keys."""
    rows = call.run(
        lambda directory: all_pages(
            lambda after: directory.provider_keys.list_by_id(after, PAGE, provider=provider, tenant_id=tenant)
        )
    )
    call.print_result(rows, _COLUMNS)


@provider_key_group.command("show")
@_id_argument
@takes_call
def provider_key_show(call: Call, key_id: str) -> None:
    """Show one provider key."""
    call.print_result(call.run(lambda directory: directory.provider_keys.get(key_id)), _COLUMNS)


@provider_key_group.command("rotate", short_help="Replace a secret; the old one stays usable for a while.")
@_id_argument
@_secret_options
@click.option(
    "--grace", default="24h", show_default=True, metavar="TIME", callback=grace_period,
    help="How long the old one stays usable.",
)  # fmt: skip
@takes_call
def provider_key_rotate(call: Call, key_id: str, secret_path: Path, grace: timedelta, *, check: bool) -> None:
    """Replace a provider key by one with another secret, which is used within a second.

    If the upstream refuses the new one, the next requests use the old one until its grace period is over.
    """
    secret = _read(secret_path)
    made = call.run_with_secrets(
        lambda directory: directory.provider_keys.rotate(key_id, secret, grace=grace, check=check)
    )
    call.print_result(made, (*_COLUMNS, "replaces", "old_ends_at"))


@provider_key_group.command("revoke", short_help="Revoke a provider key permanently.")
@_id_argument
@yes_option
@takes_call
def provider_key_revoke(call: Call, key_id: str, *, yes: bool) -> None:
    """Revoke a provider key permanently, within a second.

    While a tenant has only keys that are revoked or have ended, its requests are refused: the shared key is not used.
    """
    confirm(f"Revoke {key_id} permanently?", yes=yes)
    call.print_result(call.run(lambda directory: directory.provider_keys.revoke(key_id)), _COLUMNS)


@provider_key_group.command("delete", short_help="Delete a provider key.")
@_id_argument
@yes_option
@takes_call
def provider_key_delete(call: Call, key_id: str, *, yes: bool) -> None:
    """Delete a provider key. Without the last one of a tenant, its requests use the shared key again."""
    confirm(f"Delete {key_id}?", yes=yes)
    call.print_result(call.run(lambda directory: directory.provider_keys.delete(key_id)), ("id", "deleted"))


@provider_key_group.command("reseal", short_help="Seal all provider keys with the newest key.")
@takes_call
def provider_key_reseal(call: Call) -> int:
    """Seal all provider keys with the first key of `secrets.key_file`. Status 1 if one does not open.

    Add the new key as the first line of the file of every proxy before, and remove the old one after.
    """
    done = call.run_with_secrets(lambda directory: directory.provider_keys.reseal())
    call.print_result(done, ("sealed_with", "resealed", "failed"))
    return 1 if done["failed"] else 0


def _read(path: Path) -> str:
    try:
        raw = sys.stdin.buffer.read(_FILE_BYTES_MAX) if str(path) == "-" else path.read_bytes()[:_FILE_BYTES_MAX]
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from error
    try:
        return raw.decode("ascii").strip(" \t\r\n")
    except UnicodeDecodeError:
        # Without the cause, which quotes the content.
        raise Failure(f"{path}: a secret is one line of visible ASCII characters") from None

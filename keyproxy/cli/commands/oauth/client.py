"""keyproxy oauth client."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click
import orjson

from keyproxy.cli.context import PAGE, Call, all_pages, confirm, takes_call, yes_option
from keyproxy.cli.output import Failure, print_message, showing_secret
from keyproxy.cli.parameters import scopes
from keyproxy.oauth.client import AuthMethod, ClientKind
from keyproxy.store.directory.directory import OAuthClientWish

_COLUMNS: Final = (
    "id", "client_id", "kind", "name", "auth_method", "users", "grants", "disabled_at", "created_at",
)  # fmt: skip

#: The methods by their names in the command.
_METHODS: Final = {
    "client_secret": AuthMethod.CLIENT_SECRET,
    "private_key_jwt": AuthMethod.PRIVATE_KEY_JWT,
    "tls": AuthMethod.TLS_CLIENT_AUTH,
    "none": AuthMethod.NONE,
}
_FILE_BYTES_MAX: Final = 1 << 20

_client_argument = click.argument("client_id", metavar="CLIENT_ID")


@click.group("client", short_help="Manage OAuth clients.")
def client_group() -> None:
    """Manage OAuth clients: the programs that get tokens.

    CLIENT_ID is the id that the client presents, or the id of its row, cli_…

    \b
    keyproxy oauth client create worker --user u_42 --scope jobs:write --auth client_secret
    keyproxy oauth client disable https://app.example/client.json
    """


@client_group.command("create", short_help="Register a client.")
@_client_argument
@click.option("--auth", "method", required=True, type=click.Choice([*_METHODS]), help="How the client authenticates.")
@click.option("--user", "user_id", metavar="USER", help="The user that the client gets tokens for by itself.")
@click.option(
    "--scope", "wanted", multiple=True, callback=scopes, metavar="SCOPE", help="A scope of these tokens; repeatable."
)
@click.option("--test", "is_test", is_flag=True, help="These tokens are for oauth.test_resource.")
@click.option("--redirect-uri", "uris", multiple=True, metavar="URI", help="Where browsers return; repeatable.")
@click.option(
    "--jwks-file", "jwks_path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="The client's public keys, a JSON Web Key Set, for private_key_jwt.",
)  # fmt: skip
@click.option("--tls-subject", metavar="SUBJECT", help="What its certificate has, for tls: dns:NAME, uri:URI or dn:DN.")
@click.option("--name", default="", metavar="NAME", help="The name that users see. [CLIENT_ID]")
@takes_call
def client_create(
    call: Call,
    client_id: str,
    method: str,
    user_id: str | None,
    wanted: tuple[str, ...],
    uris: tuple[str, ...],
    jwks_path: Path | None,
    tls_subject: str | None,
    name: str,
    *,
    is_test: bool,
) -> None:
    """Register a client: a service with --user, an application whose users consent with --redirect-uri, or both.

    \b
    keyproxy oauth client create worker --user u_42 --scope jobs:write --auth client_secret
    keyproxy oauth client create worker --user u_42 --auth private_key_jwt --jwks-file jwks.json
    keyproxy oauth client create worker --user u_42 --auth tls --tls-subject dns:worker.example.com
    """
    wish = OAuthClientWish(
        client_id, _METHODS[method], name, user_id, wanted, is_test=is_test, redirect_uris=uris,
        jwks=None if jwks_path is None else _jwks(jwks_path), tls_subject=tls_subject,
    )  # fmt: skip
    run = call.run_for_secret if wish.auth_method is AuthMethod.CLIENT_SECRET else call.run
    made: dict[str, Any] = run(lambda directory: directory.oauth_clients.create(wish))
    with showing_secret(f"the secret of client {made['id']} is lost: `keyproxy oauth client delete {made['id']}`"):
        call.print_result(made, _COLUMNS)
    if user_id is not None:
        call.warn_of_scopes(wanted, holder="client")
    if made["secret"] is not None and not call.as_json:
        print_message("this is the only time the secret is shown")


@client_group.command("list")
@click.option("--kind", type=click.Choice([kind.value for kind in ClientKind]), help="Only clients of this kind.")
@takes_call
def client_list(call: Call, kind: str | None) -> None:
    """List the clients that have a row: registered ones, and those that a user has consented to."""
    rows = call.run(
        lambda directory: all_pages(lambda after: directory.oauth_clients.list_by_id(after, PAGE, kind=kind))
    )
    call.print_result(rows, _COLUMNS)


@client_group.command("show")
@_client_argument
@takes_call
def client_show(call: Call, client_id: str) -> None:
    """Show one client."""
    call.print_result(call.run(lambda directory: directory.oauth_clients.get(client_id)), _COLUMNS)


@client_group.command("disable", short_help="Refuse a client and its tokens until it is enabled.")
@_client_argument
@takes_call
def client_disable(call: Call, client_id: str) -> None:
    """Refuse a client until it is enabled: it gets no tokens, and its tokens are refused within a second.

    This works before any user has consented: for the URL of a document, an id from registration, and listed:NAME.
    """
    _change(call, client_id, is_disabled=True)


@client_group.command("enable", short_help="Accept a disabled client again.")
@_client_argument
@takes_call
def client_enable(call: Call, client_id: str) -> None:
    """Accept a disabled client again. Its sessions work again, unless they have ended."""
    _change(call, client_id, is_disabled=False)


@client_group.command("delete", short_help="Delete a client with its grants and sessions.")
@_client_argument
@yes_option
@takes_call
def client_delete(call: Call, client_id: str, *, yes: bool) -> None:
    """Delete a client with its grants and sessions.

    A client that is not registered gets a new row when a user consents again: to refuse it, disable it instead.
    """
    confirm(f"Delete client {client_id} with its grants and sessions?", yes=yes)
    call.print_result(call.run(lambda directory: directory.oauth_clients.delete(client_id)), ("id", "deleted"))


def _change(call: Call, client_id: str, *, is_disabled: bool) -> None:
    changes = {"disabled": is_disabled}
    call.print_result(call.run(lambda directory: directory.oauth_clients.change(client_id, changes)), _COLUMNS)


def _jwks(path: Path) -> object:
    try:
        raw = path.read_bytes()[:_FILE_BYTES_MAX]
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from error
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        # Without the cause, which quotes the content: it may be a private key by mistake.
        raise Failure(f"{path}: this is not a JSON Web Key Set") from None

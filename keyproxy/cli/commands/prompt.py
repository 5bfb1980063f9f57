"""keyproxy prompt."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from keyproxy.ai.prompts import SHAPES, digest_of, instructions_of, stored_prompt_text
from keyproxy.cli.context import PAGE, Call, confirm, takes_call
from keyproxy.cli.options import config_option, json_option
from keyproxy.cli.output import Failure, print_message, print_result
from keyproxy.config.categories import category_warnings
from keyproxy.reasons import Refusal
from keyproxy.store.directory.directory import Entity
from keyproxy.store.directory.interface import DirectoryOperations

_COLUMNS: Final = ("digest", "category", "name", "tenant", "created_at")
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
_INPUTS: Final = "FILE; --body FILE --prompt SHAPE; or --stored ID --version V"

_digest_argument = click.argument("digest", metavar="DIGEST")


def _input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name a prompt. The command gets them as `inputs`."""
    names = ("file", "body", "shape", "stored", "version", "digest")

    @functools.wraps(command)
    def called(*arguments: Any, **options: Any) -> Any:
        inputs = {name: options.pop(name, None) for name in names}
        return command(*arguments, inputs=inputs, **options)

    for option in (
        click.option("--version", metavar="V", help="The version of the stored prompt."),
        click.option("--stored", metavar="ID", help="The id of a prompt that is stored upstream (OpenAI)."),
        click.option("--prompt", "shape", type=click.Choice(SHAPES), help="The API of --body."),
        click.option(
            "--body", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE",
            help="The JSON body of a request with these instructions; - is stdin.",
        ),
        click.argument("file", type=click.Path(path_type=Path, allow_dash=True), metavar="[FILE]", required=False),
    ):  # fmt: skip
        called = option(called)
    return called


@click.group("prompt", short_help="Manage prompt templates: categories of system prompts.")
def prompt_group() -> None:
    """Manage prompt templates: system prompts and their categories.

    A route whose `category` includes `template` judges each request by the category of its system prompt. The database
    has only the SHA-256 of a prompt.

    \b
    keyproxy prompt register support.txt --category support
    keyproxy prompt list
    """


@prompt_group.command("register", short_help="Register a system prompt, or change its category.")
@_input_options
@click.option("--digest", metavar="HEX", help="The digest itself, as `keyproxy prompt digest` prints it.")
@click.option("--category", required=True, metavar="C", help="The category of requests with these instructions.")
@click.option("--name", metavar="N", help="A descriptive name.")
@click.option("--tenant", metavar="T", help="Register it for this tenant only.")
@takes_call
def prompt_register(
    call: Call, inputs: dict[str, Any], category: str, name: str | None, tenant: str | None
) -> None:  # fmt: skip
    """Register a system prompt, or change its category. Takes effect within a second.

    FILE has the exact text of the prompt, with every space and newline; - is stdin. With --body, the prompt is that of a
    request.

    \b
    keyproxy prompt register support.txt --category support
    keyproxy prompt register --body request.json --prompt openai --category code --tenant acme
    keyproxy prompt register --stored pmpt_123 --version 2 --category code
    """
    digest = _digest(inputs)
    registered = call.run(
        lambda directory: directory.prompts.register(digest, category, name=name, tenant_id=tenant)
    )  # fmt: skip
    if call.admin_url is None:  # the admin API returns its warnings
        for warning in category_warnings(call.settings().categories, category):
            print_message(f"warning: {warning}")
    call.print_result(registered, _COLUMNS)


@prompt_group.command("list")
@takes_call
def prompt_list(call: Call) -> None:
    """List all prompt templates."""
    call.print_result(call.run(_all), _COLUMNS)


@prompt_group.command("show")
@_digest_argument
@takes_call
def prompt_show(call: Call, digest: str) -> None:
    """Show one prompt template."""
    call.print_result(call.run(lambda directory: directory.prompts.get(digest)), _COLUMNS)


@prompt_group.command("remove")
@_digest_argument
@click.option("--yes", is_flag=True, help="Skip the confirmation in a terminal.")
@takes_call
def prompt_remove(call: Call, digest: str, *, yes: bool) -> None:
    """Remove a prompt template. Its prompt is then unregistered. Takes effect within a second.

    \b
    keyproxy prompt remove 8f434346648f6b96df89dda901c5176b10a6d83961dd3c1ac88b59b2dc327aa4
    """
    # It can be registered again, so a script needs no --yes.
    confirm(f"Remove the prompt template {digest}?", yes=yes or not sys.stdin.isatty())
    call.print_result(call.run(lambda directory: directory.prompts.remove(digest)), ("digest", "deleted"))


@prompt_group.command("digest", short_help="Print the digest of a system prompt.")
@_input_options
@config_option
@json_option
def prompt_digest(inputs: dict[str, Any], config_path: Path | None, *, as_json: bool) -> None:
    """Print the digest of a system prompt. Needs no database.

    \b
    keyproxy prompt digest support.txt
    keyproxy prompt digest --body request.json --prompt anthropic
    """
    del config_path  # every command accepts --config
    digest = _digest(inputs)
    if as_json:
        print_result({"digest": digest}, as_json=True, columns=())
    else:
        click.echo(digest)


async def _all(directory: DirectoryOperations) -> list[Entity]:
    found: list[Entity] = []
    cursor: str | None = None
    while True:
        page = await directory.prompts.list_page(cursor, PAGE)
        found += page.items
        if page.next is None:
            return found
        cursor = page.next


def _digest(inputs: dict[str, Any]) -> str:
    """The digest that the options describe, hexadecimal. Raises Failure, UsageError."""
    forms = [name for name in ("file", "body", "stored", "digest") if inputs[name] is not None]
    if len(forms) != 1:
        raise click.UsageError(f"pass exactly one of: {_INPUTS}")
    if (inputs["shape"] is None) != (inputs["body"] is None):
        raise click.UsageError("pass --body and --prompt together")
    if (inputs["version"] is None) != (inputs["stored"] is None):
        raise click.UsageError("pass --stored and --version together: a prompt without a version can change")
    match forms[0]:
        case "digest":
            if not _DIGEST.fullmatch(inputs["digest"]):
                raise click.UsageError("--digest: a digest has 64 hexadecimal digits")
            return str(inputs["digest"]).lower()
        case "file":
            return _digest_of_text(inputs["file"])
        case "body":
            return _digest_of_body(inputs["body"], inputs["shape"])
        case _:
            text = stored_prompt_text(inputs["stored"], inputs["version"])
            if text is None or "\0" in text[1:]:
                raise click.UsageError("--stored and --version must not be empty or contain ':'")
            return digest_of([text]).hex()


def _digest_of_text(path: Path) -> str:
    content = _read(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: the text is not UTF-8, so no request can contain it") from error
    if "\0" in text:
        raise Failure(f"{path}: the text contains NUL, and the proxy refuses such prompts")
    if text.endswith("\n"):
        print_message(f"warning: {path} ends with a newline, which is part of the prompt")
    return digest_of([text]).hex()


def _digest_of_body(path: Path, shape: str) -> str:
    try:
        document = json.loads(_read(path).decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path}: the proxy does not accept this JSON: {error}") from error
    if not isinstance(document, dict):
        raise Failure(f"{path}: this is not a JSON object")
    try:
        instructions = instructions_of(shape, document)
    except Refusal as refusal:
        raise Failure(f"{path}: the proxy refuses this body: {refusal.detail}") from refusal
    if not instructions.is_registrable:
        raise Failure(f"{path}: this prompt cannot be registered: {instructions.fault}")
    return instructions.digest.hex()


def _read(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object contains a member twice")
    return found

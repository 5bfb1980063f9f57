"""keyproxy key report-leaked|whose: keys in pasted text."""

from __future__ import annotations

import sys
from typing import Final

import click

from keyproxy.auth.api_key import masked
from keyproxy.auth.key_scanner import TEXT_BYTES_MAX, TOO_LONG
from keyproxy.cli.context import KEY_COLUMNS, Call, takes_call
from keyproxy.cli.output import Failure, print_message
from keyproxy.store.directory.directory import Entity
from keyproxy.store.directory.interface import DirectoryOperations
from keyproxy.store.directory.leaked_keys import MATCHES_MAX

_LEAK_COLUMNS: Final = ("agent_token", "key", "session", "client", "user", "tenant", "revoked_now")
_KEY_COLUMNS: Final = tuple(name for name in _LEAK_COLUMNS if name not in ("session", "client"))
_STDIN: Final = "-"


@click.command("report-leaked", short_help="Revoke every key and token in a text on stdin.")
@click.argument("source", metavar="[-]", required=False)
@click.option("--digest", metavar="HEX", help="The SHA-256 of the key, instead of text on stdin.")
@click.option("--reason", default="leaked", show_default=True, help="Why the key is revoked, and where it was found.")
@takes_call
def key_report_leaked(call: Call, source: str | None, digest: str | None, reason: str) -> None:
    """Revoke every key and token in a leaked text, and list their owners.

    For an agent token, the output also has the key that it was cut from, which keeps working: its tokens live for at most
    15 minutes. The session of an OAuth access or refresh token ends. For the secret of an OAuth client, the output has
    the client, which keeps working: create another one, then delete it.

    Reads the text from stdin as found: headers, logs, scripts, JSON, URLs, keys wrapped over lines; or the 64 hexadecimal
    digits of a key's SHA-256. The argument - is stdin, as in other commands. Status 1 if the text contains no key of this
    database, and no token of it, with the reason: none at all, an incomplete one, or an unknown one.

    \b
    keyproxy key report-leaked --reason "public repository" < found.txt
    """
    if source not in (None, _STDIN):
        raise click.UsageError("the command reads stdin: key report-leaked < FILE")
    if source is not None and digest is not None:
        raise click.UsageError("pass either - or --digest")
    text = None if digest is not None else _from_stdin()
    report = call.run(lambda directory: _reported(directory, digest, text, reason))
    if call.as_json:
        call.print_result(report, ())
    elif report["found"]:
        has_oauth = any("client" in leak for leak in report["found"])
        call.print_result(report["found"], _LEAK_COLUMNS if has_oauth else _KEY_COLUMNS)
    reasons = _reasons(report)
    if not report["found"]:
        raise Failure("; ".join(reasons) or "there is no key in this text")
    for reason_given in reasons:
        print_message(reason_given)


@click.command("whose", short_help="Find a key's owner by key, hint, id or name.")
@click.argument("text", metavar="TEXT")
@takes_call
def key_whose(call: Call, text: str) -> None:
    """Show the owner of a key. Changes nothing. TEXT is a key, its hint, its id or its name; - is stdin.

    Pass a key on stdin: an argument is visible to other users of the machine. The first part of a key is sufficient if it
    includes as much as the hint does. For an agent token, the key that it was cut from is shown. Status 1 if there is no
    such key.

    \b
    keyproxy key whose - < found.txt
    keyproxy key whose kp_live_AbCd…wXyZ
    """
    if text != _STDIN and masked(text) != text:
        print_message(
            "warning: a key in an argument can be seen by other users of this machine; pass it on stdin: key whose -"
        )
    wanted = _from_stdin() if text == _STDIN else text.encode("utf-8", "surrogateescape")
    report = call.run(lambda directory: directory.leaked_keys.find(wanted))
    if call.as_json:
        call.print_result(report, ())
    elif report["keys"]:
        call.print_result(report["keys"], KEY_COLUMNS)
    if not report["keys"]:
        raise Failure("there is no such key")
    if len(report["keys"]) == MATCHES_MAX:
        print_message(f"these are the first {MATCHES_MAX} keys: pass more of the hint, or list by user")


def _from_stdin() -> bytes:
    if sys.stdin.isatty():
        click.echo("Paste the text, then Enter and Ctrl-D:", err=True)
    text = sys.stdin.buffer.read(TEXT_BYTES_MAX + 1)
    if len(text) > TEXT_BYTES_MAX:
        raise Failure(TOO_LONG)
    if not text.strip():
        raise Failure("there is no key in this text: stdin is empty")
    return text


async def _reported(directory: DirectoryOperations, digest: str | None, text: bytes | None, reason: str) -> Entity:
    if text is not None:
        return await directory.leaked_keys.report_text(text, reason)
    found = await directory.leaked_keys.report_digest(_hex_digest(digest or ""), reason)
    if not found["known"]:
        return {"found": [], "incomplete": 0, "unknown": 1}
    leak = {**_subject(found), **{name: found[name] for name in ("user", "tenant", "revoked_now")}}
    return {"found": [leak], "incomplete": 0, "unknown": 0}


def _subject(found: Entity) -> Entity:
    """Which key, token or client a report on one digest is about."""
    token, key = found.get("agent_token"), found["key"]
    if token is not None:
        return {"agent_token": token["id"], "key": token["key"]}
    if key is not None:
        return {"key": key["id"]}
    return {name: found[name] for name in ("session", "client") if name in found}


def _reasons(report: Entity) -> list[str]:
    """Describe what remains to be done: secrets that still work, and keys that are unknown, incomplete or mistyped."""
    reasons = [
        f"the secret of the client {leak['client']} still works: create another client, then delete this one"
        for leak in report["found"]
        if "client" in leak and "session" not in leak
    ]
    if report["unknown"]:
        count, verb = _counted(report["unknown"])
        reasons.append(
            f"there is no such key: {count} {verb} not in this database, or deleted, or a token of the admin API"
        )
    if report["incomplete"]:
        count, verb = _counted(report["incomplete"])
        reasons.append(
            f"{count} {verb} incomplete or mistyped: paste the whole key, or find it by its first part with"
            " `keyproxy key whose`"
        )
    return reasons


def _counted(number: int) -> tuple[str, str]:
    return ("1 key", "is") if number == 1 else (f"{number} keys", "are")


def _hex_digest(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise click.BadParameter("a digest is 64 hexadecimal digits") from error

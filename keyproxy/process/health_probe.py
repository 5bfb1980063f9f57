"""`keyproxy health`: check through its control socket whether the process of this configuration is live.

Works for `keyproxy serve`, `admin` and `authorize`, regardless of their addresses and of TLS. It imports only
what it needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from keyproxy.platform import process_registry, standard_streams
from keyproxy.platform.process_registry import ADMIN, AUTHORIZE, SERVE

_LIVE: Final = 0
_NOT_LIVE: Final = 1
_MISUSED: Final = 2

#: The table of the configuration with the address of each purpose.
_TABLES: Final = {SERVE: "listen", ADMIN: "admin", AUTHORIZE: "oauth"}


class NotLive(Exception):
    """No process of this configuration is running, or one does not respond. The text names it."""


class Misused(Exception):
    """The configuration cannot be used, because of `problems`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def check(path: str) -> list[process_registry.Running]:
    """The processes of the configuration at `path`, all of them live. Empty path: all that run here, as in a container.

    Raises NotLive, Misused.
    """
    found = _of_file(path) if path else process_registry.here()
    if not found:
        raise NotLive("no `keyproxy serve`, `admin` or `authorize` of this user is running here")
    for one in found:
        if not process_registry.is_live(one):
            raise NotLive(f"`keyproxy {one.presence.purpose}` (pid {one.pid}) does not respond")
    return found


def _of_file(path: str) -> list[process_registry.Running]:
    try:
        # The addresses suffice in most cases, and loading the whole configuration takes longer.
        found = process_registry.of_addresses(_stated(path, os.environ))
    except (OSError, ValueError):
        found = []  # loading it reports the problem
    if found:
        return found
    from pathlib import Path

    from keyproxy.config import loader

    try:
        settings = loader.load(Path(path), os.environ).settings
    except loader.ConfigError as error:
        raise Misused(error.problems) from error
    mains = {SERVE: settings.listen.address, ADMIN: settings.admin.address, AUTHORIZE: settings.oauth.address}
    try:
        found = process_registry.of_addresses(mains)
    except OSError as error:
        raise NotLive(f"{mains}: {error.strerror or error}") from error
    if not found:
        raise NotLive(
            f"no `keyproxy serve` of this user is running on {mains[SERVE]}, no `keyproxy admin` on {mains[ADMIN]}, and"
            f" no `keyproxy authorize` on {mains[AUTHORIZE]}"
        )
    return found


def _stated(path: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The addresses that a configuration states. Raises OSError, ValueError."""
    import tomllib

    stated: dict[str, str] = {}
    for file in filter(None, (environment.get("KEYPROXY_DEFAULTS"), path)):
        with open(file, "rb") as opened:  # noqa: PTH123 - pathlib takes long to import
            tables = tomllib.load(opened)
        for purpose, table in _TABLES.items():
            address = tables.get(table, {}).get("address")
            if isinstance(address, str):
                stated[purpose] = address
    for purpose, table in _TABLES.items():
        if (variable := f"KEYPROXY_{table.upper()}__ADDRESS") in environment:
            stated[purpose] = environment[variable]
    return stated


def is_plain(arguments: Sequence[str]) -> bool:
    """Whether the arguments are `health` or `health --config FILE`, which need no parser."""
    return list(arguments) == ["health"] or (len(arguments) == 3 and list(arguments[:2]) == ["health", "--config"])


def main(arguments: Sequence[str]) -> int:
    """Run `keyproxy health` with plain arguments. Returns the exit status."""
    try:
        found = check(arguments[2] if len(arguments) == 3 else os.environ.get("KEYPROXY_CONFIG", ""))
    except NotLive as error:
        return _end(_NOT_LIVE, str(error))
    except Misused as error:
        return _end(_MISUSED, *error.problems)
    return _end(_LIVE, described(found))


def described(found: Sequence[process_registry.Running]) -> str:
    """One line that names the live processes."""
    return ", ".join(f"`keyproxy {one.presence.purpose}` (pid {one.pid}) is live" for one in found)


def _end(status: int, *lines: str) -> int:
    try:
        for line in lines:
            print(f"keyproxy: {line}", file=sys.stderr)  # noqa: T201
    except OSError:
        # The exit status is the result, even if the message cannot be written.
        standard_streams.abandon(sys.stderr.fileno())
    return status

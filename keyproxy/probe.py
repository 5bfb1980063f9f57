"""`keyproxy health`: whether the process of this configuration is live, asked on its control socket.

Works for `keyproxy serve` and `keyproxy admin`, wherever they listen and whether or not they speak TLS. Nothing is
imported that this does not need.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from keyproxy import config, presence
from keyproxy.sockets import BindError

_LIVE: Final = 0
_NOT_LIVE: Final = 1
_MISUSED: Final = 2


class NotLive(Exception):
    """No process of this configuration runs here, or one does not answer. The text says which."""


def check(path: Path | None) -> list[presence.Running]:
    """The processes of this configuration, all of which are live. None: all that run here, as in a container.

    Raises NotLive, ConfigError, BindError.
    """
    if path is None:
        found = presence.here()
        if not found:
            raise NotLive("no keyproxy of this user runs here")
    else:
        settings = config.load(path, os.environ).settings
        found = presence.of_configuration(settings, presence.SERVE, presence.ADMIN)
        if not found:
            raise NotLive(
                f"no keyproxy of this user serves {settings.listen.address}, and no admin API {settings.admin.address}"
            )
    for one in found:
        if not presence.is_live(one):
            raise NotLive(f"`keyproxy {one.presence.purpose}` (pid {one.pid}) does not answer")
    return found


def is_plain(arguments: Sequence[str]) -> bool:
    """Whether these are `health` or `health --config FILE`, which need no parser."""
    return list(arguments) == ["health"] or (len(arguments) == 3 and list(arguments[:2]) == ["health", "--config"])


def main(arguments: Sequence[str]) -> int:
    """Run `keyproxy health` with arguments that are plain; its status."""
    chosen = arguments[2] if len(arguments) == 3 else os.environ.get("KEYPROXY_CONFIG", "")
    try:
        check(Path(chosen) if chosen else None)
    except config.ConfigError as error:
        return _end(_MISUSED, *error.problems)
    except (NotLive, BindError) as error:
        return _end(_NOT_LIVE, str(error))
    return _LIVE


def _end(status: int, *problems: str) -> int:
    for problem in problems:
        print(f"keyproxy: {problem}", file=sys.stderr)  # noqa: T201
    return status

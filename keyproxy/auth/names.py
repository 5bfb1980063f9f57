"""The valid names of scopes, roles and agents, and the valid ids of users."""

from __future__ import annotations

import re
from typing import Final

_SCOPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
_ROLE: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}")
_AGENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_scope(text: str) -> bool:
    """Whether this is a valid scope, such as `jobs:write`; no wildcards, no spaces."""
    return _SCOPE.fullmatch(text) is not None


def is_role(text: str) -> bool:
    """Whether this is a valid name of a role or of a kind of owned ids, such as `reader`."""
    return _ROLE.fullmatch(text) is not None


def is_agent(text: str) -> bool:
    """Whether this is a valid id of an agent, such as `crawler`."""
    return _AGENT.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether this is a valid id of a user, tenant or key, such as `u_42`."""
    return _ID.fullmatch(text) is not None

"""The valid ids of users, tenants and keys, and the valid names of scopes and agents: keyproxy's patterns."""

from __future__ import annotations

import re
from typing import Final

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}")
_SCOPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
_AGENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_id(text: str) -> bool:
    """Whether this is a valid id of a user, tenant or key, such as `u_42`. It is safe in a header and as a file name."""
    return _ID.fullmatch(text) is not None


def is_scope(text: str) -> bool:
    """Whether this is a valid scope, such as `jobs:write`."""
    return _SCOPE.fullmatch(text) is not None


def is_agent(text: str) -> bool:
    """Whether this is a valid id of an agent, such as `crawler`."""
    return _AGENT.fullmatch(text) is not None

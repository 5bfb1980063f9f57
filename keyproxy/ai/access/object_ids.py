"""The form of ids of the upstream's objects: of values that a route binds to a tenant, and of ids that a tenant owns."""

from __future__ import annotations

import re
from typing import Final

#: The same as the constraint of the table `owned`. Any other text could be read differently by the upstream.
_ID: Final = re.compile(r"[A-Za-z0-9._:@|+~/=,!$-]{1,256}")
_EMPTY_OR_DOTS: Final = re.compile(r"(?:^|/)[.]{0,2}(?:/|$)")


def is_object_id(text: str) -> bool:
    """Whether a text is an id: a path of visible ASCII without empty, `.` or `..` segments."""
    return _ID.fullmatch(text) is not None and _EMPTY_OR_DOTS.search(text) is None

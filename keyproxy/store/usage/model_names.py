"""The model names in records, which are bounded and contain no secret: clients can send any."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from keyproxy.auth.api_key import masked

#: In place of a name that is not recorded.
OTHER: Final = "other"

#: Names that are not configured, for each user and day.
_UNLISTED_MAX: Final = 64


class ModelNames:
    """Replace the names of models that are not configured by OTHER, once a user has sent too many of them on one day, and
    those that contain a key or token of any kind: a program that mixes up its settings sends one as a model."""

    def __init__(self, listed: Collection[str] = ()) -> None:
        """`listed`: the names of configured models, which are always kept."""
        self.listed = frozenset(listed) | {"", OTHER}
        self._day = -1
        self._seen: dict[str, set[str]] = {}

    def __repr__(self) -> str:
        return f"<ModelNames: {sum(map(len, self._seen.values()))} unlisted of {len(self._seen)} users>"

    def kept(self, name: str, user_id: str, day: int) -> str:
        """The name to record for a request of this user."""
        if name in self.listed:
            return name
        if day != self._day:
            self._day = day
            self._seen.clear()
        seen = self._seen.setdefault(user_id, set())
        if name in seen:
            return name
        if len(seen) >= _UNLISTED_MAX or masked(name) != name:
            return OTHER
        seen.add(name)
        return name

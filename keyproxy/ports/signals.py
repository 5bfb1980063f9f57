"""The port to the records of signals: what keys were used with, and what is unusual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

from keyproxy.mypyc_compat import mypyc_attr

NEW_MODEL: Final = "new_model"
NEW_NETWORK: Final = "new_network"
VELOCITY: Final = "velocity"
BURST: Final = "burst"
PROBING: Final = "probing"
FAILURES: Final = "failures"

#: In a set of known habits: the key has as many networks as are learned.
MANY: Final = b"many"


class KnownValues(Protocol):
    """The stored habits of a key."""

    def add(self, value: bytes, /) -> None:
        """Add one."""
        ...


class Habit(NamedTuple):
    """A model or network that a key was used with. `kind`: the signal that it raises if it is new to the key.

    `known`: of the same kind; receives the value once it is stored, or MANY.
    """

    key_id: str
    kind: str
    value: bytes
    client: str | None
    known: KnownValues


class Signal(NamedTuple):
    """Something unusual about a key, or about a network if `key_id` is None.

    `value`: what is reported once in an hour. `may_suspend`: it is about traffic of this key alone. `shared_since`: Unix
    time since when another key of the same rotations may have caused it; None: it cannot have. `baseline`: as many
    requests since yesterday are reason enough for it; None: no number is.
    """

    kind: str
    key_id: str | None
    network: str
    value: str
    client: str | None
    observed: Mapping[str, float]
    may_suspend: bool = False
    shared_since: float | None = None
    baseline: int | None = None


@mypyc_attr(allow_interpreted_subclasses=True)
class Signals:
    """Records habits and signals. Never waits, and drops what exceeds its queue."""

    def learn(self, habit: Habit) -> None:
        """Store a habit. If it is new to a key that is known for a day, it is a signal."""
        raise NotImplementedError

    def report(self, signal: Signal) -> None:
        """Report a signal, and suspend its key if that is configured."""
        raise NotImplementedError

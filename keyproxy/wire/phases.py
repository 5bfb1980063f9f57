"""The phases of an exchange, of its response and of a client connection: literal tables of the allowed transitions.

A transition that is not in its table raises: the object is then in a state for which nothing was designed, and the
outermost boundary ends the connection.

Phases are numbers, not members of an enum, which hashes its members in Python code: a step through a table keyed by
them took 270 ns, and a request makes six steps in about 10 µs. So a table holds one bit mask per phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final


class IllegalTransitionError(Exception):
    """A transition that is not in its table."""


class PhaseTable:
    """The allowed transitions between the phases of one kind of object; `names` in the order of their numbers."""

    __slots__ = ("_masks", "names")

    def __init__(self, names: Sequence[str], transitions: Mapping[int, Sequence[int]]) -> None:
        self.names: Final = tuple(names)
        self._masks: Final[tuple[int, ...]] = tuple(
            [sum([1 << to for to in transitions[phase]]) for phase in range(len(names))]
        )

    def step(self, phase: int, to: int) -> int:
        """Return the phase `to`, if it may follow `phase`."""
        if not self._masks[phase] & (1 << to):
            raise IllegalTransitionError(f"{self.names[phase]} -> {self.names[to]}")
        return to


# -- an exchange: one request and its response

#: The gateway decides; for that it may wait for an identity, the ledger or the whole body.
DECIDING: Final = 0
#: Permitted, but no byte of the announced body has arrived.
AWAITING_BODY: Final = 1
#: The proxy itself produces the response.
SERVING: Final = 2
#: In the queue for an upstream connection.
CONNECTING: Final = 3
#: The request is being sent, or was sent. No response yet.
REQUESTED: Final = 4
#: Only interim responses (1xx) have arrived. The request must not be sent again.
INFORMED: Final = 5
#: The response is being relayed.
RESPONDING: Final = 6
#: The response is not read until more tokens are held for it.
PAUSED: Final = 7
#: Bytes are relayed unchanged, both ways.
TUNNEL: Final = 8
OVER: Final = 9

EXCHANGE_TRANSITIONS: Final[dict[int, tuple[int, ...]]] = {
    DECIDING: (AWAITING_BODY, SERVING, CONNECTING, REQUESTED, OVER),
    AWAITING_BODY: (CONNECTING, REQUESTED, OVER),
    SERVING: (OVER,),
    CONNECTING: (REQUESTED, OVER),
    REQUESTED: (CONNECTING, INFORMED, RESPONDING, TUNNEL, OVER),  # CONNECTING: the one retry
    INFORMED: (RESPONDING, TUNNEL, OVER),
    RESPONDING: (PAUSED, OVER),
    PAUSED: (RESPONDING, OVER),
    TUNNEL: (OVER,),
    OVER: (),
}
EXCHANGE: Final = PhaseTable(
    (
        "deciding", "awaiting body", "serving", "connecting", "requested", "informed", "responding", "paused", "tunnel",
        "over",
    ),
    EXCHANGE_TRANSITIONS,
)  # fmt: skip

# -- its response, as written to the client

#: A refusal can still replace it. At most the bytes that all responses begin with were sent.
UNSENT: Final = 0
#: The upstream's head is held back until the bytes that arrived with it are checked. A refusal can still replace it.
HELD_BACK: Final = 1
#: Some of it was sent: it continues, or is cut off visibly.
BEGUN: Final = 2
#: All of it was sent, or all that will be.
ENDED: Final = 3

RESPONSE_TRANSITIONS: Final[dict[int, tuple[int, ...]]] = {
    UNSENT: (HELD_BACK, BEGUN, ENDED),
    HELD_BACK: (BEGUN, ENDED),
    BEGUN: (ENDED,),
    ENDED: (),
}
RESPONSE: Final = PhaseTable(("unsent", "held back", "begun", "ended"), RESPONSE_TRANSITIONS)

# -- the socket of a client

OPEN: Final = 0
#: The client has closed its sending side, and may still read.
HALF_CLOSED: Final = 1
#: The response was sent; the rest of the request is discarded so that the client can read it.
LINGERING: Final = 2
#: Nothing more is read or written; what was written may still be on its way.
CLOSING: Final = 3
LOST: Final = 4

SOCKET_TRANSITIONS: Final[dict[int, tuple[int, ...]]] = {
    OPEN: (HALF_CLOSED, LINGERING, CLOSING, LOST),
    HALF_CLOSED: (CLOSING, LOST),
    LINGERING: (CLOSING, LOST),
    CLOSING: (LOST,),
    LOST: (),
}
SOCKET: Final = PhaseTable(("open", "half-closed", "lingering", "closing", "lost"), SOCKET_TRANSITIONS)

# -- the reading of what a client has sent

RESTING: Final = 0
#: A call further up the stack reads the buffer.
READING: Final = 1
#: The loop's next iteration continues with the buffer. Until then nothing more is read.
DUE: Final = 2

READING_TRANSITIONS: Final[dict[int, tuple[int, ...]]] = {
    RESTING: (READING,),
    READING: (RESTING, DUE),
    DUE: (RESTING,),
}
READ: Final = PhaseTable(("resting", "reading", "due"), READING_TRANSITIONS)

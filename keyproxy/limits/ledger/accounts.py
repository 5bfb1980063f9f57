"""What the ledger stores, as values in memory: the accounts of windows and leases, and their holders."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from keyproxy.limits.ledger_protocol import Window

#: A window and the Unix time at which it starts.
WindowStart = tuple[Window, int]


@dataclass
class WindowAccount:
    """The account of one window.

    `theoretical`: of a rate, see `gcra`; of another window with many holders, the end of the schedule of messages.
    """

    spent: int = 0
    held: int = 0
    forfeited: int = 0
    credited: int = 0
    theoretical: float = -math.inf
    wanted_at: float = -math.inf
    wanted_by: str = ""
    recalled_at: float = -math.inf
    limit: int = 0
    #: How many holders its predecessor had when this window was opened, and until when as many are expected here.
    carried: int = 0
    carried_until: float = -math.inf
    #: The number of leases of each holder that has any.
    leases: Counter[str] = field(default_factory=Counter)

    def holders(self, now: float) -> int:
        """The number of holders, or of those that are expected."""
        return max(1, len(self.leases), self.carried if now < self.carried_until else 0)


@dataclass
class LeaseAccount:
    """The account of one lease. Figures are cumulative since its start."""

    key: WindowStart
    granted: int = 0
    used: int = 0
    returned: int = 0
    is_recalled: bool = False

    @property
    def outstanding(self) -> int:
        """The units that the window holds for the lease."""
        return self.granted - self.used - self.returned


@dataclass
class Holder:
    """A process with leases. If it expires without any, it `rests` until its next message."""

    serial: int
    expires_at: float
    has_ended: bool = False
    rests: bool = False
    leases: dict[int, LeaseAccount] = field(default_factory=dict)

    @property
    def is_live(self) -> bool:
        """Whether it has neither ended nor rests; it may have expired."""
        return not (self.has_ended or self.rests)


Replica = tuple[dict[WindowStart, WindowAccount], dict[str, Holder]]

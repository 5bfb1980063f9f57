"""Counts of calls of tools. A label is the name of a configured tool, or `other`, and never from a client."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.models import OTHER
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason

#: Refusals with an outcome of their own; all others are `refused`.
REFUSALS: Final = (Reason.TOOL_NOT_ALLOWED, Reason.APPROVAL_REQUIRED, Reason.APPROVAL_DENIED)


class ToolCounts:
    """Calls that have ended, by tool and outcome.

    The outcome is that of the request, or the code of one of REFUSALS. OTHER stands for whatever has no row.
    """

    def __init__(self) -> None:
        self.calls: Final[dict[tuple[str, ...], int]] = {}

    def add(self, exchange: Exchange, outcome: str) -> None:
        """Count the call of an exchange, or an attempt to call what is no tool."""
        call, reason = exchange.tool_call, exchange.reason
        if reason is not None and reason in REFUSALS:
            outcome = reason.code
        key = (OTHER if call is None else call.tool.name, outcome)
        self.calls[key] = self.calls.get(key, 0) + 1

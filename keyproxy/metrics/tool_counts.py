"""Counts of calls of tools and of approvals. A label is from the configuration, or `other`, and never from a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from keyproxy.ai.models import OTHER
from keyproxy.ai.tools.tool import NO_APPROVAL
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.model import Ending
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason

#: Refusals with an outcome of their own; all others are `refused`.
REFUSALS: Final = (Reason.TOOL_NOT_ALLOWED, Reason.APPROVAL_REQUIRED, Reason.APPROVAL_DENIED)

_OUTCOMES: Final = (
    "ok",
    *(ending.value for ending in Ending if ending is not Ending.COMPLETED),
    *(reason.code for reason in REFUSALS),
)

#: The outcomes of a claim of an approval.
_STATES: Final = ("pending", "used", "denied", "limit", "unavailable")


class ToolCounts:
    """Calls that have ended, by tool and outcome.

    The outcome is that of the request, or the code of one of REFUSALS. OTHER stands for whatever has no row.
    """

    def __init__(self) -> None:
        self._calls: Final[dict[tuple[str, ...], int]] = {}

    def add(self, exchange: Exchange, outcome: str) -> None:
        """Count the call of an exchange, or an attempt to call what is no tool."""
        call, reason = exchange.tool_call, exchange.reason
        if reason is not None and reason in REFUSALS:
            outcome = reason.code
        key = (OTHER if call is None else call.tool.name, outcome)
        self._calls[key] = self._calls.get(key, 0) + 1

    def of(self, tools: Sequence[ToolRow]) -> dict[tuple[str, ...], float]:
        """All calls. Series of these tools, and of OTHER if there are any, start at 0."""
        names = [*(tool.name for tool in tools), OTHER] if tools else []
        calls: dict[tuple[str, ...], float] = {(name, outcome): 0 for name in names for outcome in _OUTCOMES}
        return {**calls, **self._calls}


def approvals(counted: Mapping[tuple[str, ...], float], tools: Sequence[ToolRow]) -> dict[tuple[str, ...], float]:
    """Approvals by kind and state. Series of the kinds that these tools have start at 0."""
    kinds = {tool.approval for tool in tools} - {NO_APPROVAL}
    states: dict[tuple[str, ...], float] = {(kind, state): 0 for kind in kinds for state in _STATES}
    return {**states, **counted}

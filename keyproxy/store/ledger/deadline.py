"""Wait for a store on behalf of one request: within its time budget, over all rounds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from keyproxy.model import PATIENCE_SECONDS, Moment, TimeBudget
from keyproxy.reasons import Reason, Refusal


@contextlib.asynccontextmanager
async def within(patience: TimeBudget, now: Callable[[], Moment]) -> AsyncIterator[None]:
    """Limit the enclosed wait to the remaining time budget, and deduct the time that it took.

    Raises a Refusal (LEDGER_UNAVAILABLE) when the budget is spent: a timeout is not a "no".
    """
    began = now().mono_seconds
    try:
        async with asyncio.timeout(patience.seconds_left):
            yield
    except TimeoutError as error:
        raise Refusal(Reason.LEDGER_UNAVAILABLE, f"timeout: no response within {PATIENCE_SECONDS:g} s") from error
    finally:
        patience.seconds_left = max(0.0, patience.seconds_left - (now().mono_seconds - began))

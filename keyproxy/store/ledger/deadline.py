"""Waiting for a store on behalf of one request: no longer than that request has patience for, in all its rounds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from keyproxy.model import PATIENCE_SECONDS, Moment, TimeBudget
from keyproxy.reasons import Reason, Refusal


@contextlib.asynccontextmanager
async def within(patience: TimeBudget, now: Callable[[], Moment]) -> AsyncIterator[None]:
    """Wait inside for as long as there is patience left, and take from it how long that took.

    Raises a Refusal (LEDGER_UNAVAILABLE) when there is none left: what did not answer in time has not said no.
    """
    began = now().mono_seconds
    try:
        async with asyncio.timeout(patience.seconds_left):
            yield
    except TimeoutError as error:
        raise Refusal(Reason.LEDGER_UNAVAILABLE, f"no answer within {PATIENCE_SECONDS:g} s") from error
    finally:
        patience.seconds_left = max(0.0, patience.seconds_left - (now().mono_seconds - began))

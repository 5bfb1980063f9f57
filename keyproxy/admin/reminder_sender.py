"""Sends reminders of keys and admin tokens that expire soon to the webhook: signed, retried for most of a day, then
abandoned.

A reminder is claimed, sent and marked. If the sender dies in between or cannot mark it, it is sent again under the same
id; see `store.directory.reminders`. This allows one sender per admin process, and a cron job as well.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import aiohttp
import orjson

from keyproxy.config import schema
from keyproxy.http import webhook_signature
from keyproxy.platform import clock
from keyproxy.store.directory.reminders import Reminder, ReminderQueue, subject
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable
from keyproxy.store.postgres.times import time_text

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 30.0
_ATTEMPT_SECONDS: Final = 15.0
_BATCH: Final = 20
#: Well beyond the duration of an attempt: a sender with an older claim is presumed dead.
_LEASE: Final = timedelta(seconds=60)

#: Attempts are made after 10 s, 1 min, 6 min, 36 min, 3.6 h, and then every 6 h: nine of them in 22 h.
_ATTEMPTS_MAX: Final = 9
_FIRST_DELAY_SECONDS: Final = 10.0
_DELAY_GROWTH: Final = 6
_DELAY_SECONDS_MAX: Final = 6 * 3600.0

#: The receiver unsubscribes. Standard Webhooks, "Responding to webhooks".
_GONE: Final = 410


@dataclass(slots=True)
class Outcome:
    """The results of sending: delivered reminders, failed attempts, abandoned reminders."""

    sent: int = 0
    failed: int = 0
    given_up: int = 0


@dataclass(frozen=True, slots=True)
class _Failed:
    why: str
    is_final: bool = False


@dataclass(slots=True)
class ReminderSender:
    """Sends due reminders. `total` counts the results since the process started."""

    reminders: ReminderQueue
    lease: timedelta = _LEASE
    attempt_seconds: float = _ATTEMPT_SECONDS
    total: Outcome = field(default_factory=Outcome)

    async def run(self, terms: Callable[[], schema.ReminderSettings]) -> None:
        """Send due reminders until cancelled. `terms` may change; nothing is sent while they have no URL."""
        was_down = False
        while True:
            try:
                if terms().webhook_url:
                    await self.turn(terms())
                was_down = False
            except (StoreUnavailable, StoreConflict) as error:
                if not was_down and not self.reminders.is_store_down:
                    _log.warning("cannot send reminders, will retry: %s", error)
                was_down = True
            except Exception:  # noqa: BLE001 - an outermost boundary: the admin API goes on
                _log.exception("sending reminders failed with an internal error")
            await asyncio.sleep(_LOOK_SECONDS)

    async def turn(self, terms: schema.ReminderSettings) -> Outcome:
        """Record due reminders and send those whose time has come. Raises StoreUnavailable, StoreConflict."""
        turn = Outcome()
        await self.reminders.write(terms.before_days)
        for _, what, why in await self.reminders.given_up_late():
            self._note_given_up(what, f"already expired; {why}", turn)
        timeout = aiohttp.ClientTimeout(total=self.attempt_seconds)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            while claimed := await self.reminders.claim(_BATCH, self.lease):
                sent_before = turn.sent
                sending = (self._send(session, terms, reminder, turn) for reminder in claimed)
                # Send and mark each reminder even if marking another one fails.
                for ended in await asyncio.gather(*sending, return_exceptions=True):
                    if isinstance(ended, BaseException):
                        raise ended
                if turn.sent == sent_before:
                    break  # if the receiver accepts none of a batch, the rest waits for the next round
        return turn

    async def _send(
        self, session: aiohttp.ClientSession, terms: schema.ReminderSettings, reminder: Reminder, turn: Outcome
    ) -> None:
        failed = await _attempted(session, terms, reminder)
        if failed is None:
            self.total.sent += 1
            turn.sent += 1
            await self.reminders.sent(reminder)
            return
        self.total.failed += 1
        turn.failed += 1
        if failed.is_final or reminder.attempts >= _ATTEMPTS_MAX:
            await self.reminders.failed(reminder, failed.why, None)
            self._note_given_up(subject(reminder.key, reminder.token), failed.why, turn)
            return
        again_in = _delay(reminder.attempts)
        await self.reminders.failed(reminder, failed.why, again_in)
        _log.warning(
            "reminder of %s failed, attempt %d: %s; retry in %d s",
            subject(reminder.key, reminder.token),
            reminder.attempts,
            failed.why,
            again_in.total_seconds(),
        )

    def _note_given_up(self, what: str, why: str, turn: Outcome) -> None:
        self.total.given_up += 1
        turn.given_up += 1
        _log.error("reminder of %s abandoned: %s", what, why)


def body(reminder: Reminder) -> bytes:
    """The webhook's payload: contains no secret, and is the same for each attempt unless the key changes."""
    if reminder.token is not None:
        what: dict[str, object] = {"token": reminder.token, "tenant": reminder.tenant}
    else:
        mode = "test" if reminder.is_test else "live"
        what = {"key": reminder.key, "user": reminder.user, "tenant": reminder.tenant, "mode": mode}
    return orjson.dumps(
        {
            "type": "key.expiring" if reminder.token is None else "admin_token.expiring",
            "timestamp": time_text(reminder.created_at),
            "data": {
                **what,
                "hint": reminder.hint,
                "name": reminder.name,
                "expires_at": time_text(reminder.expires_at),
                "before_days": reminder.before_days,
            },
        }
    )


async def _attempted(
    session: aiohttp.ClientSession, terms: schema.ReminderSettings, reminder: Reminder
) -> _Failed | None:
    content = body(reminder)
    signed = webhook_signature.headers(
        webhook_signature.key_of(terms.webhook_secret), reminder.id, int(clock.now().wall_seconds), content
    )
    headers = {**signed, "Content-Type": "application/json", "User-Agent": "keyproxy"}
    try:
        # Redirects are not followed: the signature is for one receiver only. The response body is not read.
        async with session.post(terms.webhook_url, data=content, headers=headers, allow_redirects=False) as response:
            status = response.status
    except TimeoutError:
        return _Failed(f"timeout: no response within {session.timeout.total:g} s")
    except (aiohttp.ClientError, OSError) as error:
        return _Failed(f"{type(error).__name__}: {error}")
    if 200 <= status < 300:
        return None
    return _Failed(f"the receiver responded with status {status}", is_final=status == _GONE)


def _delay(attempts: int) -> timedelta:
    """The pause after a number of attempts, with 20 % jitter so that retries spread out."""
    seconds = min(_DELAY_SECONDS_MAX, _FIRST_DELAY_SECONDS * _DELAY_GROWTH ** (attempts - 1))
    return timedelta(seconds=seconds * (0.8 + secrets.randbelow(4001) / 10_000))

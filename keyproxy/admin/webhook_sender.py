"""Sends messages of an outbox to a webhook: signed, retried for most of a day, then abandoned.

A message is claimed, sent and marked. If the sender dies in between or cannot mark it, it is sent again under the same
id; see `store.outbox`. This allows one sender per admin process, and a cron job as well.

A sender that has to be prompt looks for messages once a second, also while a slow receiver keeps earlier ones waiting.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Protocol

import aiohttp

from keyproxy.http import webhook_signature
from keyproxy.platform import clock
from keyproxy.platform.tasks import cancel_all
from keyproxy.store.outbox.message import Abandoned, Message
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 30.0
_ATTEMPT_SECONDS: Final = 15.0

#: How often a prompt sender looks for messages. Each look during the longest attempt has a turn of its own.
PROMPT_LOOK_SECONDS: Final = 1.0
PROMPT_TURNS_MAX: Final = 16
#: What a turn of a prompt sender sends at once: more new messages in a second wait for the next look.
PROMPT_BATCH: Final = 200
_BATCH: Final = 20

#: Attempts are made after 10 s, 1 min, 6 min, 36 min, 3.6 h, and then every 6 h: nine of them in 22 h.
_ATTEMPTS_MAX: Final = 9
_FIRST_DELAY_SECONDS: Final = 10.0
_DELAY_GROWTH: Final = 6
_DELAY_SECONDS_MAX: Final = 6 * 3600.0

#: The receiver unsubscribes. Standard Webhooks, "Responding to webhooks".
_GONE: Final = 410


class Webhook(Protocol):
    """The receiver. Nothing is sent without a URL."""

    @property
    def webhook_url(self) -> str: ...
    @property
    def webhook_secret(self) -> str: ...


class Outbox(Protocol):
    """Where messages come from. All methods raise StoreUnavailable."""

    @property
    def is_store_down(self) -> bool:
        """Whether the store is known to be down; the outage has been logged."""
        ...

    async def prepare(self) -> Sequence[Abandoned]:
        """Write the messages that are due. Return those that will not be sent any more."""
        ...

    async def claim(self, limit: int) -> Sequence[Message]:
        """Claim at most `limit` messages to send now. No other sender gets them before the claim expires."""
        ...

    async def sent(self, message: Message) -> None:
        """Mark a message as received."""
        ...

    async def failed(self, message: Message, why: str, again_in: timedelta | None) -> None:
        """Record a failed attempt, and retry after `again_in`; None abandons the message."""
        ...


@dataclass(slots=True)
class Outcome:
    """The results of sending: delivered messages, failed attempts, abandoned messages."""

    sent: int = 0
    failed: int = 0
    given_up: int = 0


@dataclass(frozen=True, slots=True)
class _Failed:
    why: str
    is_final: bool = False


#: The results of a message, as in Outcome. FAILED is one attempt.
SENT: Final = "sent"
FAILED: Final = "failed"
GIVEN_UP: Final = "given_up"
RESULTS: Final = (SENT, FAILED, GIVEN_UP)


@dataclass(slots=True)
class WebhookSender:
    """Sends the messages of one outbox. `what`: their kind, for the log. `total`: the results since the start.

    It looks for messages every `look_seconds`, unless `turns_max` earlier turns are still sending.
    """

    outbox: Outbox
    what: str = "reminders"
    attempt_seconds: float = _ATTEMPT_SECONDS
    look_seconds: float = _LOOK_SECONDS
    turns_max: int = 1
    batch: int = _BATCH
    total: Outcome = field(default_factory=Outcome)
    _by_kind: dict[tuple[str, ...], int] = field(default_factory=dict, repr=False)
    _is_failing: bool = field(default=False, repr=False)

    @property
    def results(self) -> Mapping[tuple[str, ...], int]:
        """The results since the start, by kind of message and result."""
        return self._by_kind

    async def run(self, webhook: Callable[[], Webhook]) -> None:
        """Send messages that are due until cancelled. `webhook` may change; nothing is sent while it has no URL."""
        turns: set[asyncio.Task[None]] = set()
        try:
            while True:
                if webhook().webhook_url and len(turns) < self.turns_max:
                    turn = asyncio.create_task(self._guarded_turn(webhook()))
                    turns.add(turn)
                    turn.add_done_callback(turns.discard)
                await asyncio.sleep(self.look_seconds)
        finally:
            await cancel_all(turns)

    async def _guarded_turn(self, webhook: Webhook) -> None:
        try:
            await self.turn(webhook)
            self._is_failing = False
        except (StoreUnavailable, StoreConflict) as error:
            if not self._is_failing and not self.outbox.is_store_down:
                _log.warning("cannot send %s, will retry: %s", self.what, error)
            self._is_failing = True
        except Exception:  # noqa: BLE001 - an outermost boundary: the admin API goes on
            _log.exception("sending %s failed with an internal error", self.what)

    async def turn(self, webhook: Webhook) -> Outcome:
        """Write messages that are due, and send those whose time has come. Raises StoreUnavailable, StoreConflict."""
        turn = Outcome()
        for abandoned in await self.outbox.prepare():
            self._note_given_up(abandoned, turn)
        claimed = await self.outbox.claim(self.batch)
        if not claimed:
            return turn
        timeout = aiohttp.ClientTimeout(total=self.attempt_seconds)
        jar, connector = aiohttp.DummyCookieJar(), aiohttp.TCPConnector(limit=self.batch)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar, connector=connector) as session:
            while claimed:
                sent_before = turn.sent
                sending = (self._send(session, webhook, message, turn) for message in claimed)
                # Send and mark each message even if marking another one fails.
                for ended in await asyncio.gather(*sending, return_exceptions=True):
                    if isinstance(ended, BaseException):
                        raise ended
                if turn.sent == sent_before:
                    break  # if the receiver accepts none of a batch, the rest waits for the next round
                claimed = await self.outbox.claim(self.batch)
        return turn

    async def _send(self, session: aiohttp.ClientSession, webhook: Webhook, message: Message, turn: Outcome) -> None:
        failed = await _attempted(session, webhook, message)
        if failed is None:
            self.total.sent += 1
            turn.sent += 1
            self._count(message.kind, SENT)
            await self.outbox.sent(message)
            return
        self.total.failed += 1
        turn.failed += 1
        self._count(message.kind, FAILED)
        if failed.is_final or message.attempts >= _ATTEMPTS_MAX:
            await self.outbox.failed(message, failed.why, None)
            self._note_given_up(Abandoned(message.subject, failed.why, message.kind), turn)
            return
        again_in = _delay(message.attempts)
        await self.outbox.failed(message, failed.why, again_in)
        _log.warning(
            "%s failed, attempt %d: %s; retry in %d s",
            message.subject,
            message.attempts,
            failed.why,
            again_in.total_seconds(),
        )

    def _note_given_up(self, abandoned: Abandoned, turn: Outcome) -> None:
        self.total.given_up += 1
        turn.given_up += 1
        self._count(abandoned.kind, GIVEN_UP)
        _log.error("%s abandoned: %s", abandoned.subject, abandoned.why)

    def _count(self, kind: str, result: str) -> None:
        self._by_kind[kind, result] = self._by_kind.get((kind, result), 0) + 1


def prompt_sender(outbox: Outbox, what: str) -> WebhookSender:
    """A sender that first attempts each message within two seconds, however slow the receiver is.

    Of more than PROMPT_BATCH new messages in a second, the rest waits for the next look.
    """
    return WebhookSender(outbox, what, look_seconds=PROMPT_LOOK_SECONDS, turns_max=PROMPT_TURNS_MAX, batch=PROMPT_BATCH)


async def _attempted(session: aiohttp.ClientSession, webhook: Webhook, message: Message) -> _Failed | None:
    key = webhook_signature.key_of(webhook.webhook_secret)
    signed = webhook_signature.headers(key, message.id, int(clock.now().wall_seconds), message.content)
    headers = {**signed, "Content-Type": "application/json", "User-Agent": "keyproxy"}
    url = webhook.webhook_url
    try:
        # Redirects are not followed: the signature is for one receiver only. The response body is not read.
        async with session.post(url, data=message.content, headers=headers, allow_redirects=False) as response:
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

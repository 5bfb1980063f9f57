"""The webhooks of an admin process: what each of them sends, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from keyproxy.admin.webhook_sender import RESULTS, Webhook, WebhookSender, prompt_sender
from keyproxy.config.schema import Settings
from keyproxy.platform.tasks import cancel_all
from keyproxy.store.outbox.events import APPROVAL_EVENTS, KEY_EVENTS, EventQueue
from keyproxy.store.outbox.limit_alerts import LimitAlertQueue
from keyproxy.store.outbox.message import KINDS
from keyproxy.store.outbox.reminders import ReminderQueue
from keyproxy.store.postgres.database import StatementRunner


class Webhooks:
    """Sends the messages of every outbox to the webhook that is configured for them."""

    def __init__(self, database: StatementRunner, settings: Callable[[], Settings]) -> None:
        """`settings`: the current configuration."""
        self.reminders: Final = ReminderQueue(database, lambda: settings().reminders.before_days)
        self.alerts: Final = LimitAlertQueue(database, lambda: settings().alerts.percentages)
        self._settings = settings
        self.reminding: Final = WebhookSender(self.reminders)
        self.alerting: Final = WebhookSender(self.alerts, "alerts of limits")

        self.approvals: Final = prompt_sender(EventQueue(database, APPROVAL_EVENTS), "events of approvals")
        self.anomalies: Final = prompt_sender(EventQueue(database, KEY_EVENTS), "events of keys")

    @property
    def results(self) -> Mapping[tuple[str, ...], int]:
        """The results of all messages, by kind and result; 0 for those that have not occurred."""
        results: dict[tuple[str, ...], int] = {(kind, result): 0 for kind in KINDS for result in RESULTS}
        for sender, _ in self._senders():
            results.update(sender.results)
        return results

    async def run(self) -> None:
        """Send messages that are due until cancelled."""
        tasks = [asyncio.create_task(sender.run(webhook)) for sender, webhook in self._senders()]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancel_all(tasks)

    def _senders(self) -> Sequence[tuple[WebhookSender, Callable[[], Webhook]]]:
        """All senders, and the webhooks of the current configuration."""
        settings = self._settings
        return (
            (self.reminding, lambda: settings().reminders),
            (self.alerting, lambda: settings().alerts),
            (self.approvals, lambda: settings().approvals),
            (self.anomalies, lambda: settings().anomalies),
        )

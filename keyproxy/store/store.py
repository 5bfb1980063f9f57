"""Assembles the parts of the store that a proxy uses, and opens and closes them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from keyproxy.config import schema
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.model import Moment
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.agent_tokens.cleanup import AgentTokenCleanup
from keyproxy.store.anomalies.signal_journal import SignalJournal
from keyproxy.store.approvals.approval_store import ApprovalStore
from keyproxy.store.approvals.cleanup import ApprovalCleanup
from keyproxy.store.approvals.consent_cache import ConsentCache
from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import CHANNEL, ChangeFeed
from keyproxy.store.identities.identity_rows import TokenResources
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.identities.owned_ids import OwnedIdCache
from keyproxy.store.ledger.charge_dedup import Claims
from keyproxy.store.ledger.charge_dedup_postgres import PostgresClaims
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.select_backend import SelectedBackend, ledger_backend
from keyproxy.store.postgres.database import Database, NotificationListener
from keyproxy.store.prompt_templates import TemplateCache
from keyproxy.store.provider_keys.cache import ProviderKeyCache
from keyproxy.store.signing_keys import SigningKeyCache
from keyproxy.store.usage.journal import UsageJournal

_DEFAULT_LIMITS: Final = schema.LimitSettings()
_NO_OAUTH: Final = OAuthSettings()


class Store:
    """All parts of the store that a proxy uses."""

    def __init__(
        self,
        store: schema.StoreSettings,
        cache: schema.Cache,
        ledger: schema.LedgerSettings,
        usage: schema.Usage,
        *,
        dsn: str,
        header_prefix: str,
        limits: schema.LimitSettings = _DEFAULT_LIMITS,
        oauth: OAuthSettings = _NO_OAUTH,
        alert_percentages: Sequence[int] = (),
        now: Callable[[], Moment],
    ) -> None:
        seconds = store.statement_timeout_seconds
        self.database = Database(dsn, pool_size_max=store.pool_size_max, statement_timeout_seconds=seconds)
        # A separate pool, so that ledger sync and lookups do not wait for each other.
        self._ledger_database = Database(dsn, pool_size_max=3, statement_timeout_seconds=seconds, main=self.database)
        backend = ledger_backend(self._ledger_database, ledger, alert_percentages)
        self.ledger = Ledger(backend, ledger, now)
        repeats_max = (limits or schema.LimitSettings()).idempotency_repeats_max
        self.claims = Claims(PostgresClaims(self._ledger_database, repeats_max=repeats_max), self.ledger, ledger, now)
        # Another one, so that neither waits for a batch of usage.
        self._usage_database = Database(dsn, pool_size_max=1, statement_timeout_seconds=seconds, main=self.database)
        # Another one, because a mint may wait for a lock. Its connections are made at the first mint.
        self.minting_database = Database(dsn, pool_size_max=2, statement_timeout_seconds=seconds, main=self.database)
        # Another one, because a claim may wait for a lock too. Its connections are made when a call needs an approval.
        self._approvals_database = Database(dsn, pool_size_max=3, statement_timeout_seconds=seconds, main=self.database)
        self.agent_tokens = AgentTokenCleanup(self._usage_database)
        self.approval_cleanup = ApprovalCleanup(self._usage_database)
        state = FeedState()
        self.usage = UsageJournal(
            self._usage_database,
            usage,
            now,
            settle_seconds=ledger.settle_seconds,
            server_ahead_seconds=state.ahead_seconds,
        )
        self.signals = SignalJournal(self._usage_database)
        self._share_outage(has_ledger=ledger.backend == "postgres")
        self.last_used = LastUsed(self.database)
        self.signing_keys = SigningKeyCache(self.database, ACCEPTS_NONE, now)
        self.identities = IdentityCache(
            self.database,
            cache,
            feed=state,
            last_used=self.last_used,
            header_prefix=header_prefix,
            # One connection is left for the change feed, which delivers revocations, and one for lookups of owned ids.
            look_ups_max=max(1, store.pool_size_max - 2),
            now=now,
            verifier=self.signing_keys,
            resources=TokenResources(oauth.resource, oauth.test_resource),
        )
        self.owned_ids = OwnedIdCache(self.database, cache, feed=state, look_ups_max=1, now=now)
        consents = ConsentCache(self._approvals_database, self.database, cache, feed=state, now=now)
        self.approvals = ApprovalStore(self._approvals_database, self.database, consents, now)
        self.templates = TemplateCache(self.database, cache, now)
        self.provider_keys = ProviderKeyCache(self.database, cache, feed=state, look_ups_max=1, now=now)
        listener = NotificationListener(dsn, CHANNEL, shortage=self.database.shortage)
        reads_recalls = self.ledger.conversation if ledger.backend == "postgres" else None
        self.feed = ChangeFeed(
            self.database, listener, self.identities, state, now,
            owned=self.owned_ids, templates=self.templates, signing_keys=self.signing_keys, lease_holder=reads_recalls,
            followers={"consent": consents, "provider_key": self.provider_keys},
        )  # fmt: skip
        self._follow_windows(backend)

    @property
    def lasting(self) -> Sequence[BackgroundTask]:
        """All background tasks that run while the store is open."""
        return (
            self.ledger.conversation.lasting,
            self.claims.lasting,
            self.usage.lasting,
            self.last_used.lasting,
            self.feed.lasting,
            self.templates.lasting,
            self.signing_keys.lasting,
            self.agent_tokens.lasting,
            self.approvals.releases.lasting,
            self.approval_cleanup.lasting,
            self.signals.lasting,
        )

    @property
    def chores(self) -> Sequence[Chore]:
        """All cleanup of expired rows."""
        return (
            self.ledger.conversation.reaping,
            self.ledger.conversation.forgetting,
            self.claims.forgetting,
            self.usage.tending,
            self.usage.sweeping,
            self.feed.forgetting,
            self.agent_tokens.tending,
            self.approval_cleanup.tending,
            self.signals.tending,
        )

    def _follow_windows(self, backend: SelectedBackend) -> None:
        forget_refusals = self.ledger.conversation.lease_sync.forget_refusals
        self.feed.window_changed = partial(backend.refresh_soon, then=forget_refusals)

    def _share_outage(self, *, has_ledger: bool) -> None:
        for part in (
            self._ledger_database,
            self._usage_database,
            self.minting_database,
            self._approvals_database,
        ):
            part.outage, part.is_main = self.database.outage, False
        self.usage.outage = self.claims.outage = self.database.outage
        if has_ledger:
            self.ledger.conversation.share(self.database.outage)

    async def open(self) -> None:
        """Open the pools and start the background tasks, whether or not the database is available."""
        await self.database.open()
        await self._ledger_database.open()
        await self._usage_database.open()
        await self.minting_database.open()
        await self._approvals_database.open()
        self.templates.start()
        self.signing_keys.start()
        self.feed.start()
        self.ledger.start()
        self.claims.start()
        self.last_used.start()
        self.usage.start()
        self.agent_tokens.start()
        self.approvals.start()
        self.approval_cleanup.start()
        self.signals.start()

    async def close(self) -> None:
        """Flush what is pending and close all connections."""
        # Claims before the ledger: closing the ledger settles what they refer to.
        await self.claims.close()
        await self.ledger.close()
        await self._ledger_database.close()
        await self.usage.close()
        await self.agent_tokens.close()
        await self.approval_cleanup.close()
        await self.approvals.close()
        await self._approvals_database.close()
        await self.signals.close()
        await self.minting_database.close()
        await self._usage_database.close()
        await self.last_used.close()
        await self.feed.close()
        await self.templates.close()
        await self.signing_keys.close()
        await self.identities.close()
        await self.owned_ids.close()
        await self.provider_keys.close()
        await self.database.close()

    async def check_connection(self) -> None:
        """Check the database, and load the prompt templates. Raises StoreUnavailable if it does not respond."""
        await self.database.fetch("tenants", "", 1)
        await self.templates.read()

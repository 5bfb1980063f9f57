"""Parsed documents in memory: fresh as their server allows, then fetched again; stale while their server is down."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from keyproxy.authorize.clients.document_fetcher import DocumentFetcher
from keyproxy.model import Moment
from keyproxy.oauth.client_document import DocumentUrl
from keyproxy.oauth.client_refusals import DocumentRefused, DocumentUnavailable, TooManyDocuments

ENTRIES_MAX: Final = 1_000
FETCHES_MAX: Final = 16
STALE_SECONDS: Final = 7 * 86_400.0
FAILURE_SECONDS: Final = 60.0

_RETRY_SECONDS: Final = 5

Parsed = TypeVar("Parsed")


class _CachedDocument(Generic[Parsed]):
    """The last outcome for one URL: its document, or why there is none. Times are monotonic seconds."""

    __slots__ = ("fetched_at", "outcome", "valid_until")

    def __init__(self, outcome: Parsed | DocumentRefused, *, fetched_at: float, valid_until: float) -> None:
        self.outcome = outcome
        self.fetched_at = fetched_at
        self.valid_until = valid_until

    @property
    def parsed(self) -> Parsed | None:
        return None if isinstance(self.outcome, DocumentRefused) else self.outcome

    def document(self) -> Parsed:
        if isinstance(self.outcome, DocumentRefused):
            # A new one for each request: a shared exception would collect the tracebacks of all of them.
            raise type(self.outcome)(self.outcome.detail)
        return self.outcome


class DocumentCache(Generic[Parsed]):
    """The parsed documents of one kind. `parse` raises DocumentRefused. `count`: counts fetches by their outcome."""

    def __init__(
        self,
        fetcher: DocumentFetcher,
        parse: Callable[[str, bytes], Parsed],
        *,
        now: Callable[[], Moment],
        count: Callable[[str], None],
    ) -> None:
        self._fetcher = fetcher
        self._parse = parse
        self._now = now
        self._count = count
        self._entries: collections.OrderedDict[str, _CachedDocument[Parsed]] = collections.OrderedDict()
        self._fetches: dict[str, asyncio.Task[_CachedDocument[Parsed]]] = {}

    def cached(self, url: str) -> Parsed | None:
        """The document in memory, however old it is."""
        entry = self._entries.get(url)
        return None if entry is None else entry.parsed

    async def get(
        self, url: DocumentUrl, *, before_fetch: Callable[[], None], age_seconds_max: float | None = None
    ) -> Parsed:
        """The document. Raises DocumentRefused, TooManyDocuments, and what `before_fetch` raises, which is called before
        the first fetch of a URL that is not in memory. `age_seconds_max`: fetch an older one again, fresh or not.
        """
        entry, now = self._entries.get(url.text), self._now().mono_seconds
        is_recent = entry is not None and (age_seconds_max is None or now - entry.fetched_at < age_seconds_max)
        if entry is not None and now < entry.valid_until and is_recent:
            self._entries.move_to_end(url.text)
            return entry.document()
        fetch = self._fetches.get(url.text)
        if fetch is None:
            if entry is None or entry.parsed is None:
                before_fetch()
            if len(self._fetches) >= FETCHES_MAX:
                raise TooManyDocuments(_RETRY_SECONDS)
            fetch = asyncio.create_task(self._fetch(url, entry))
            self._fetches[url.text] = fetch
            fetch.add_done_callback(lambda _: self._fetches.pop(url.text, None))
        # The client that started a fetch may go away while others wait for it.
        found = await asyncio.shield(fetch)
        return found.document()

    async def _fetch(self, url: DocumentUrl, before: _CachedDocument[Parsed] | None) -> _CachedDocument[Parsed]:
        try:
            fetched = await self._fetcher.fetch(url)
            parsed = self._parse(url.text, fetched.content)
        except DocumentRefused as refusal:
            self._count("unavailable" if isinstance(refusal, DocumentUnavailable) else "refused")
            return self._keep(url.text, self._after_failure(before, refusal))
        self._count("ok")
        now = self._now().mono_seconds
        return self._keep(url.text, _CachedDocument(parsed, fetched_at=now, valid_until=now + fetched.fresh_seconds))

    def _after_failure(
        self, before: _CachedDocument[Parsed] | None, refusal: DocumentRefused
    ) -> _CachedDocument[Parsed]:
        now = self._now().mono_seconds
        valid_until = now + FAILURE_SECONDS
        if (
            isinstance(refusal, DocumentUnavailable)
            and before is not None
            and before.parsed is not None
            and now < before.fetched_at + STALE_SECONDS
        ):
            return _CachedDocument(before.outcome, fetched_at=before.fetched_at, valid_until=valid_until)
        return _CachedDocument(refusal, fetched_at=now, valid_until=valid_until)

    def _keep(self, url: str, entry: _CachedDocument[Parsed]) -> _CachedDocument[Parsed]:
        self._entries[url] = entry
        self._entries.move_to_end(url)
        while len(self._entries) > ENTRIES_MAX:
            self._entries.popitem(last=False)
        return entry

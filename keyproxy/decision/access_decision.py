"""Judge one exchange by its model, categories and namespaces: read its values, look up what the store knows, decide.

`ai.access.judged_request` decides; this module passes it the exchange's body and the records of the caller's tenant.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.judged_request import JudgedRequest
from keyproxy.ai.access.tenant_records import TenantRecords
from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.decision import token_accounting
from keyproxy.http_messages import RequestHead
from keyproxy.model import Identity, Missing, Moment, TimeBudget
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.tenant_records import OwnedIds, PromptTemplates

#: A body up to this size is read at once: that costs no more than to wait for a turn.
_AT_ONCE_BYTES: Final = 65_536


#: Each id is a task while it is looked up. More at once would delay other requests.
_AT_A_TIME: Final = 64


class _MissingOwner(NamedTuple):
    """An id whose owner is not in memory."""

    missing: Missing
    kind: str
    id: str


class StoreRecords(TenantRecords):
    """The records of one tenant at one time, from the caches of the store."""

    def __init__(
        self, owned_ids: OwnedIds, templates: PromptTemplates, tenant_id: str, now: Moment, *, is_first_lookup: bool
    ) -> None:
        self._owned_ids: Final = owned_ids
        self._templates: Final = templates
        self._tenant_id: Final = tenant_id
        self._now: Final = now
        self._is_first_lookup: Final = is_first_lookup
        self._missing: list[_MissingOwner] | None = None

    def owns(self, kind: str, object_id: str) -> bool:
        try:
            return self._owned_ids.is_owned(
                kind, object_id, self._tenant_id, self._now, is_first_lookup=self._is_first_lookup
            )
        except Missing as missing:
            if self._missing is None:
                self._missing = []
            self._missing.append(_MissingOwner(missing, kind, object_id))
            return True

    def lacks(self) -> bool:
        return self._missing is not None

    def require(self) -> None:
        missing = self._missing
        if missing is None:
            return
        if len(missing) == 1:
            raise missing[0].missing
        raise Missing("ownership", lambda patience: self._fetch_all(missing, patience))

    async def _fetch_all(self, missing: list[_MissingOwner], patience: TimeBudget) -> None:
        """Look the ids up a few at a time, until one is not owned: then the request is refused anyway."""
        for start in range(0, len(missing), _AT_A_TIME):
            few = missing[start : start + _AT_A_TIME]
            await asyncio.gather(*[one.missing.fetch_missing(patience) for one in few])
            if any(self._is_foreign(one) for one in few):
                return

    def _is_foreign(self, one: _MissingOwner) -> bool:
        try:
            return not self._owned_ids.is_owned(one.kind, one.id, self._tenant_id, self._now, is_first_lookup=False)
        except Missing:
            return False

    def category(self, digest: bytes) -> str | None:
        return self._templates.category(digest, self._tenant_id, self._now)


def begin(exchange: Exchange, head: RequestHead, rules: AccessRules) -> JudgedRequest:
    """What the exchange is judged by. Raises a Refusal."""
    judged = exchange.judged
    if judged is None:
        judged = exchange.judged = JudgedRequest(rules, head)
    return judged


def read(exchange: Exchange, head: RequestHead, judged: JudgedRequest) -> None:
    """Read the values of a request. Raises Missing until its body has arrived and is read."""
    if judged.collects(head):
        if not exchange.is_complete:
            raise Missing("body", lambda _patience: exchange.whole_body())
        if judged.has_begun or not is_read_at_once(exchange, head):
            raise _reading(exchange, head, judged)
    if not judged.read(head, exchange.body):
        raise _reading(exchange, head, judged)


def is_read_at_once(exchange: Exchange, head: RequestHead) -> bool:
    """Whether reading the body is as cheap as checking whether a limit refuses the request."""
    return exchange.is_complete and len(exchange.body) <= _AT_ONCE_BYTES and not head.fields.codings


def _reading(exchange: Exchange, head: RequestHead, judged: JudgedRequest) -> Missing:
    return Missing("reading", lambda _patience: exchange.in_turns(lambda: judged.read(head, exchange.body)))


def read_metered(exchange: Exchange, head: RequestHead, metered: MeteredRequest, judged: JudgedRequest) -> None:
    """Read what a metered request needs, and its values from the same scan of its body. Raises Missing as `read` does."""
    is_scanned = metered.collects and judged.is_scanned_by_metering(head)
    if not is_scanned and judged.values is None:
        read(exchange, head, judged)
        metered.form_model = judged.form_model
    if not metered.is_read:
        token_accounting.read(exchange, head, metered)
    if judged.values is None:
        judged.take(head, metered.content, metered.parts)


def judge(exchange: Exchange, head: RequestHead, judged: JudgedRequest, records: TenantRecords) -> None:
    """Judge a request that was read. Raises a Refusal, or Missing."""
    identity = exchange.identity
    assert identity is not None  # noqa: S101 - for the type checker: it was admitted
    values = judged.values
    if values is not None and values.models is not None and exchange.metered is None:
        exchange.model = values.models.recorded
    try:
        judgement = judged.judge(identity, records)
    finally:
        # For the access log, also of a refusal.
        if values is not None and values.categories is not None:
            exchange.categories = values.categories.counted
    if exchange.metered is None:
        exchange.block = head.block + judgement.lines
        if judgement.model is not None:
            exchange.model = judgement.model.name


def review(judged: JudgedRequest, identity: Identity, records: TenantRecords) -> None:
    """Judge a request in flight again, by the values that were read at its start. Raises a Refusal, or Missing."""
    if judged.values is not None:
        judged.judge(identity, records)

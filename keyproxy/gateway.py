"""The life of a request, top to bottom: decide without waiting; fetch only what is missing; decide again.

`decide` is one synchronous function over values in memory. If a value is missing it raises Missing; the cold path
fetches the value and calls the same function again, so both paths decide alike. The hot path creates no task and awaits
nothing between the request and the bytes that go upstream.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.judged_request import JudgedRequest
from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.select_meter import meter_for
from keyproxy.ai.route_rules import RouteRules
from keyproxy.auth import authorization, credentials
from keyproxy.auth.api_key import KeyFormat
from keyproxy.auth.minting import MintRules
from keyproxy.decision import access_decision, document_requests, identification, token_accounting, tool_calls
from keyproxy.decision.access_decision import StoreRecords
from keyproxy.decision.payments import Payments
from keyproxy.decision.serving import Serving
from keyproxy.decision.tool_calls import ToolCalls
from keyproxy.decision.undecided import Undecided
from keyproxy.http import headers, idempotency_key
from keyproxy.http.discovery.published_documents import NO_DOCUMENTS, PublishedDocuments
from keyproxy.http.routes import RouteTable
from keyproxy.http_messages import RequestHead, ResponseHead
from keyproxy.limits.allowance import Allowance, Need
from keyproxy.model import Grant, Identity, Missing, Moment, Permit, PublicGrant, Route, TimeBudget
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.gate import Gate
from keyproxy.ports.identities import Identities
from keyproxy.ports.ledger import Claims, Ledger
from keyproxy.ports.tenant_records import OwnedIds, PromptTemplates
from keyproxy.ports.tools import UpstreamCredential, UpstreamCredentials
from keyproxy.problem_spec import Blame
from keyproxy.reasons import Reason, Refusal

_log = logging.getLogger(__name__)


class Gateway(Gate):
    """Decides on requests. Knows ports, not implementations."""

    def __init__(
        self,
        *,
        key_format: KeyFormat,
        identities: Identities,
        owned_ids: OwnedIds,
        templates: PromptTemplates,
        ledger: Ledger,
        claims: Claims,
        routes: RouteTable,
        metering: Mapping[Route, RouteRules],
        access: Mapping[Route, AccessRules],
        tool_calls: ToolCalls,
        mint: AgentTokenMint,
        mint_rules: MintRules,
        upstream_credentials: UpstreamCredentials,
        now: Callable[[], Moment],
        usage_wait_seconds: float = 0.0,
        documents: PublishedDocuments = NO_DOCUMENTS,
    ) -> None:
        """`metering`: the rules of the metered routes; `access`: of those that judge models, categories or namespaces."""
        self.usage_wait_seconds = usage_wait_seconds
        self._key_format = key_format
        self._identities = identities
        self._owned_ids = owned_ids
        self._templates = templates
        self._ledger = ledger
        self._payments = Payments(ledger, claims)
        self._serving = Serving(mint, mint_rules)
        self._upstream_credentials = upstream_credentials
        self._routes = routes
        self._metering = dict(metering)
        self._access = dict(access)
        self._tool_calls = tool_calls
        self._tool_rules = tool_calls.rules
        self._now = now
        self._documents = documents
        self._document_targets = documents.targets
        self._undecided = Undecided(self._decide_again, self._admit)

    def begin(self, exchange: Exchange) -> None:
        """Decide on a request: at once if all values are in memory, else after fetching the missing ones."""
        try:
            head = exchange.head if self._document_targets else None
            if head is not None and head.line.target in self._document_targets:
                document_requests.respond(exchange, self._documents)
                return
            permit = self.decide(exchange)
        except Missing as missing:
            self._undecided.fetch(exchange, missing)
        except Refusal as refusal:
            exchange.refuse(refusal)
        else:
            if exchange.is_minting:
                self._serve(exchange, permit)
            else:
                exchange.forward(permit)

    def _admit(self, exchange: Exchange, permit: Permit) -> None:
        if exchange.is_minting:
            self._serve(exchange, permit)
        else:
            exchange.forward(permit)

    def _decide_again(self, exchange: Exchange) -> Permit:
        return self.decide(exchange, is_first_lookup=False)

    def _serve(self, exchange: Exchange, permit: Permit) -> None:
        identity, request = exchange.identity, exchange.mint_request
        assert identity is not None  # noqa: S101 - for the type checker: minting was admitted for it
        assert request is not None  # noqa: S101
        exchange.serve(permit)
        self._undecided.start(self._serving.respond(exchange, identity, request, self._now().mono_seconds))

    def decide(self, exchange: Exchange, *, is_first_lookup: bool = True) -> Permit:
        """Decide whether this request may go upstream, and with which identity. Never waits.

        Raises Missing for a value that has to be fetched first, a Refusal if the request is not admitted.
        """
        head = exchange.head
        if head is None:
            raise Refusal(Reason.INTERNAL_ERROR, "cannot decide on a request without a head")
        if self._routes.has_public:
            route = self._routes.public(head.line)
            if route is not None:
                return self._decide_public(exchange, head, route)
        now = self._now()
        identity = identification.identify(
            exchange, head, self._identities, self._key_format, now=now, is_first_lookup=is_first_lookup
        )
        exchange.route = self._routes.route_of(head.line)
        grant = authorization.admit(identity, exchange.route, now)
        if exchange.permit is not None:
            # Admitted before; since then its changed body was compressed.
            return self._written(exchange, head, exchange.permit)
        if grant.route.serves:
            return self._serving.decide(exchange, head, grant, self._payments, now=now)
        allowance = identity.allowance
        deduplicates = grant.route.deduplicates and head.fields.has_idempotency_key and allowance is not None
        if deduplicates and exchange.fingerprint is None:
            # The fingerprint covers the body as received: compute it before the body is read or changed.
            exchange.fingerprint = idempotency_key.fingerprint(identity, head, exchange.body)
        calling = self._tool_rules.get(grant.route) if self._tool_rules else None
        if calling is not None:
            self._tool_calls.decide(exchange, head, grant, self._payments, rules=calling, now=now)
        if grant.route.provider:
            exchange.upstream_credential = self._upstream_credentials.choose(
                grant.route.provider, identity.tenant_id, now, is_test=identity.is_test, is_first_lookup=is_first_lookup
            )
        access = self._access.get(grant.route) if self._access else None
        judged = None if access is None else access_decision.begin(exchange, head, access)
        rules = self._metering.get(grant.route)
        if rules is not None:
            return self._decide_metered(exchange, head, grant, rules, now=now, is_first_lookup=is_first_lookup)
        if judged is not None:
            self._read_judged(exchange, head, judged, allowance, now=now)
            access_decision.judge(exchange, head, judged, self._records(identity, now, is_first_lookup))
        if exchange.tool_call is not None and exchange.tool_call.tool.has_approval:
            self._tool_calls.require_claim(
                exchange, head, grant, self._payments,
                need=Need(0, 0, route=grant.route.name), now=now, is_first_lookup=is_first_lookup,
            )  # fmt: skip
        hold = None
        if allowance is not None:
            selecting = Need(0, 0, route=grant.route.name) if allowance.has_selectors else None
            hold = self._payments.take(exchange, allowance, selecting, now)
        return Permit(grant, hold)

    def _decide_public(self, exchange: Exchange, head: RequestHead, route: Route) -> Permit:
        """Decide on a request that needs no key: reads neither credentials nor the store."""
        exchange.route = route
        if head.fields.opens_tunnel:
            head = exchange.head = headers.without_upgrade(head)
        credentials.discard(head)
        return Permit(PublicGrant(route))

    def _records(self, identity: Identity, now: Moment, is_first_lookup: bool) -> StoreRecords:
        return StoreRecords(self._owned_ids, self._templates, identity.tenant_id, now, is_first_lookup=is_first_lookup)

    def _read_judged(
        self, exchange: Exchange, head: RequestHead, judged: JudgedRequest, allowance: Allowance | None, *, now: Moment
    ) -> None:
        """Read the values that a request is judged by, on a route without tokens."""
        self._payments.release_slots(exchange)
        if judged.values is not None:
            return
        if allowance is None:
            access_decision.read(exchange, head, judged)
            return
        need = Need(0, 0, route=judged.rules.name)
        asks = judged.collects(head) and not judged.has_begun and not access_decision.is_read_at_once(exchange, head)
        self._payments.check(exchange, allowance, need, now=now, asks=asks)
        try:
            access_decision.read(exchange, head, judged)
        except Missing:
            self._payments.take_slots(exchange, allowance, need, now)
            raise

    def _decide_metered(
        self,
        exchange: Exchange,
        head: RequestHead,
        grant: Grant,
        rules: RouteRules,
        *,
        now: Moment,
        is_first_lookup: bool,
    ) -> Permit:
        """Decide on a request whose tokens are counted."""
        metered, allowance, judged = exchange.metered, grant.identity.allowance, exchange.judged
        if metered is None:
            metered = exchange.metered = MeteredRequest(rules, head)
        self._payments.release_slots(exchange)
        if not metered.is_read or (judged is not None and judged.values is None):
            if allowance is not None:
                self._check_limits(exchange, head, metered, allowance, now=now)
            try:
                if judged is None:
                    token_accounting.read(exchange, head, metered)
                else:
                    access_decision.read_metered(exchange, head, metered, judged)
            except Missing:
                if allowance is not None:
                    # The request counts as concurrent while its body arrives and is read.
                    self._payments.take_slots(exchange, allowance, rules.unread_need, now)
                raise
            exchange.model = metered.model
        if judged is not None:
            records = self._records(grant.identity, now, is_first_lookup)
            access_decision.judge(exchange, head, judged, records)
        need = self._need(metered, allowance, now)
        if exchange.tool_call is not None:
            self._tool_calls.require_claim(
                exchange, head, grant, self._payments, need=need, now=now, is_first_lookup=is_first_lookup
            )
        hold = None if allowance is None else self._payments.take(exchange, allowance, need, now)
        token_accounting.fit(metered, hold)
        if hold is not None and hold.meters is not None and hold.covers > metered.tokens_reserved:
            hold = self._ledger.trim(hold, metered.tokens_reserved - (hold.paid or 0), metered.spend_reserved)
        permit = Permit(grant, hold)
        if not token_accounting.write_body(exchange, metered):
            # From here on the end of the exchange releases the hold.
            exchange.permit = permit
            raise Missing(
                "compression",
                lambda _patience: exchange.in_turns(lambda: token_accounting.write_body(exchange, metered)),
            )
        return self._written(exchange, head, permit)

    def _written(self, exchange: Exchange, head: RequestHead, permit: Permit) -> Permit:
        if exchange.metered is not None:
            token_accounting.finish_body(exchange, head, exchange.metered)
        return permit

    def _need(self, metered: MeteredRequest, allowance: Allowance | None, now: Moment) -> Need:
        """What a request needs of all limits."""
        per_request = None
        if allowance is not None and metered.depends_on_plan:
            selecting = Need(0, 0, route=metered.rules.name, models=metered.models)
            per_request = self._ledger.per_request(allowance, now, selecting)[0]
        return metered.reserve(per_request)

    def _check_limits(
        self, exchange: Exchange, head: RequestHead, metered: MeteredRequest, allowance: Allowance, *, now: Moment
    ) -> None:
        """Refuse a request that exceeds a limit whatever its body, before waiting for the body or reading it."""
        asks = not metered.has_begun and not token_accounting.is_read_at_once(exchange, head, metered)
        self._payments.check(exchange, allowance, metered.rules.unread_need, now=now, asks=asks)

    @property
    def is_deciding(self) -> bool:
        """Whether any decision is waiting for a missing value."""
        return bool(self._undecided)

    async def all_decided(self) -> None:
        """Wait until no decision is pending."""
        await self._undecided.all_ended()

    def review(self, exchange: Exchange) -> None:
        """Recheck an exchange in flight: refuse it if its key is no longer valid for it.

        The key, its owners, its scopes and what its tenant owns can have changed; what the request asks for has not. A
        store outage does not end an exchange that was verified when it began.
        """
        try:
            self._review(exchange)
        except Missing as missing:
            self._undecided.start(self._fetch_and_review(exchange, missing))

    def _review(self, exchange: Exchange) -> None:
        # Minting is not reviewed: the store checks every bound when it inserts the token.
        if exchange.is_minting:
            return
        now = self._now()
        try:
            identity = identification.reviewed(exchange, self._identities, now)
            if identity is None:
                return
            grant = authorization.admit(identity, exchange.route, now)
            if exchange.judged is not None:
                access_decision.review(exchange.judged, identity, self._records(identity, now, False))
            tool_calls.review(exchange, grant)
        except Refusal as refusal:
            if refusal.reason.value.blame is Blame.CALLER:
                exchange.refuse(refusal)

    async def _fetch_and_review(self, exchange: Exchange, missing: Missing) -> None:
        await missing.failure(TimeBudget())
        # If the value is missing again, the next review retries.
        with contextlib.suppress(Missing):
            self._review(exchange)

    def settle(self, exchange: Exchange) -> None:
        """Charge the exchange's hold if the upstream received any of the request, else release it and its approval."""
        self._payments.release_slots(exchange)
        if exchange.tool_call is not None and exchange.tool_call.claim is not None:
            self._tool_calls.give_back(exchange)
        if exchange.mcp is not None:
            # What was read of the body is freed now, while it is in the processor's cache.
            exchange.mcp = None
        permit = exchange.permit
        if permit is None:
            return
        metered = exchange.metered
        tokens, spend = (0, 0) if metered is None else token_accounting.charge(exchange, metered)
        if permit.hold is not None:
            self._payments.settle(exchange, permit.hold, tokens=tokens, spend=spend)

    def meter(self, exchange: Exchange, response: ResponseHead) -> Meter | None:
        """The meter that reads the response to a request on a metered route; None for one that uses no tokens."""
        metered = exchange.metered
        if metered is None or not metered.uses_tokens:
            return None
        return meter_for(
            metered.rules.dialect, metered.endpoint, response,
            choices=metered.choices, hides_usage=metered.asks_for_usage,
        )  # fmt: skip

    def credential_refused(self, exchange: Exchange, credential: UpstreamCredential, now_mono: float) -> None:
        """Prefer another credential for the next requests. This response is relayed: no request is sent twice."""
        self._upstream_credentials.was_refused(credential, now_mono)

    def watch(self, exchange: Exchange) -> None:
        """After progress of a metered stream: extend its hold if it needs more, end it if the budget is exhausted."""
        self._watch(exchange)

    def _watch(self, exchange: Exchange, patience: TimeBudget | None = None) -> None:
        permit = exchange.permit
        if permit is None or permit.hold is None or exchange.is_over:
            return
        tokens, spend, is_used_up = token_accounting.extension_needed(exchange, permit.hold)
        if not tokens:
            return
        try:
            hold = self._ledger.extend(permit.hold, tokens, spend)
            token_accounting.extend(exchange, tokens)
            exchange.extend(Permit(permit.grant, hold))
        except Missing as missing:
            exchange.pause_stream()
            self._undecided.start(self._fetch_and_watch(exchange, missing, patience or TimeBudget()))
        except Refusal as refusal:
            if is_used_up:
                exchange.end_stream(refusal)
            else:
                exchange.extend(permit)

    async def _fetch_and_watch(self, exchange: Exchange, missing: Missing, patience: TimeBudget) -> None:
        try:
            refusal = await missing.failure(patience)
            if refusal is not None and not exchange.is_over:
                exchange.end_stream(refusal)
            else:
                self._watch(exchange, patience)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task, which has paused the stream
            _log.exception("stream hold extension failed", extra={"request_id": exchange.request_id.decode("ascii")})
            exchange.refuse(Refusal(Reason.INTERNAL_ERROR))

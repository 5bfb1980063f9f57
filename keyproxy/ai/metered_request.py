"""The tokens and the price of one request on a metered route, from its arrival to its charge. Pure.

    begun -> read -> fitted to its hold -> edited -> charged

`read` and `write_body` do a portion of work per call and return whether it was the last. What they need of the body is
released as soon as it is not needed any more.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.charge import Charge, Reserved, ResponseEnd, charge_of
from keyproxy.ai.dialects.endpoint import DialectEndpoint
from keyproxy.ai.dialects.table import TOKENLESS, endpoint_of
from keyproxy.ai.models import Candidates
from keyproxy.ai.request_models import NO_MODELS, RequestModels
from keyproxy.ai.requests.body_edit import cap_member, edited, edits_of, pieces
from keyproxy.ai.requests.inflation import ContentMemory, Deflation
from keyproxy.ai.requests.request_facts import RequestFacts
from keyproxy.ai.requests.request_reading import RequestReading, facts_of_form, is_collected
from keyproxy.ai.reservation import (
    REFUSE,
    TokenNeed,
    need_of,
    reasoning_reservation,
    tunnel_need,
)
from keyproxy.ai.responses.meter import ResponseUse
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.ai.route_rules import RouteRules
from keyproxy.ai.scanning.request_parts import RequestParts
from keyproxy.http_messages import RequestHead
from keyproxy.limits import allowance
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

_NO_NEED: Final = TokenNeed(0, 0, 0)

#: A body up to this size is read at once: that costs no more than to wait for a turn.
_AT_ONCE_BYTES: Final = 65_536


@mypyc_attr(acyclic=True)
class MeteredRequest:
    """What one request reserves, and what it is charged.

    `is_tunnel`: it opens one. `is_read`: its needs are known. `need`: the tokens to reserve. `output`: those of it that
    are reserved for output, with all extensions. `cap`: the inserted maximum, 0 for none. `choices`: the number of
    alternatives that it asks for. `memory`: of its inflated content; None: the body is not compressed. `asks_for_usage`:
    the request for the stream's usage is inserted, so the client must not see it.
    """

    __slots__ = (
        "_deflation", "_facts", "_is_collected", "_is_digested", "_models", "_reading", "_thinking", "asks_for_usage",
        "cap", "choices", "endpoint", "form_model", "is_read", "is_tunnel", "memory", "need", "output", "rules",
    )  # fmt: skip

    def __init__(self, rules: RouteRules, head: RequestHead) -> None:
        self.rules: Final = rules
        self.is_tunnel: Final = head.fields.opens_tunnel
        line = head.line
        self.endpoint: Final[DialectEndpoint] = (
            rules.dialect.usual if self.is_tunnel else endpoint_of(rules.dialect, line.method, line.path)
        )
        self.is_read = self.endpoint is TOKENLESS
        self._is_collected: Final = is_collected(head.fields)
        self.need = _NO_NEED
        #: The model that a multipart form names, if the route reads it there.
        self.form_model: str | None = None
        self.output = 0
        self.cap = 0
        self.choices = 1
        self.asks_for_usage = False
        self.memory: ContentMemory | None = None
        self._models: RequestModels = NO_MODELS
        #: The stated budget for reasoning.
        self._thinking: int | None = None
        self._is_digested: Final = head.fields.digests_body
        self._facts: RequestFacts | None = None
        self._reading: RequestReading | None = None
        self._deflation: Deflation | None = None

    # -- what it needs

    @property
    def uses_tokens(self) -> bool:
        """Whether the endpoint uses any."""
        return self.endpoint is not TOKENLESS

    @property
    def collects(self) -> bool:
        """Whether the body has to be complete before it is forwarded."""
        return self._is_collected and not (self.is_tunnel or self.is_read)

    def reads_at_once(self, head: RequestHead, body: bytes) -> bool:
        """Whether the reading of a complete body is not worth a wait."""
        return len(body) <= _AT_ONCE_BYTES and not head.fields.codings

    @property
    def has_begun(self) -> bool:
        """Whether the reading of the body has begun."""
        return self._reading is not None

    def read(self, head: RequestHead, body: bytes) -> bool:
        """Read the next portion of the body; return whether it was the last. Raises a Refusal."""
        if self.is_tunnel:
            self._judge_tunnel(head)
            return True
        if self._is_collected:
            reading = self._reading
            if reading is None:
                reading = self._reading = RequestReading(
                    self.rules.reading, self.endpoint, head.fields, body, memory=self.memory
                )
            if not reading.advance():
                return False
            facts = reading.facts
        else:
            length = -1 if head.fields.is_chunked else head.content_length
            facts = facts_of_form(self.rules.reading, self.endpoint, length)
        if facts is None:
            raise Refusal(Reason.INTERNAL_ERROR, "a request was read without a result")
        self._facts = facts
        self._judge(head, facts)
        return True

    def _judge_tunnel(self, head: RequestHead) -> None:
        facts = RequestFacts(self.rules.dialect, self.endpoint, 0)
        self._models = self.rules.models_of(head, facts, self.form_model)
        self.is_read = True

    def _judge(self, head: RequestHead, facts: RequestFacts) -> None:
        self._models = self.rules.models_of(head, facts, self.form_model)
        self.choices, self._thinking = facts.multiplier, facts.thinking
        self.asks_for_usage = facts.lacks_usage and facts.parts is not None and not self._is_digested
        self.is_read = True

    @property
    def candidates(self) -> Candidates:
        """The models that may serve it."""
        return self._models.candidates

    @property
    def model(self) -> str:
        """The name of its model in records, empty without one."""
        return self._models.model

    @property
    def models(self) -> tuple[str, ...]:
        """The names by which limits select it: of all models that may serve it."""
        return self._models.names

    @property
    def model_line(self) -> bytes:
        """The header line with the configured name of its model; empty without one, or if it may be another."""
        return self._models.line

    @property
    def content(self) -> bytes:
        """The inflated body, while it is kept."""
        return b"" if self._reading is None else self._reading.content

    @property
    def parts(self) -> RequestParts | None:
        """The scan of the body, while it is kept; None if it is not JSON."""
        return None if self._reading is None else self._reading.parts

    @property
    def depends_on_plan(self) -> bool:
        """Whether its needs depend on the plan's limit of tokens per request."""
        return self.is_tunnel or (self._facts is not None and bool(self._facts.reference))

    def reserve(self, tokens_per_request: int | None) -> allowance.Need:
        """What to take of the limits. `tokens_per_request`: the smallest such limit, if its needs depend on that.

        Raises a Refusal (OUTPUT_MAXIMUM_REQUIRED).
        """
        rules, candidates, facts = self.rules, self.candidates, self._facts
        if self.is_tunnel:
            need = tunnel_need(rules.tokens, tokens_per_request)
        elif facts is None:
            need = _NO_NEED
        else:
            cap = REFUSE if self._is_digested else rules.cap
            need = need_of(facts, rules.tokens, candidates, cap=cap, tokens_per_request=tokens_per_request)
        self.need = need
        self.output = need.output_most
        return allowance.Need(
            need.least, need.most,
            candidates.reservation(need.tokens_in, need.output_least),
            candidates.reservation(need.tokens_in, need.output_most),
            route=rules.name, models=self.models, is_priced=candidates.is_priced,
        )  # fmt: skip

    # -- what it may use

    def fit(self, tokens: int, micros: int | None) -> None:
        """Fit the output to the hold: `tokens` in all, and `micros` of money, None without a bound."""
        need = self.need
        if need.is_stated or not need.inserts:
            self.output = min(need.output_most, max(need.output_least, tokens - need.tokens_in))
            return
        left = tokens - need.tokens_in
        if micros is not None:
            affordable = self.candidates.affordable_output(need.tokens_in, micros)
            left = left if affordable is None else min(left, affordable)
        output = need.output_within(left)
        self.output = need.output_least if output is None else output
        self.cap = need.cap(self.output)

    @property
    def tokens_reserved(self) -> int:
        """The tokens that are reserved for it."""
        return self.need.tokens_in + self.output

    @property
    def spend_reserved(self) -> int:
        """The most that the reserved tokens can cost."""
        return self.candidates.reservation(self.need.tokens_in, self.output)

    def extension_cost(self, tokens: int) -> int:
        """The most that so many more tokens of output can cost."""
        return self.candidates.reservation(0, tokens)

    # -- the body to forward

    @property
    def edits(self) -> bool:
        """Whether the body is forwarded with changes."""
        return self._reading is not None and (self.cap > 0 or self.asks_for_usage)

    def write_body(self) -> bytes | None:
        """The body to forward in place of the client's. None: call again, after other work."""
        facts, reading, deflation = self._facts, self._reading, self._deflation
        if facts is None or reading is None or facts.parts is None:
            raise Refusal(Reason.INTERNAL_ERROR, "a request without a body has none to change")
        if deflation is not None:
            return deflation.body if deflation.advance() else None
        cap = (cap_member(self.endpoint, self.rules.cap_field), self.cap) if self.cap else None
        edits = edits_of(facts.parts, cap=cap, adds_usage=self.asks_for_usage)
        if reading.bits is None:
            return edited(reading.content, edits)
        self._deflation = Deflation(pieces(reading.content, edits), reading.bits)
        return None

    def forget_content(self) -> None:
        """Release the body, once the request is reserved and its edits are made."""
        self._reading = self._deflation = None
        if self.memory is not None:
            self.memory.hold(0)
        self._facts = None

    # -- its response

    def charge(self, end: ResponseEnd, *, status: int | None, use: ResponseUse | None, was_sent_whole: bool) -> Charge:
        """What the request is charged. See `charge_of`."""
        need, reasoning = self.need, reasoning_reservation(self.candidates, self.output, self._thinking, self.choices)
        reserved = Reserved(
            self.endpoint.kind, need.tokens_in, self.output, reasoning=reasoning, is_tunnel=self.is_tunnel
        )
        return charge_of(reserved, end, status=status, use=use, was_sent_whole=was_sent_whole)

    def cost(self, use: TokenUse, response_model: str | None) -> int:
        """What these tokens cost, in micro-units."""
        return self.candidates.cost(use, response_model)

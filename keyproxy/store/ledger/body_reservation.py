"""What a proxy would reserve for a request with a given body: read, priced and capped as the gateway does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from keyproxy.ai.dialects.table import DIALECTS, endpoint_of
from keyproxy.ai.model_source import Named, candidates_of, named_models, parse_model_source
from keyproxy.ai.models import Candidates, ModelTable, recorded_name
from keyproxy.ai.requests.request_reading import ReadingRules, RequestReading
from keyproxy.ai.reservation import INSERT, TokenNeed, need_of
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.http_messages import RequestFields
from keyproxy.limits import allowance
from keyproxy.limits.allowance import Allowance, Hold, applies, is_of_mode
from keyproxy.limits.plan import PER_REQUEST, TOKENS

_JSON: Final = RequestFields(host=b"localhost", host_block=b"", media_type=b"application/json")


class RequestUrl(NamedTuple):
    """Where the request goes. `path`: without the query."""

    method: bytes
    path: bytes
    query: bytes


class BodyReservation:
    """The reservation for one request. `need`: what its limits are compared with."""

    def __init__(self, output: TokenNeed, candidates: Candidates, model: str, route: str) -> None:
        self._output: Final = output
        self._candidates: Final = candidates
        self._model: Final = model
        models = tuple([one.name for one in candidates.models if one is not None]) or ((model,) if model else ())
        reserve = candidates.reservation
        self.need: Final = allowance.Need(
            output.least,
            output.most,
            reserve(output.tokens_in, output.output_least),
            reserve(output.tokens_in, output.output_most),
            route=route,
            models=models,
            is_priced=candidates.is_priced,
        )

    def shown(self, hold: Hold | None) -> dict[str, Any]:
        """The reservation by name. `hold`: what the limits leave to it; None: no limit applies, or one refuses it.

        `cap`: the maximum that is inserted; None: the body has one, or none is inserted. `price`: of the reservation, in
        micro-units; None: the model has no price.
        """
        output = self._output.output_most
        if hold is not None and hold.meters is not None:
            if hold.limits_tokens:
                output = min(output, hold.tokens - self._output.tokens_in)
            if hold.meters.spend_windows:
                affordable = self._candidates.affordable_output(self._output.tokens_in, hold.spend)
                output = output if affordable is None else min(output, affordable)
        output = self._output.output_within(output) or 0
        return {
            "model": self._model or None,
            "input": self._output.tokens_in,
            "output": output,
            "cap": self._output.cap(output) if self._output.inserts else None,
            "price": self._candidates.reservation(self._output.tokens_in, output) if self.need.is_priced else None,
        }


def reservation_of(
    configured: Settings, row: RouteRow, target: RequestUrl, body: bytes, *, model: str, limits: Allowance | None
) -> BodyReservation:
    """Read a body as one of a route. `model`: replaces the one that the request names, unless it is empty.

    Raises a Refusal for a body that the proxy refuses.
    """
    dialect, source = DIALECTS[row.tokens], parse_model_source(row.model)
    rules = ReadingRules(dialect, configured.tokens.bounds(), model_member=source.json_member)
    reading = RequestReading(rules, endpoint_of(dialect, target.method, target.path), _JSON, body)
    while reading.facts is None:
        reading.advance()
    facts = reading.facts
    named = named_models(source, dialect, facts, path=target.path, query=target.query, value=model or None)
    if model:
        named = Named(model)
    candidates = candidates_of(ModelTable(configured.models), named, facts.alternatives)
    route, name = row.name or row.match, recorded_name(candidates.model, named.model)
    bound = min(_token_bounds(limits, route, name), default=None)
    output = need_of(facts, configured.tokens.rules(), candidates, cap=row.cap or INSERT, tokens_per_request=bound)
    return BodyReservation(output, candidates, name, route)


def _token_bounds(limits: Allowance | None, route: str, model: str) -> Iterable[int]:
    """The limits of tokens per request that apply."""
    for pool, plan in () if limits is None else limits.pools:
        for limit in plan.limits:
            is_bound = limit.measure == TOKENS and limit.per == PER_REQUEST
            if is_bound and is_of_mode(limit, pool) and applies(limit, (route, (model,))):
                yield limit.quota


def no_reservation() -> Mapping[str, Any]:
    """The members of `shown` for a request whose body is not given or not metered."""
    return dict.fromkeys(("model", "input", "output", "cap", "price"))

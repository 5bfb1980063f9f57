"""Counts of requests by model. A label is the name of a configured model, `owned` or `other`, and never from a client."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.models import OTHER
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.ports.exchange import Exchange

#: The values of the label `kind`. Cached and stored tokens are parts of `in`, reasoning is a part of `out`.
KINDS: Final = ("in", "out", "cached", "cache_write", "reasoning")


class ModelCount:
    """The charges of all requests for one model."""

    __slots__ = ("cache_write", "cached", "reasoning", "requests", "spend_micros", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        #: By mode.
        self.requests: Final[dict[str, int]] = {}
        self.tokens_in = self.tokens_out = self.cached = self.cache_write = self.reasoning = 0
        self.spend_micros = 0

    def add_request(self, mode: str) -> None:
        """Count a request that was forwarded."""
        self.requests[mode] = self.requests.get(mode, 0) + 1

    def add_use(self, use: TokenUse, cost_micros: int) -> None:
        """Count what a request was charged."""
        self.tokens_in += use.tokens_in
        self.tokens_out += use.tokens_out
        self.cached += use.cached
        self.cache_write += use.cache_write
        self.reasoning += use.reasoning
        self.spend_micros += cost_micros

    def by_kind(self) -> dict[str, int]:
        """The tokens, in the order of KINDS."""
        counts = (self.tokens_in, self.tokens_out, self.cached, self.cache_write, self.reasoning)
        return dict(zip(KINDS, counts, strict=True))


class ModelCounts:
    """All models, and the caps that were inserted, by route."""

    def __init__(self) -> None:
        self.models: Final[dict[str, ModelCount]] = {}
        self.caps: Final[dict[str, int]] = {}

    def add(self, exchange: Exchange, mode: str) -> None:
        """Count a request that was forwarded: one that was charged, or whose model was judged."""
        use, metered, judged = exchange.token_use, exchange.metered, exchange.judged
        judgement = None if judged is None else judged.judgement
        if judgement is not None and judgement.model is not None:
            name = judgement.model.label
        elif use is None or metered is None:
            return
        else:
            model = metered.candidates.model
            name = OTHER if model is None else model.name
        count = self.models.get(name)
        if count is None:
            count = self.models[name] = ModelCount()
        count.add_request(mode)
        if use is not None:
            count.add_use(use, exchange.cost_micros)
        if metered is not None and metered.cap:
            route = metered.rules.name
            self.caps[route] = self.caps.get(route, 0) + 1

"""Counts of metered requests by model. A label is the name of a configured model, or `other`, and never from a client."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.ai.models import OTHER
from keyproxy.ai.responses.token_use import TokenUse

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

    def add(self, mode: str, use: TokenUse, cost_micros: int) -> None:
        """Count a request that was forwarded."""
        self.requests[mode] = self.requests.get(mode, 0) + 1
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

    def add(self, metered: MeteredRequest, use: TokenUse, *, mode: str, cost_micros: int) -> None:
        """Count a request that was forwarded."""
        model = metered.candidates.model
        name = OTHER if model is None else model.name
        count = self.models.get(name)
        if count is None:
            count = self.models[name] = ModelCount()
        count.add(mode, use, cost_micros)
        if metered.cap:
            route = metered.rules.name
            self.caps[route] = self.caps.get(route, 0) + 1

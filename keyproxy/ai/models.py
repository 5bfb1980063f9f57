"""The models of the configuration: names, prices and limits, and what a request costs. Pure integer arithmetic.

Prices are micro-units of the currency per million tokens, so a cost is a sum of products, divided once by a million
and rounded up once per request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from keyproxy.ai.responses.token_use import TokenUse

_MILLION: Final = 1_000_000

#: A name of a model as sent that may appear in records.
_RECORDABLE: Final = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")

#: The recorded name of all other models.
OTHER: Final = "other"


@dataclass(frozen=True, slots=True, eq=False)
class Price:
    """Micro-units per million tokens. `cached_input` and `cache_write` are prices of parts of the input, `reasoning` of a
    part of the output."""

    input: int
    output: int
    cached_input: int
    cache_write: int
    reasoning: int

    def cost(self, use: TokenUse) -> int:
        """The cost of a request in micro-units, rounded up."""
        cached, written, reasoned = use.cached, use.cache_write, use.reasoning
        total = max(0, use.tokens_in - cached - written) * self.input + cached * self.cached_input
        total += written * self.cache_write + max(0, use.tokens_out - reasoned) * self.output
        return -(-(total + reasoned * self.reasoning) // _MILLION)

    def reservation(self, tokens_in: int, tokens_out: int) -> int:
        """The most that so many tokens can cost: input that is stored, output that is reasoning."""
        total = tokens_in * max(self.input, self.cache_write) + tokens_out * max(self.output, self.reasoning)
        return -(-total // _MILLION)

    def affordable_output(self, tokens_in: int, micros: int) -> int | None:
        """The output tokens that `micros` can reserve after the input; None: any number, because they cost nothing."""
        price = max(self.output, self.reasoning)
        left = micros * _MILLION - tokens_in * max(self.input, self.cache_write)
        if price == 0:
            return None if left >= 0 else 0
        return max(0, left // price)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One row of the configuration. 0: the number is unknown. `price`: None: the model has none, and costs nothing.

    `reasons`: the model may use output tokens that it does not show.
    """

    name: str
    aliases: tuple[str, ...] = ()
    scopes: frozenset[str] = frozenset()
    price: Price | None = None
    output_tokens_max: int = 0
    context_tokens_max: int = 0
    image_tokens: int = 0
    reasons: bool = False


def price_of(
    input_price: int | None,
    output_price: int | None,
    *,
    cached_input: int | None = None,
    cache_write: int | None = None,
    reasoning: int | None = None,
) -> Price | None:
    """The price with its defaults; None without a price of input and output."""
    if input_price is None or output_price is None:
        return None
    return Price(
        input=input_price,
        output=output_price,
        cached_input=input_price if cached_input is None else cached_input,
        cache_write=input_price if cache_write is None else cache_write,
        reasoning=output_price if reasoning is None else reasoning,
    )


class ModelTable:
    """Finds a model by its exact name or alias."""

    __slots__ = ("_by_name",)

    def __init__(self, models: Iterable[Model] = ()) -> None:
        self._by_name: Final = {name: model for model in models for name in (model.name, *model.aliases)}

    def find(self, name: str | None) -> Model | None:
        """The row of a model, None for an unlisted one."""
        return None if name is None else self._by_name.get(name)

    @property
    def has_scopes(self) -> bool:
        """Whether a model requires scopes."""
        return any(model.scopes for model in self._by_name.values())


def recorded_name(model: Model | None, sent: str | None) -> str:
    """The name of a model in records and metrics: its row's, else as sent if it is harmless. Empty: none was sent."""
    if model is not None:
        return model.name
    if sent is None:
        return ""
    return sent if _RECORDABLE.fullmatch(sent) else OTHER


class Candidates:
    """The models that may serve one request: the one of its source, and those of its lists of alternatives.

    `model`: of the source. Numbers of several models are the largest; 0 if one of them is unknown.
    """

    __slots__ = ("context_tokens_max", "image_tokens", "is_priced", "model", "models", "output_tokens_max", "reasons")

    def __init__(self, model: Model | None, alternatives: tuple[Model | None, ...] = ()) -> None:
        self.model: Final = model
        self.models: Final = (model, *alternatives)
        self.is_priced: Final = all(one is not None and one.price is not None for one in self.models)
        self.output_tokens_max: Final = _largest([0 if one is None else one.output_tokens_max for one in self.models])
        self.context_tokens_max: Final = _largest([0 if one is None else one.context_tokens_max for one in self.models])
        self.image_tokens: Final = _largest([0 if one is None else one.image_tokens for one in self.models])
        self.reasons: Final = any(one is not None and one.reasons for one in self.models)

    def reservation(self, tokens_in: int, tokens_out: int) -> int:
        """The most that so many tokens can cost with any of the models, in micro-units."""
        most = 0
        for model in self.models:
            if model is not None and model.price is not None:
                most = max(most, model.price.reservation(tokens_in, tokens_out))
        return most

    def affordable_output(self, tokens_in: int, micros: int) -> int | None:
        """The output tokens that `micros` can reserve with any of the models; None: any number."""
        least: int | None = None
        for model in self.models:
            if model is not None and model.price is not None:
                found = model.price.affordable_output(tokens_in, micros)
                if found is not None and (least is None or found < least):
                    least = found
        return least

    def cost(self, use: TokenUse, response_model: str | None = None) -> int:
        """What the use costs: at the price of the model that the response names, if it is one of several; else of the
        dearest."""
        if len(self.models) > 1 and response_model is not None:
            for model in self.models:
                if model is not None and (model.name == response_model or response_model in model.aliases):
                    return 0 if model.price is None else model.price.cost(use)
        dearest = 0
        for model in self.models:
            if model is not None and model.price is not None:
                dearest = max(dearest, model.price.cost(use))
        return dearest


def _largest(numbers: list[int]) -> int:
    return 0 if 0 in numbers else max(numbers)

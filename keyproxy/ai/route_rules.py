"""How the requests of one route are metered: made when the configuration is loaded."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from keyproxy.ai.dialects.endpoint import Dialect
from keyproxy.ai.model_source import ModelSource
from keyproxy.ai.models import Candidates, Model, ModelTable
from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.requests.request_reading import BodyBounds, ReadingRules
from keyproxy.ai.reservation import INSERT, TokenRules
from keyproxy.limits.allowance import Need
from keyproxy.model import RequestHead


class RouteRules:
    """The dialect of a route, its models, and its settings for reservations and caps.

    `placeholder`: matches a path of the route, with the model in its first group, if the route reads the model there.
    `model_field`: the start of the header line that names the model to the upstream.
    """

    __slots__ = (
        "candidates", "cap", "cap_field", "dialect", "model_field", "models", "name", "placeholder", "reading", "source",
        "tokens", "unread_need",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        dialect: Dialect,
        *,
        tokens: TokenRules,
        bounds: BodyBounds,
        models: ModelTable,
        source: ModelSource,
        cap: str = "",
        cap_field: str = "",
        placeholder: re.Pattern[bytes] | None = None,
        model_field: bytes = b"",
    ) -> None:
        self.name: Final = name
        self.dialect: Final = dialect
        self.tokens: Final = tokens
        self.models: Final = models
        self.source: Final = source
        self.cap: Final = cap or INSERT
        self.cap_field: Final = cap_field
        self.placeholder: Final = placeholder
        self.model_field: Final = model_field
        self.reading: Final = ReadingRules(dialect, bounds, model_member=source.json_member)
        #: What any request needs, before it is read.
        self.unread_need: Final = Need(1, 1, route=name)
        #: The candidates of requests that name one model, by its row.
        self.candidates: Final[dict[Model | None, Candidates]] = {}

    def candidates_of(self, model: Model | None) -> Candidates:
        """The candidates of a request that names only this model."""
        found = self.candidates.get(model)
        if found is None:
            found = self.candidates[model] = Candidates(model)
        return found

    def source_value(self, head: RequestHead) -> str | None:
        """The model as a path or a header names it, for a source of that kind. Raises a Refusal if it stands twice."""
        if self.source.kind == "path" and self.placeholder is not None:
            match = self.placeholder.fullmatch(head.line.path)
            return None if match is None else unquote_to_bytes(match[1]).decode("utf-8", "replace")
        if self.source.kind == "header":
            return _header(head.block, self.source.name)
        return None


def _header(block: bytes, name: str) -> str | None:
    """The value of a header. Raises a Refusal if it occurs twice, or with `_` or `.`, which servers take for `-`."""
    wanted, found = name.lower().encode(), None
    for line in block.split(b"\r\n"):
        sent, _, value = line.partition(b":")
        sent = sent.lower()
        if sent.replace(b"_", b"-").replace(b".", b"-") != wanted:
            continue
        if found is not None or sent != wanted:
            raise malformed(f"The header '{name}' appears twice or in another spelling.", name)
        found = value.strip().decode("latin-1")
    return found

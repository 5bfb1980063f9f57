"""How the requests of one route are metered: made when the configuration is loaded."""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.access.counted_names import CountedNames, counted_headers
from keyproxy.ai.access.value_sources import path_value
from keyproxy.ai.dialects.endpoint import Dialect
from keyproxy.ai.model_source import ModelSource, candidates_of, json_model, named_models
from keyproxy.ai.models import ModelTable
from keyproxy.ai.request_models import RequestModels
from keyproxy.ai.requests.request_facts import RequestFacts
from keyproxy.ai.requests.request_reading import BodyBounds, ReadingRules
from keyproxy.ai.reservation import INSERT, TokenRules
from keyproxy.ai.scanning.member_scope import NO_MEMBERS, JudgedMembers
from keyproxy.http_messages import RequestHead
from keyproxy.limits.allowance import Need

#: The models of requests that name the same are kept. Clients choose paths and names: at the bound all are dropped, and
#: long ones are never kept.
_KEPT_MAX: Final = 1_024
_KEPT_CHARACTERS_MAX: Final = 256

#: The kinds of source that read nothing but the target and the JSON.
_KEPT_KINDS: Final = ("", "json", "path", "query", "none")


class RouteRules:
    """The dialect of a route, its models, and its settings for reservations and caps.

    `placeholder`: matches a path of the route, with the model in its first group, if the route reads the model there.
    `model_field`: the start of the header line that names the model to the upstream. `judged`: members that count because
    the request is judged by them.
    """

    __slots__ = (
        "_header_names", "_keeps", "_kept", "cap", "cap_field", "dialect", "model_field", "models", "name", "placeholder",
        "reading", "source", "tokens", "unread_need",
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
        judged: JudgedMembers = NO_MEMBERS,
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
        self.reading: Final = ReadingRules(dialect, bounds, model_member=source.json_member, judged=judged)
        #: What any request needs, before it is read.
        self.unread_need: Final = Need(1, 1, route=name)
        self._header_names: Final = CountedNames([source.name.lower()] if source.kind == "header" else [])
        self._keeps: Final = source.kind in _KEPT_KINDS
        #: By target, and the model in its JSON as the route's source and as the dialect has it.
        self._kept: Final[dict[tuple[bytes, str | None, str | None], RequestModels]] = {}

    def models_of(self, head: RequestHead, facts: RequestFacts, form_model: str | None = None) -> RequestModels:
        """The models of a request. `form_model`: that of its multipart form, for a source of that kind.

        Raises a Refusal for one that names two different ones.
        """
        if facts.alternatives or not self._keeps:
            return self._named(head, facts, form_model)
        target, stated, in_json = head.line.target, facts.model, json_model(facts)
        key = (target, stated, in_json)
        found = self._kept.get(key)
        if found is None:
            found = self._named(head, facts, None)
            if len(target) + len(stated or "") + len(in_json or "") <= _KEPT_CHARACTERS_MAX:
                if len(self._kept) >= _KEPT_MAX:
                    self._kept.clear()
                self._kept[key] = found
        return found

    @property
    def kept_count(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def _named(self, head: RequestHead, facts: RequestFacts, form_model: str | None) -> RequestModels:
        path, _, query = head.line.target.partition(b"?")
        value = form_model if self.source.kind == "form" else self.source_value(head)
        named = named_models(self.source, self.dialect, facts, path=path, query=query, value=value)
        candidates = candidates_of(self.models, named, facts.alternatives)
        return RequestModels(candidates, named.model, facts.alternatives, field=self.model_field)

    def source_value(self, head: RequestHead) -> str | None:
        """The model as a path or a header names it, for a source of that kind. Raises a Refusal if it stands twice."""
        if self.source.kind == "path" and self.placeholder is not None:
            return path_value(self.placeholder, head.line.path)
        if self.source.kind == "header":
            return counted_headers(head.block, self._header_names).get(self.source.name.lower())
        return None

"""What one request is judged by, from its arrival to its end.

    begun -> read -> judged, and judged again while it lasts

The values are read once, from the bytes that are forwarded. Scopes, owners and templates may change, so judging uses
those of its own time.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.body_content import ContentReading, check_media_type, check_untyped, is_form
from keyproxy.ai.access.counted_names import counted_headers, counted_pairs
from keyproxy.ai.access.judged_values import MISSING, Found, JudgedValues, found_at, found_text
from keyproxy.ai.access.model_judgement import JudgedModel
from keyproxy.ai.access.namespaces import judge_binds
from keyproxy.ai.access.tenant_records import TenantRecords
from keyproxy.ai.access.value_sources import HEADER, JSON, PATH, QUERY, path_value
from keyproxy.ai.categories import Categories, CategoryRules, CategoryValues
from keyproxy.ai.prompts import instructions_of, prompt_text
from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.scanning.request_parts import RequestParts
from keyproxy.http_messages import RequestHead
from keyproxy.model import Identity
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

_NOTHING: Final[dict[str, Found]] = {}


@mypyc_attr(acyclic=True)
class Judgement:
    """The result of judging a request. `lines`: the header lines that state it to the upstream."""

    __slots__ = ("categories", "lines", "model")

    def __init__(self, model: JudgedModel | None, categories: Categories | None, lines: bytes) -> None:
        self.model: Final = model
        self.categories: Final = categories
        self.lines: Final = lines


@mypyc_attr(acyclic=True)
class JudgedRequest:
    """`values`: None until the request is read. `judgement`: the last one, None before the first. `form_model`: the model
    that a form names, for its price."""

    __slots__ = ("_reading", "form_model", "judgement", "rules", "values")

    def __init__(self, rules: AccessRules, head: RequestHead) -> None:
        """Raises a Refusal (REQUEST_MALFORMED) for a request that cannot have the values that the rules read."""
        self.rules: Final = rules
        self.values: JudgedValues | None = None
        self.judgement: Judgement | None = None
        self.form_model: str | None = None
        self._reading: ContentReading | None = None
        fields = head.fields
        if fields.opens_tunnel:
            if rules.reads_json or rules.reads_form:
                raise malformed("A WebSocket handshake has no body, which this route reads.")
        elif head.has_body and rules.reads_body:
            check_media_type(rules, fields)

    # -- its values

    def collects(self, head: RequestHead) -> bool:
        """Whether the body has to be complete before the request is judged."""
        return self.rules.reads_body and head.has_body and not head.fields.opens_tunnel

    def is_scanned_by_metering(self, head: RequestHead) -> bool:
        """Whether the scan of a metered request has what is needed of the body."""
        return head.fields.is_json and not is_form(head.fields)

    @property
    def has_begun(self) -> bool:
        """Whether the reading of the body has begun."""
        return self._reading is not None

    def read(self, head: RequestHead, body: bytes) -> bool:
        """Read the next portion of the body; return whether it was the last. Raises a Refusal."""
        if not self.collects(head):
            self.take(head, b"", None)
            return True
        reading = self._reading
        if reading is None:
            reading = self._reading = ContentReading(self.rules, head, body)
        if not reading.advance() or reading.result is None:
            return False
        self._reading = None
        result = reading.result
        self.take(head, result.content, result.parts, result.fields)
        return True

    def take(
        self, head: RequestHead, content: bytes, parts: RequestParts | None, fields: dict[str, str] | None = None
    ) -> None:
        """Read the values from the inflated content of a body. `parts`: its scan, if it is JSON. `fields`: of a form.

        Raises a Refusal (REQUEST_MALFORMED, BODY_TOO_LARGE).
        """
        rules = self.rules
        model = rules.model
        if model is not None and parts is not None and not parts.is_object:
            raise malformed("The body must be a JSON object on this route.")
        check_untyped(rules, head.fields, content)
        target = head.line.target
        query = headers = None
        # Not `in`: for bytes it raises an exception within CPython first, which costs more than the search.
        if rules.query_names.exact and target.find(b"?") >= 0:
            query = counted_pairs(target.partition(b"?")[2], rules.query_names, "query")
        if rules.header_names.exact:
            headers = counted_headers(head.block, rules.header_names)
        known = None if rules.known is None or parts is None else rules.known.find(parts)
        document: Any = None
        if rules.needs_document and parts is not None and known is None:
            document = _parsed(content)
        found = _NOTHING
        if rules.sources:
            found = {}
            for source in rules.sources:
                if source.kind == JSON:
                    found[source.text] = MISSING if parts is None else found_at(document, source.pointer)
                elif source.kind == PATH:
                    found[source.text] = found_text(path_value(rules.placeholders[source.name], head.line.path))
                else:
                    texts = query if source.kind == QUERY else headers
                    found[source.text] = MISSING if texts is None else found_text(texts.get(source.name))
        values = JudgedValues(found)
        if model is not None:
            values.models = model.models_of(target, parts, query=query, headers=headers, fields=fields)
            if rules.reads_form:
                self.form_model = values.models.model
        if known is not None:
            values.instructions = known
        elif rules.categories is not None:
            _read_categories(values, rules.categories, headers, document)
            if rules.known is not None and parts is not None and values.instructions is not None:
                rules.known.add(parts, values.instructions)
        self.values = values

    # -- what it may use

    def judge(self, identity: Identity, records: TenantRecords) -> Judgement:
        """Judge a request that was read. Raises a Refusal, and Missing for what is not in memory."""
        if self.values is None:
            raise Refusal(Reason.INTERNAL_ERROR, "a request is judged before it is read")
        judgement = self.judgement = judge_values(self.rules, self.values, identity, records)
        return judgement


def judge_values(rules: AccessRules, values: JudgedValues, identity: Identity, records: TenantRecords) -> Judgement:
    """Judge the values of a request: model, categories, binds, in this order.

    Raises a Refusal, and Missing for what is not in memory.
    """
    model, categories, lines = None, None, b""
    if values.models is not None:
        model = values.models.judge(identity, records)
        if records.lacks():
            # The ids of binds are fetched in the same round.
            for bind in rules.binds:
                bind.holds(values.at(bind.source.text), identity, records)
            records.require()
        lines = model.line
    if rules.categories is not None:
        categories = _judge_categories(rules.categories, values, identity, records)
        lines += categories.header
    if rules.binds:
        judge_binds(rules.binds, values, identity, records)
        records.require()
    return Judgement(model, categories, lines)


def _parsed(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        # The scan has accepted it: a number is beyond the range of a double.
        raise malformed(f"The body is not well-formed JSON: {error.msg}.") from error


def _read_categories(values: JudgedValues, rules: CategoryRules, headers: dict[str, str] | None, document: Any) -> None:
    declared: list[object] = []
    for source in rules.declared:
        if source.kind == HEADER:
            declared.append(None if headers is None else headers.get(source.name.lower()))
        else:
            found = MISSING if document is None else found_at(document, source.pointer)
            declared.append(None if found.is_other or not found.values else found.values[0])
    if declared:
        values.declared = tuple(declared)
    if not (rules.uses_template or rules.uses_patterns):
        return
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise malformed("The body must be a JSON object on this route.")
    if rules.uses_template:
        values.instructions = instructions_of(rules.shape, document)
    if rules.uses_patterns:
        values.search = rules.search(prompt_text(rules.shape, document))


def _judge_categories(
    rules: CategoryRules, values: JudgedValues, identity: Identity, records: TenantRecords
) -> Categories:
    instructions, template = values.instructions, None
    if instructions is not None:
        # Looked up in any case: while templates are unavailable, no prompt of the route is judged.
        template = records.category(instructions.digest)
        if not instructions.is_registrable:
            template = None
    if not values.declared and values.search is None:
        categories = rules.find_template(template)
    else:
        matched = () if values.search is None else values.search.categories()
        categories = rules.find(CategoryValues(values.declared, template, matched))
    values.categories = categories
    categories.check(identity.scopes)
    return categories

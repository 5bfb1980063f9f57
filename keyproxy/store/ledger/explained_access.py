"""Judge a hypothetical request by its model, categories and namespaces, as a proxy would."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.counted_names import counted_pairs
from keyproxy.ai.access.judged_request import JudgedRequest, judge_values
from keyproxy.ai.access.judged_values import Found, JudgedValues, found_text
from keyproxy.ai.access.tenant_records import TenantRecords
from keyproxy.ai.access.value_sources import PATH, QUERY, parse_value_source, path_value
from keyproxy.ai.prompts import Instructions
from keyproxy.http_messages import RequestFields, RequestHead, RequestLine
from keyproxy.model import Identity
from keyproxy.reasons import Refusal
from keyproxy.store.directory.errors import Invalid

_JSON: Final = RequestFields(host=b"localhost", host_block=b"", media_type=b"application/json")


class StatedValues(NamedTuple):
    """What the question states about a request. `model`, `categories`, `namespaces`: in place of what it would contain.

    `namespaces`: source and value of each. `body`: None: it has none.
    """

    target: bytes
    model: str = ""
    categories: Sequence[str] = ()
    namespaces: Sequence[tuple[str, str]] = ()
    body: bytes | None = None


class OwnerReader(Protocol):
    """The database, as far as owned ids are looked up."""

    async def fetch(self, name: str, *arguments: object) -> Sequence[Any]:
        """The rows of a named query."""
        ...


class _StatedRecords(TenantRecords):
    """Records of the caller's tenant. Ids that were not looked up yet are collected in `asked`."""

    def __init__(self, category: str | None) -> None:
        self.asked: set[tuple[str, str]] = set()
        self.owned: dict[tuple[str, str], bool] = {}
        self._category: Final = category

    def owns(self, kind: str, object_id: str) -> bool:
        subject = (kind, object_id)
        if subject not in self.owned:
            self.asked.add(subject)
        return self.owned.get(subject, True)

    def lacks(self) -> bool:
        return False

    def require(self) -> None:
        """All ids were looked up before they are judged."""

    async def look_up(self, database: OwnerReader, tenant_id: str) -> None:
        """Look up all ids that were requested."""
        asked = sorted(self.asked)
        if asked:
            kinds, ids = [kind for kind, _ in asked], [object_id for _, object_id in asked]
            rows = await database.fetch("owners_by_id", kinds, ids, [tenant_id] * len(asked))
            self.owned |= {(row["kind"], row["id"]): row["is_owned"] for row in rows}

    def category(self, digest: bytes) -> str | None:
        del digest
        return self._category


class ExplainedAccess:
    """The judgement of one request. `shown`: the members of the explanation."""

    def __init__(self, rules: AccessRules | None, stated: StatedValues, identity: Identity) -> None:
        """Raises Invalid for a namespace that the route does not bind, a Refusal for a malformed request."""
        self._rules: Final = rules
        self._identity: Final = identity
        self._records: Final = _StatedRecords(stated.categories[0] if stated.categories else None)
        self._values: Final = JudgedValues({}) if rules is None else _values(rules, stated)
        self.model: str | None = None
        self.categories: list[dict[str, str]] = []

    async def judge(self, database: OwnerReader) -> None:
        """Judge the request. Raises a Refusal, or StoreUnavailable if owned ids cannot be looked up."""
        rules, values, identity, records = self._rules, self._values, self._identity, self._records
        if rules is None:
            return
        if values.models is not None:
            with contextlib.suppress(Refusal):
                values.models.judge(identity, records)
        for bind in rules.binds:
            bind.holds(values.at(bind.source.text), identity, records)
        await records.look_up(database, identity.tenant_id)
        if values.models is not None:
            self.model = values.models.recorded or None
        try:
            judgement = judge_values(rules, values, identity, records)
            if judgement.model is not None:
                self.model = judgement.model.name
        finally:
            if values.categories is not None:
                self.categories = [{"name": name, "source": source} for name, source in values.categories.counted]

    def shown(self) -> dict[str, Any]:
        """`model`: of the row, or as named; None if none is judged. `categories`: those that were found. `binds`: all."""
        binds = () if self._rules is None else self._rules.binds
        return {
            "model": self.model,
            "categories": self.categories,
            "binds": [
                {
                    "value": bind.source.text,
                    "rule": bind.rule,
                    "text": bind.text,
                    "holds": bind.holds(self._values.at(bind.source.text), self._identity, self._records),
                }
                for bind in binds
            ],
        }


def _values(rules: AccessRules, stated: StatedValues) -> JudgedValues:
    values = _read(rules, stated)
    if rules.model is not None and values.models is not None and stated.model:
        values.models = rules.model.replaced(values.models, stated.model)
    if rules.categories is not None and (stated.body is None or stated.categories):
        given = [*stated.categories]
        # One category stands for all sources; of several, each source takes the next.
        values.declared = tuple(
            [given[min(place, len(given) - 1)] if given else None for place in range(len(rules.categories.declared))]
        )
        values.instructions = Instructions(b"") if rules.categories.uses_template else None
    stated_texts: dict[str, list[str]] = {}
    for source, value in stated.namespaces:
        stated_texts.setdefault(_bound(rules, source), []).append(value)
    for text, found in stated_texts.items():
        values.found[text] = Found(tuple(found))
    return values


def _bound(rules: AccessRules, source: str) -> str:
    """The text of a bound source, which may be stated in another case where that makes no difference."""
    try:
        wanted = parse_value_source(source)
    except ValueError as error:
        raise Invalid(f"namespace: {error}") from error
    for one in rules.sources:
        if one[1:] == wanted[1:]:
            return one.text
    known = ", ".join([one.text for one in rules.sources]) or "none"
    raise Invalid(f"namespace: the route does not bind {source!r}; bound: {known}")


def _read(rules: AccessRules, stated: StatedValues) -> JudgedValues:
    """The values in the target and the body."""
    path, _, raw_query = stated.target.partition(b"?")
    if stated.body is not None and rules.reads_body:
        line = RequestLine(b"POST", stated.target, path, 1, b"")
        judged = JudgedRequest(rules, RequestHead(line, _JSON, b"", (), len(stated.body)))
        head = RequestHead(line, _JSON, b"", (), len(stated.body))
        while judged.values is None:
            judged.read(head, stated.body)
        return judged.values
    query = counted_pairs(raw_query, rules.query_names, "query") if raw_query and rules.query_names else {}
    values = JudgedValues({})
    for source in rules.sources:
        if source.kind == PATH:
            values.found[source.text] = found_text(path_value(rules.placeholders[source.name], path))
        elif source.kind == QUERY:
            values.found[source.text] = found_text(query.get(source.name))
    if rules.model is not None:
        values.models = rules.model.models_of(stated.target, None, query=query)
    return values

"""A request has the union of the categories of its sources, and needs the row and the scopes of each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from keyproxy.ai.categories import (
    PATTERN_TEXT_BYTES_MAX,
    Category,
    CategoryRules,
    CategorySource,
    CategoryValues,
    PatternMatcher,
    parse_category_source,
)
from keyproxy.model import Missing
from keyproxy.reasons import Reason, Refusal

ROWS = [
    Category("code", frozenset({"prompt:code"})),
    Category("medical", frozenset({"prompt:medical", "hipaa"})),
    Category("chat"),
    Category("other", frozenset({"prompt:other"})),
]

ALL = frozenset({"prompt:code", "prompt:medical", "prompt:other", "hipaa"})


class Words(PatternMatcher):
    """Finds categories by their names. `slow_bytes`: texts from this size on are matched in a thread."""

    def __init__(self, slow_bytes: int = 1 << 30) -> None:
        self._slow_bytes = slow_bytes

    def matching(self, text: bytes) -> tuple[str, ...]:
        return tuple(row.name for row in ROWS if row.name.encode() in text)

    def is_quick(self, text_bytes: int) -> bool:
        return text_bytes < self._slow_bytes

    async def matching_in_thread(self, text: bytes) -> tuple[str, ...]:
        return self.matching(text)


def rules(*sources: str, unregistered: str = "", matcher: PatternMatcher | None = None) -> CategoryRules:
    return CategoryRules(
        map(parse_category_source, sources), ROWS, shape="openai", unregistered=unregistered, matcher=matcher or Words()
    )


def matched(judged: CategoryRules, texts: list[str]) -> tuple[str, ...]:
    search = judged.search(texts)
    assert search is not None
    return search.categories()


@pytest.mark.parametrize(
    ("sources", "values", "header", "counted"),
    [
        (["=chat"], CategoryValues(), "chat", [("chat", "route")]),
        (["=code", "=chat", "=code"], CategoryValues(), "chat code", [("code", "route"), ("chat", "route")]),
        (["template"], CategoryValues(template="code"), "code", [("code", "template")]),
        (["header:X-Kind"], CategoryValues(("code",)), "code", [("code", "declared")]),
        (["json:/kind"], CategoryValues(("code",)), "code", [("code", "declared")]),
        (
            ["json:/kind", "header:X-Kind"],
            CategoryValues(("code", "chat")),
            "chat code",
            [("code", "declared"), ("chat", "declared")],
        ),
        (["=chat", "patterns"], CategoryValues(), "chat", [("chat", "route")]),
        (
            ["=chat", "patterns"],
            CategoryValues(matched=("code", "medical")),
            "chat code medical",
            [("chat", "route"), ("code", "pattern"), ("medical", "pattern")],
        ),
        (
            ["template", "=code", "header:X-Kind", "patterns"],
            CategoryValues(("code",), "code", ("code",)),
            "code",
            [("code", "route"), ("code", "template"), ("code", "declared"), ("code", "pattern")],
        ),
    ],
)
def test_request_has_the_union_of_its_sources_categories(
    sources: list[str], values: CategoryValues, header: str, counted: Sequence[tuple[str, str]]
) -> None:
    judged = rules(*sources)
    for _ in range(2):  # made, then kept
        found = judged.find(values)
        found.check(ALL)
        assert found.header == f"X-Keyproxy-Category: {header}\r\n".encode()
        assert list(found.counted) == list(counted)
        assert found.names == tuple(header.split())


@pytest.mark.parametrize(
    ("sources", "values"),
    [
        (["template"], CategoryValues()),
        (["template"], CategoryValues(template="nameless")),
        (["header:X-Kind"], CategoryValues((None,))),
        (["header:X-Kind"], CategoryValues(("",))),
        (["header:X-Kind"], CategoryValues(("Code",))),
        (["header:X-Kind"], CategoryValues(("code ",))),
        (["header:X-Kind"], CategoryValues(("code chat",))),
        (["json:/kind"], CategoryValues((["code"],))),
        (["json:/kind"], CategoryValues((7,))),
        (["json:/kind"], CategoryValues(({"code": True},))),
        (["=chat", "json:/kind"], CategoryValues((None,))),
        (["=chat", "template"], CategoryValues()),
    ],
)
def test_what_has_no_row_is_refused_whatever_the_scopes(sources: list[str], values: CategoryValues) -> None:
    with pytest.raises(Refusal) as error:
        rules(*sources).find(values)
    assert (error.value.reason, error.value.missing_scopes) == (Reason.PROMPT_CATEGORY_NOT_ALLOWED, ())
    assert error.value.detail


@pytest.mark.parametrize("template", [None, "code"])
def test_unregistered_instructions_have_the_category_of_the_route(template: str | None) -> None:
    found = rules("template", unregistered="chat").find(CategoryValues(template=template))
    assert found.counted == ((template or "chat", "template"),)


@pytest.mark.parametrize(
    ("scopes", "missing"),
    [
        (ALL, None),
        (ALL - {"prompt:code"}, "prompt:code"),
        (ALL - {"prompt:code", "hipaa"}, "hipaa"),
        (ALL - {"prompt:medical"}, "prompt:medical"),
        (frozenset[str](), "hipaa"),
    ],
)
def test_every_category_needs_its_scopes_and_the_smallest_missing_one_is_named(
    scopes: frozenset[str], missing: str | None
) -> None:
    judged = rules("template", "=chat", "patterns")
    values = CategoryValues((), "code", ("medical",))
    for _ in range(2):
        if missing is None:
            judged.find(values).check(scopes)
            continue
        with pytest.raises(Refusal) as error:
            judged.find(values).check(scopes)
        assert error.value.reason is Reason.PROMPT_CATEGORY_NOT_ALLOWED
        assert tuple(error.value.missing_scopes) == (missing,)


def test_patterns_match_all_texts_and_no_text_spans_two() -> None:
    judged = rules("=chat", "patterns")
    assert matched(judged, ["some", "code", "and medical"]) == ("code", "medical")
    assert matched(judged, ["co", "de"]) == ()
    assert rules("=chat").search(["code"]) is None


async def test_a_long_search_is_missing_until_a_thread_has_made_it() -> None:
    search = rules("=chat", "patterns", matcher=Words(slow_bytes=5)).search(["medical"])
    assert search is not None
    for _ in range(2):
        with pytest.raises(Missing) as missing:
            search.categories()
    await missing.value.fetch_missing()
    assert search.categories() == search.categories() == ("medical",)


@pytest.mark.parametrize("texts", [["x" * PATTERN_TEXT_BYTES_MAX], ["\u00e9" * (PATTERN_TEXT_BYTES_MAX // 2)]])
def test_text_for_patterns_is_bounded_in_bytes(texts: list[str]) -> None:
    judged = rules("=chat", "patterns")
    assert matched(judged, texts) == ()
    with pytest.raises(Refusal) as error:
        judged.search([*texts, "x"])
    assert error.value.reason is Reason.BODY_TOO_LARGE


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("=code", CategorySource("=", "code")),
        ("template", CategorySource("template")),
        ("patterns", CategorySource("patterns")),
        ("header:X-Kind", CategorySource("header", "X-Kind")),
        ("json:/kind", CategorySource("json", "/kind", ("kind",))),
        ("json:/metadata/kind", CategorySource("json", "/metadata/kind", ("metadata", "kind"))),
        ("json:/a~1b/c~0d/e~01", CategorySource("json", "/a~1b/c~0d/e~01", ("a/b", "c~d", "e~1"))),
    ],
)
def test_source_is_read_from_its_text(text: str, source: CategorySource) -> None:
    assert parse_category_source(text) == source
    assert str(parse_category_source(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "code", "=", "=Code", "=a b", "header:", "header:X Kind", "header:X_Kind", "json:", "json:kind", "json:/",
     "json:/a//b", "json:/a/", "json:/a/*", "json:/~2", "json:/a~", "query:kind", "Template", "template ",
     "json:" + "/a" * 16],
)  # fmt: skip
def test_any_other_source_is_a_fault(text: str) -> None:
    with pytest.raises(ValueError, match=r"must|may|not"):
        parse_category_source(text)

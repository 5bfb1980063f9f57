"""The categories of a request's prompt: which sources name them, and whether the caller may use them.

A request has the union of the categories of its route's sources. Each needs a row of the configuration and its scopes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from keyproxy.model import Missing
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

#: Kinds of sources.
FIXED: Final = "="
TEMPLATE: Final = "template"
HEADER: Final = "header"
JSON: Final = "json"
PATTERNS: Final = "patterns"

#: Sources in metrics, by kind.
_COUNTED: Final = {
    FIXED: "route", TEMPLATE: "template", HEADER: "declared", JSON: "declared", PATTERNS: "pattern",
}  # fmt: skip

CATEGORY_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_POINTER_MAX: Final = 16
_POINTER_BYTES_MAX: Final = 1_024

#: Text beyond this is not matched against patterns: the request is refused.
PATTERN_TEXT_BYTES_MAX: Final = 1 << 20

#: Results that are kept for later requests with the same categories.
_KEPT_MAX: Final = 1_024


@dataclass(frozen=True, slots=True, eq=False)
class Category:
    """One row of the configuration."""

    name: str
    scopes: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()


class CategorySource(NamedTuple):
    """`kind`: one of the kinds above. `name`: of the category or the header. `pointer`: the members of a JSON pointer."""

    kind: str
    name: str = ""
    pointer: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """The source in metrics."""
        return _COUNTED[self.kind]

    def __str__(self) -> str:
        if self.kind == FIXED:
            return f"={self.name}"
        return f"{self.kind}:{self.name}" if self.name else self.kind


def parse_category_source(text: str) -> CategorySource:
    """Read one source of the setting `category` of a route. Raises ValueError, whose text describes the fault."""
    if text in (TEMPLATE, PATTERNS):
        return CategorySource(text)
    if text.startswith(FIXED):
        name = text[1:]
        if not CATEGORY_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid name of a category")
        return CategorySource(FIXED, name)
    kind, _, name = text.partition(":")
    if kind == HEADER:
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid name in header:NAME")
        return CategorySource(HEADER, name)
    if kind == JSON:
        return CategorySource(JSON, name, _pointer(name))
    raise ValueError(f"{text!r} must be =NAME, template, header:NAME, json:/pointer or patterns")


def _pointer(text: str) -> tuple[str, ...]:
    """The members of a JSON pointer, RFC 6901."""
    members = text.split("/")
    if members[0] or len(members) < 2 or not all(members[1:]):
        raise ValueError(f"{text!r} is not a JSON pointer such as /metadata/category")
    if len(members) > _POINTER_MAX or len(text.encode()) > _POINTER_BYTES_MAX:
        raise ValueError(f"a JSON pointer may have at most {_POINTER_MAX} members")
    if "*" in members:
        raise ValueError(f"{text!r} must name one value: '*' is not allowed")
    if any(re.search(r"~(?![01])", member) for member in members):
        raise ValueError(f"{text!r} is not a JSON pointer: '~' must be followed by 0 or 1")
    return tuple([member.replace("~1", "/").replace("~0", "~") for member in members[1:]])


@mypyc_attr(allow_interpreted_subclasses=True)
class PatternMatcher:
    """Matches the patterns of all categories at once."""

    def matching(self, text: bytes) -> tuple[str, ...]:
        """The categories with a pattern that occurs in a text, in UTF-8."""
        raise NotImplementedError

    def is_quick(self, text_bytes: int) -> bool:
        """Whether a text of this size is matched without a noticeable delay of other requests."""
        raise NotImplementedError

    async def matching_in_thread(self, text: bytes) -> tuple[str, ...]:
        """As `matching`, while other requests go on. Raises a Refusal (OVERLOADED)."""
        raise NotImplementedError


class PatternSearch:
    """The search for patterns in one prompt."""

    __slots__ = ("_found", "_matcher", "_text")

    def __init__(self, matcher: PatternMatcher, text: bytes) -> None:
        self._matcher: Final = matcher
        self._text = text
        self._found: tuple[str, ...] | None = None

    def categories(self) -> tuple[str, ...]:
        """The categories with a pattern that occurs in the prompt. Never waits. Raises Missing for a long search."""
        if self._found is None:
            if not self._matcher.is_quick(len(self._text)):
                raise Missing("pattern search", lambda _patience: self._search())
            self._keep(self._matcher.matching(self._text))
        return self._found or ()

    async def _search(self) -> None:
        self._keep(await self._matcher.matching_in_thread(self._text))

    def _keep(self, found: tuple[str, ...]) -> None:
        self._found, self._text = found, b""


@mypyc_attr(acyclic=True)
class CategoryValues:
    """The values of a route's sources in one request.

    `declared`: the value at each of the rules' `declared` sources, None if it is absent. `template`: the category of the
    registered digest, None if it is unregistered. `matched`: what the `PatternSearch` found.
    """

    __slots__ = ("declared", "matched", "template")

    def __init__(
        self, declared: tuple[object, ...] = (), template: str | None = None, matched: tuple[str, ...] = ()
    ) -> None:
        self.declared: Final = declared
        self.template: Final = template
        self.matched: Final = matched


class Categories:
    """The categories of a request. `header`: the line for the upstream. `counted`: (category, source) for metrics.

    `names`: sorted. `scopes`: what they need together.
    """

    __slots__ = ("counted", "header", "names", "scopes")

    def __init__(
        self, names: tuple[str, ...], counted: tuple[tuple[str, str], ...], scopes: frozenset[str], header: bytes
    ) -> None:
        self.names: Final = names
        self.counted: Final = counted
        self.scopes: Final = scopes
        self.header: Final = header

    def check(self, scopes: frozenset[str]) -> None:
        """Raise a Refusal (PROMPT_CATEGORY_NOT_ALLOWED) that names the smallest scope which the caller's lack."""
        if self.scopes <= scopes:
            return
        missing = min(self.scopes - scopes)
        raise Refusal(
            Reason.PROMPT_CATEGORY_NOT_ALLOWED,
            f"of the categories {' '.join(self.names)}",
            caller_text=f"Missing scope: '{missing}'.",
            missing_scopes=(missing,),
        )


class CategoryRules:
    """How the categories of one route's requests are judged: made when the configuration is loaded.

    `shape`: the prompt's, needed by `uses_template` and `uses_patterns`. `declared`: the sources whose values the
    request declares, in their order.
    """

    __slots__ = (
        "_by_template", "_field", "_fixed", "_kept", "_matcher", "_table", "_unregistered",
        "declared", "shape", "uses_patterns", "uses_template",
    )  # fmt: skip

    def __init__(
        self,
        sources: Iterable[CategorySource],
        categories: Iterable[Category],
        *,
        shape: str = "",
        unregistered: str = "",
        matcher: PatternMatcher | None = None,
        field: bytes = b"X-Keyproxy-Category: ",
    ) -> None:
        """`unregistered`: the category of unregistered instructions; empty: they are refused. `field`: the start of the
        header line. `matcher`: None if the configuration has no patterns."""
        listed = tuple(sources)
        self.shape: Final = shape
        self.declared: Final = tuple([one for one in listed if one.kind in (HEADER, JSON)])
        self.uses_template: Final = any(one.kind == TEMPLATE for one in listed)
        self.uses_patterns: Final = any(one.kind == PATTERNS for one in listed)
        self._fixed: Final = tuple([(one.name, one.counted) for one in listed if one.kind == FIXED])
        self._table: Final = {category.name: category for category in categories}
        self._unregistered: Final = unregistered
        self._matcher: Final = matcher if self.uses_patterns else None
        self._field: Final = field
        self._kept: Final[dict[tuple[tuple[str, str], ...], Categories]] = {}
        #: Those of a template alone, beside the fixed ones, which is the usual case.
        self._by_template: Final[dict[str | None, Categories]] = {}

    def search(self, texts: list[str]) -> PatternSearch | None:
        """The search for patterns in the prompt's texts; None without patterns. Raises a Refusal (BODY_TOO_LARGE)."""
        if self._matcher is None:
            return None
        text = "\n".join(texts).encode("utf-8", "replace")
        if len(text) > PATTERN_TEXT_BYTES_MAX:
            raise Refusal(
                Reason.BODY_TOO_LARGE, f"its prompt has more than {PATTERN_TEXT_BYTES_MAX} bytes of text for patterns"
            )
        return PatternSearch(self._matcher, text)

    def find(self, values: CategoryValues) -> Categories:
        """The categories of a request. Raises a Refusal (PROMPT_CATEGORY_NOT_ALLOWED) if a source names none."""
        is_usual = not (values.declared or values.matched)
        found = self._by_template.get(values.template) if is_usual else None
        if found is None:
            counted = self._counted(values)
            found = self._kept.get(counted)
            if found is None:
                found = self._made(counted)
            if is_usual and len(self._by_template) < _KEPT_MAX:
                self._by_template[values.template] = found
        return found

    def find_template(self, template: str | None) -> Categories:
        """As `find`, for a request that declares no category and matches no pattern."""
        found = self._by_template.get(template)
        return self.find(CategoryValues(template=template)) if found is None else found

    def _counted(self, values: CategoryValues) -> tuple[tuple[str, str], ...]:
        """The categories with their sources."""
        counted = list(self._fixed)
        if self.uses_template:
            category = self._unregistered if values.template is None else values.template
            if not category:
                raise _refused("the system prompt is unregistered", "The system prompt is not registered.")
            counted.append((category, _COUNTED[TEMPLATE]))
        for source, value in zip(self.declared, values.declared, strict=True):
            if not isinstance(value, str) or value not in self._table:
                raise _refused(f"{source} names no configured category", "The request does not name a known category.")
            counted.append((value, source.counted))
        counted += [(name, _COUNTED[PATTERNS]) for name in values.matched]
        return tuple(counted)

    def _made(self, counted: tuple[tuple[str, str], ...]) -> Categories:
        names = tuple(sorted({name for name, _ in counted}))
        scopes: set[str] = set()
        for name in names:
            row = self._table.get(name)
            if row is None:
                raise _refused(f"the category {name!r} is not configured")
            scopes |= row.scopes
        header = self._field + " ".join(names).encode("ascii") + b"\r\n"
        made = Categories(names, tuple(dict.fromkeys(counted)), frozenset(scopes), header)
        if len(self._kept) < _KEPT_MAX:
            self._kept[counted] = made
        return made


def _refused(detail: str, caller_text: str = "") -> Refusal:
    return Refusal(Reason.PROMPT_CATEGORY_NOT_ALLOWED, detail, caller_text=caller_text)

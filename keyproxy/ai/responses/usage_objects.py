"""Read reported usage: the objects with counts of the APIs, and the `X-Usage-Tokens` header.

Only a whole number of tokens is a report. A string, a float, a negative number or an impossibly large one is not, and
neither is an object that lacks the members of its API or has a malformed one: such a response counts as one without a
report. 0 is a report like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from keyproxy.ai.dialects.endpoint import MemberPath, UsageFields
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.mypyc_compat import mypyc_attr

#: A larger number is not credible, and would overflow the sums.
TOKENS_MAX: Final = 10**12

_DIGITS_MAX: Final = 13


@mypyc_attr(acyclic=True)
class UsageReport:
    """Reported tokens. `cached` and `cache_write` are parts of `tokens_in`, `reasoning` is a part of `tokens_out`."""

    __slots__ = ("cache_write", "cached", "reasoning", "tokens_in", "tokens_out")

    def __init__(
        self, tokens_in: int, tokens_out: int, *, cached: int = 0, cache_write: int = 0, reasoning: int = 0
    ) -> None:
        self.tokens_in: Final = tokens_in
        self.tokens_out: Final = tokens_out
        self.cached: Final = min(cached, tokens_in)
        self.cache_write: Final = min(cache_write, tokens_in - self.cached)
        self.reasoning: Final = min(reasoning, tokens_out)

    @property
    def use(self) -> TokenUse:
        """The value that is charged and recorded."""
        return TokenUse(
            self.tokens_in, self.tokens_out,
            cached=self.cached, cache_write=self.cache_write, reasoning=self.reasoning,
        )  # fmt: skip

    def _values(self) -> tuple[int, int, int, int, int]:
        return (self.tokens_in, self.tokens_out, self.cached, self.cache_write, self.reasoning)

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, UsageReport) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return "UsageReport({}, {}, cached={}, cache_write={}, reasoning={})".format(*self._values())


def report_in(fields: UsageFields, counts: Mapping[str, object], *, by_total: bool = False) -> UsageReport | None:
    """Return the usage in an object with counts; None if it is no report. `by_total`: its total is enough."""
    total = _count(counts, fields.total)
    outputs = fields.outputs
    if not (by_total and total != _ABSENT) and (
        _count(counts, fields.inputs[0]) == _ABSENT or (outputs and _count(counts, outputs[0]) == _ABSENT)
    ):
        return None
    tokens_in, tokens_out = _sum(counts, fields.inputs), _sum(counts, outputs)
    cached, cache_write = _count(counts, fields.cached), _count(counts, fields.cache_write)
    reasoning = _count(counts, fields.reasoning)
    if _MALFORMED in (total, tokens_in, tokens_out, cached, cache_write, reasoning) or is_no_report(fields, counts):
        return None
    if outputs:
        tokens_out = max(tokens_out, total - tokens_in)
    return UsageReport(
        tokens_in, tokens_out, cached=max(0, cached), cache_write=max(0, cache_write), reasoning=max(0, reasoning)
    )


def input_in(fields: UsageFields, counts: Mapping[str, object]) -> UsageReport | None:
    """Return the input in an object that may have no output yet; None if it has no credible input."""
    tokens_in = _sum(counts, fields.inputs)
    cached, cache_write = _count(counts, fields.cached), _count(counts, fields.cache_write)
    if is_no_report(fields, counts) or _count(counts, fields.inputs[0]) == _ABSENT:
        return None
    if _MALFORMED in (tokens_in, cached, cache_write):
        return None
    return UsageReport(tokens_in, 0, cached=max(0, cached), cache_write=max(0, cache_write))


def has_output(fields: UsageFields, counts: Mapping[str, object]) -> bool:
    """Whether the object has the count of output, credible or not."""
    return bool(fields.outputs) and _count(counts, fields.outputs[0]) != _ABSENT


def header_report(value: bytes | None) -> UsageReport | None:
    """Return the total of a response's only `X-Usage-Tokens`, counted as output; None: it has none, or several."""
    if value is None or not value or len(value) > _DIGITS_MAX:
        return None
    total = 0
    for at in range(len(value)):
        digit = value[at] - 48
        if not 0 <= digit <= 9:
            return None
        total = 10 * total + digit
    return None if total > TOKENS_MAX else UsageReport(0, total)


def is_no_report(fields: UsageFields, counts: Mapping[str, object]) -> bool:
    """Whether the object is of a type that does not count tokens, as an audio's duration."""
    if not fields.no_report_types:
        return False
    kind = counts.get("type")
    return isinstance(kind, str) and kind in fields.no_report_types


def member(document: Mapping[str, object], path: MemberPath) -> object:
    """Return the member at a path; None if there is none."""
    value: object = document
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def is_count(value: object) -> bool:
    """Whether this is a number of tokens. In Python `True` is an `int`, but it is no number in JSON."""
    # Checked first: the compiled build treats a value that it has narrowed to int as a number, and True as 1.
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    count: int = value
    return 0 <= count <= TOKENS_MAX


_ABSENT: Final = -1
_MALFORMED: Final = -2


def _count(counts: Mapping[str, object], path: MemberPath | None) -> int:
    """A count; `_ABSENT` if it is absent or null, `_MALFORMED` if it is no count."""
    value = None if path is None else member(counts, path)
    if value is None:
        return _ABSENT
    if isinstance(value, bool) or not isinstance(value, int):
        return _MALFORMED
    count: int = value
    return count if 0 <= count <= TOKENS_MAX else _MALFORMED


def _sum(counts: Mapping[str, object], paths: tuple[MemberPath, ...]) -> int:
    """The sum of the counts that are there; `_MALFORMED` if one is no count."""
    total = 0
    for path in paths:
        count = _count(counts, path)
        if count == _MALFORMED:
            return _MALFORMED
        if count > 0:
            total += count
    return total

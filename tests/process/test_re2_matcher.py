"""Patterns of prompts: RE2's syntax, one pass over the text, and no request waits for a slow one."""

from __future__ import annotations

import asyncio
import random
import sys
import time

import pytest

from keyproxy.ai.categories import Category
from keyproxy.process.patterns.re2_matcher import PatternError, Re2Matcher, compile_patterns
from keyproxy.reasons import Reason, Refusal


def compiled(**patterns: str) -> Re2Matcher:
    found = compile_patterns([Category(name, patterns=(pattern,)) for name, pattern in patterns.items()])
    assert found is not None
    return found


def problems(*categories: Category) -> list[str]:
    with pytest.raises(PatternError) as error:
        compile_patterns(categories)
    assert str(error.value)
    return error.value.problems


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("secret", "a secret plan", True),
        ("secret", "a Secret plan", False),
        ("(?i)secret", "a SECRET plan", True),
        (r"\bplan\b", "planet", False),
        (r"^line", "first\nline", False),
        (r"(?m)^line", "first\nline", True),
        (r"a.c", "a\nc", False),
        (r"(?s)a.c", "a\nc", True),
        (r"\d{3}-\d{2}-\d{4}", "his SSN is 078-05-1120.", True),
        ("prix: \u20ac", "prix: \u20ac 7", True),
        (r"\p{Greek}+", "\u03b1\u03b2", True),
        (r"^.$", "\U0001f600", True),
        ("", "", True),
    ],
)
def test_pattern_is_searched_in_utf_8(pattern: str, text: str, matches: bool) -> None:
    assert compiled(found=pattern).matching(text.encode()) == (("found",) if matches else ())


def test_text_has_every_category_with_a_pattern_that_occurs_in_it() -> None:
    matcher = compile_patterns(
        [
            Category("code", patterns=("refactor", "compile")),
            Category("chat"),
            Category("medical", patterns=("diagnos", "patient")),
        ]
    )
    assert matcher is not None
    assert matcher.matching(b"compile and refactor the patient's file") == ("code", "medical")
    assert matcher.matching(b"patient") == ("medical",)
    assert matcher.matching(b"hello") == ()


def test_without_patterns_there_is_no_matcher() -> None:
    assert compile_patterns([Category("code")]) is compile_patterns([]) is None


@pytest.mark.parametrize("pattern", ["(", "a**", "[z-a]", r"(?=a)", r"(a)\1", "a{2000}", "\\", r"(?<!a)b", r"\Z"])
def test_every_invalid_pattern_is_named_with_its_row_and_reason(pattern: str) -> None:
    found = problems(Category("fine", patterns=("a",)), Category("wrong", patterns=("b", pattern, "(")))
    assert len(found) == 2
    for problem, wrong in zip(found, (pattern, "("), strict=True):
        assert problem.startswith(f"categories[2].patterns: {wrong!r} is not a valid pattern of RE2: ")
        assert not problem.endswith(": ")


def test_patterns_that_need_too_much_memory_are_refused() -> None:
    found = problems(Category("wide", patterns=tuple(rf"(?i)\pL{number}.{{0,999}}x" for number in range(200))))
    assert len(found) == 1
    assert "MiB" in found[0]


def test_without_google_re2_patterns_are_refused_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    assert compile_patterns([Category("code")]) is None
    assert problems(Category("code"), Category("chat", patterns=("a",))) == [
        "categories[2].patterns: need google-re2: pip install 'keyproxy[patterns]'"
    ]


#: Slow on texts of `a` and `b`: any of the last 200 characters may have begun a match.
SLOW = "a.{200}b"


def slow_text(count: int) -> bytes:
    return bytes(random.Random(1).choices(b"ab ", k=count))


async def test_text_that_takes_long_is_matched_in_a_thread_while_the_loop_goes_on() -> None:
    matcher = compiled(slow=SLOW)
    assert matcher.is_quick(1 << 20)
    matcher.matching(slow_text(10_000))
    assert not matcher.is_quick(100_000)
    assert matcher.is_quick(100)
    longest, last = 0.0, time.monotonic()
    searching = asyncio.create_task(matcher.matching_in_thread(slow_text(60_000)))
    while not searching.done():
        await asyncio.sleep(0.001)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert searching.result() == ("slow",)
    assert longest < 0.2


async def test_texts_wait_for_the_thread_in_turn_and_too_many_are_refused() -> None:
    matcher = compiled(slow=SLOW)
    searches = [asyncio.create_task(matcher.matching_in_thread(slow_text(500))) for _ in range(65)]
    results = await asyncio.gather(*searches, return_exceptions=True)
    assert results[:64] == [("slow",)] * 64
    assert isinstance(results[64], Refusal)
    assert results[64].reason is Reason.OVERLOADED
    assert await matcher.matching_in_thread(b"none") == ()


async def test_search_that_is_no_longer_waited_for_leaves_the_thread_to_the_next() -> None:
    matcher = compiled(slow=SLOW)
    leaving = asyncio.create_task(matcher.matching_in_thread(slow_text(20_000)))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await matcher.matching_in_thread(slow_text(500)) == ("slow",)
    assert leaving.cancelled()

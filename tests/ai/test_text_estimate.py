"""The estimate of a text follows its table, whatever the text and however it is cut."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyproxy.ai.text_estimate import SEPARATOR, TextEstimate, text_tokens

RUN = re.compile(r"[A-Za-z]+|[0-9]+|[ \t]+|.", re.DOTALL | re.ASCII)


def by_the_table(text: str) -> Fraction:
    """The table, read aloud: slow and obvious."""
    tokens = Fraction(0)
    before = ""
    for run in RUN.findall(text):
        size = len(run)
        if run[0].isascii() and run[0].isalpha():
            tokens += 1 + size // 7 + 6 * (size // 16)
            tokens += sum(len(capitals) // 3 for capitals in re.findall("[A-Z]+", run))
            tokens += len(re.findall("[a-z][A-Z]", run))
        elif run[0] in "0123456789":
            tokens += 1 + size // 3 + (before in (" ", "\t"))
        elif run[0] in " \t":
            tokens += Fraction(size // 2, 2)
        else:
            tokens += {1: Fraction(1), 2: Fraction(3, 4), 3: Fraction(5, 4), 4: Fraction(3)}[len(run.encode())]
        before = run[-1]
    return tokens


def rounded_up(tokens: Fraction) -> int:
    return -(-tokens.numerator // tokens.denominator)


def estimate_of(texts: Sequence[str]) -> int:
    estimate = TextEstimate()
    for text in texts:
        estimate.add(text.encode())
    return estimate.tokens()


texts = (
    st.text(max_size=60)
    | st.text("abAB01 \t.\né가😀", max_size=200)
    | st.lists(st.sampled_from(["a", "A", "1", " ", "\t", "b" * 7, "B" * 16, "22", "   ", "\n", "é", "가", "😀"])).map(
        "".join
    )
).filter(lambda text: not re.search("[\ud800-\udfff]", text))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("Hello, how are you?", 6),
        ("Hello", 1),
        ("letters", 2),
        ("abcdef", 1),
        ("a" * 15, 3),
        ("a" * 16, 9),
        ("a" * 32, 17),
        ("AB", 1),
        ("ABC", 2),
        ("ABCabc", 2),
        ("aBcD", 3),
        ("camelCase", 3),
        ("ABCDEF", 3),
        ("1", 1),
        ("12", 1),
        ("123", 2),
        (" 1", 2),
        ("\t1", 2),
        ("\n1", 2),
        ("a1", 2),
        ("a 1", 3),
        (" ", 0),
        ("  ", 1),
        ("   ", 1),
        (" \t \t", 1),
        ("     ", 1),
        ("      ", 2),
        ("\n", 1),
        ("\r\n\x00\x7f", 4),
        ("é", 1),
        ("éé", 2),
        ("éééé", 3),
        ("가", 2),
        ("가" * 4, 5),
        ("😀", 3),
        ("aéb", 3),
        ("gpt-4o", 4),
        ("llama3.2", 4),
        ("omni-moderation-latest", 6),
        ("lorem " * 20_000, 20_000),
        ("가" * 12_000, 15_000),
        ("Hello, world!" * 3, 12),
    ],
)
def test_a_text_has_the_tokens_of_the_table(text: str, tokens: int) -> None:
    assert text_tokens(text.encode()) == tokens == rounded_up(by_the_table(text))


@given(st.lists(texts, max_size=5))
@example(["é", "é"])
@example(["a", "b"])
@example([" ", "1"])
def test_strings_are_estimated_apart_summed_and_then_rounded_up(parts: list[str]) -> None:
    wanted = rounded_up(sum(map(by_the_table, parts), Fraction(0)))
    assert estimate_of(parts) == wanted
    at_once = TextEstimate()
    at_once.add_all([part.encode() for part in parts])
    assert at_once.tokens() == wanted
    assert SEPARATOR not in "".join(parts).encode()


@given(st.lists(texts, max_size=3), st.lists(st.integers(0, 500), max_size=12))
@example(["a" * 40 + "B" * 40 + "1" * 40 + " " * 7 + "1"], list(range(128)))
@example(["aB"], [1])
@example(["aBB" + "B" * 5], [1, 2, 3])
@example([" 1 11 가é😀"], list(range(17)))
def test_slices_of_a_string_have_the_estimate_of_the_whole_wherever_it_is_cut(
    parts: list[str], places: list[int]
) -> None:
    estimate = TextEstimate()
    for part in parts:
        raw = part.encode()
        ends = sorted(place % (len(raw) + 1) for place in places)
        for number, (start, end) in enumerate(zip([0, *ends], [*ends, len(raw)], strict=True)):
            estimate.add(raw[start:end], continues=number > 0)
    assert estimate.tokens() == estimate_of(parts)


@given(st.lists(st.one_of(texts.map(str.encode), st.binary(max_size=40)), max_size=6), st.binary(max_size=6))
@example([b"aB", b"BB", b"b7 ", b"\t1"], b"")
@example([b"a\xff", b"A \xff 1"], b"\xe0")
@example([b"a" * 9, b"b" * 9, b"C" * 14], b"C")
def test_bytes_and_counts_give_the_same_estimate_of_anything(pieces: list[bytes], rest: bytes) -> None:
    bytewise, by_counts = TextEstimate(), TextEstimate()
    for piece in [*pieces, rest]:
        bytewise.add_bytewise(piece)
        by_counts.add_by_counts(piece)
        assert bytewise.quarters == by_counts.quarters


@pytest.mark.parametrize("run", ["a", "A", "1", " ", "aB", "가", "😀", "ab1 "])
def test_a_long_string_is_estimated_as_if_it_were_counted_at_once(run: str) -> None:
    text = run * 100_001
    assert text_tokens(text.encode()) == rounded_up(by_the_table(text))


@pytest.mark.parametrize("run", ["a" * 15 + "b ", "a" * 15 + "B", "aaaaaa ", "a1", " 1", "AA", "AAa", "가", "é가😀"])
def test_no_text_takes_long_to_estimate(run: str) -> None:
    raw = (run * 200_000).encode()[:1_000_000]
    best = min(_seconds(raw) for _ in range(5))
    assert best < 0.05  # 12 ms at most on the machine of the benchmark


def _seconds(raw: bytes) -> float:
    start = time.perf_counter()
    text_tokens(raw)
    return time.perf_counter() - start

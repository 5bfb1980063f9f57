"""Which patterns cover which: `covers` never claims more than what matching shows."""

from __future__ import annotations

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.http.path_patterns import parse_pattern

SEGMENTS = ["a", "b", "ab", "a:b", ":b", "{x}", "{x}:b", "{x}b", "{x}a", "{x}a:b", ":"]
METHODS = ["GET", "POST", "*"]


@st.composite
def patterns(draw: st.DrawFn) -> str:
    segments = draw(st.lists(st.sampled_from(SEGMENTS), max_size=3))
    last = draw(st.sampled_from(["", "{rest...}", *SEGMENTS]))
    named = [one.replace("{x}", f"{{x{place}}}") for place, one in enumerate([*segments, last])]
    return f"{draw(st.sampled_from(METHODS))} /{'/'.join(named)}"


#: Every path of up to three short segments.
VALUES = ["", "a", "b", "ab", "a:b", ":b", "x", "xb", "xa", "x:b", "xa:b", ":", "x:b:b"]
PATHS = ["/" + "/".join(parts) for count in (1, 2, 3) for parts in itertools.product(VALUES, repeat=count)]


@given(patterns(), patterns())
@example("GET /{x}:b", "GET /:b")
@example("* /a/{x}", "* /a/")
@example("* /a/{rest...}", "* /a")
@settings(max_examples=400, deadline=None)
def test_a_pattern_that_covers_another_matches_all_its_paths(wide: str, narrow: str) -> None:
    wide_pattern, narrow_pattern = parse_pattern(wide), parse_pattern(narrow)
    is_covered = wide_pattern.covers(narrow_pattern)
    matches_wide, matches_narrow = (one.compiled().fullmatch for one in (wide_pattern, narrow_pattern))
    beyond = [path for path in PATHS if matches_narrow(path.encode()) and not matches_wide(path.encode())]
    if is_covered:
        assert wide_pattern.method in (None, narrow_pattern.method)
        assert beyond == []
    elif wide_pattern.method in (None, narrow_pattern.method) and len(narrow.split("/")) <= 4:
        # Nothing that is covered is overlooked either: some path shows why not.
        assert beyond != []


@given(patterns())
def test_a_pattern_covers_itself(text: str) -> None:
    assert parse_pattern(text).covers(parse_pattern(text))


@given(patterns(), st.sampled_from(PATHS))
def test_values_of_placeholders_are_not_empty_and_rebuild_the_path(text: str, path: str) -> None:
    pattern = parse_pattern(text)
    match = pattern.compiled(captured=None).fullmatch(path.encode())
    assert (match is not None) is (pattern.compiled().fullmatch(path.encode()) is not None)
    if match is None:
        return
    values = [value.decode() for value in match.groups()]
    named = [segment for segment in pattern.segments if segment.name]
    assert all(value or segment.is_rest for value, segment in zip(values, named, strict=True))
    rest = iter(values)
    rebuilt = [next(rest) + one.text if one.name else one.text for one in pattern.segments]
    assert "/" + "/".join(rebuilt) == path

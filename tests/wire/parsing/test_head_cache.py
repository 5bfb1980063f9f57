"""What a reader remembers makes it faster, and changes nothing else."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from keyproxy.http import request_target
from keyproxy.http.headers import FieldNames
from keyproxy.http_messages import RequestHead, ResponseHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing import head_cache, head_templates
from keyproxy.wire.parsing.head_cache import RequestReader, ResponseReader
from tests import fakes, header_strategies
from tests.referents import referents

KEY = fakes.key(7).reveal()
#: So often that a shape is learnt, and recognised once more.
OFTEN = head_templates.LEARNT_AFTER + 2
LIKES_MAX = 3
HEAD_BYTES_MAX = 32_768
AFTER = b"GET /smuggled HTTP/1.1\r\nX-Keyproxy-User: evil\r\n\r\n"


def requests() -> RequestReader:
    return RequestReader(FieldNames(), fakes.holds_key)


def responses() -> ResponseReader:
    return ResponseReader(FieldNames())


def read(reader: RequestReader | ResponseReader, raw: bytes, after: bytes = b"") -> RequestHead | ResponseHead:
    """A head read from a buffer in which something may follow it."""
    return reader.read(raw + after, len(raw) - 4)


@pytest.mark.parametrize("target", [b"/a_b", b"/%2525%2525", b"/a?b=%2525", b"http://a/%2525"])
def test_a_target_is_searched_for_a_key_once_and_with_its_path_decoded(target: bytes) -> None:
    """Decoding a path of 30 KB takes milliseconds, and happens before the key is known."""
    searched: list[bytes] = []

    def holds_key(text: bytes) -> bool:
        searched.append(text)
        return fakes.holds_key(text)

    read(RequestReader(FieldNames(), holds_key), b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % target)
    path, mark, query = target.removeprefix(b"http://a").partition(b"?")
    assert searched == [path.replace(b"%2525", b"%") + mark + query]


@given(st.text(alphabet="/aZ9-_.~%?;=:@kplivetsKPLIVE", max_size=70).map(str.encode), st.sampled_from([KEY, b"ab"]))
@example(b"kp_live_" + b"a" * 16, b"")
@example(b"eyJ0eXAiOiJhdCtqd3QiLCJhbGciOiJFUzI1NiIsImtpZCI6", b"")
@example(b"eyj0exaioijhdctqd3qilcjhbgcioijfuzi1niisimtpzci6", b"")
@settings(max_examples=300)
def test_a_key_is_found_in_every_target_that_is_read_without_a_full_check(start: bytes, end: bytes) -> None:
    raw = b"GET /%b%b HTTP/1.1\r\nHost: a\r\n\r\n" % (start, end)
    reader = requests()
    for _ in range(OFTEN):
        try:
            found = reader.read(raw, len(raw) - 4)
        except Refusal:
            return
        assert found.line.holds_key == fakes.holds_key(request_target.judge(b"GET", found.line.target, b"a").decoded)


def test_path_under_a_known_shape_is_parsed_once() -> None:
    """Otherwise every route but the first one of a shape costs its parsing with each request."""
    reader = requests()
    lines = b" HTTP/1.1\r\nHost: a\r\nX-Request-Id: %d\r\n\r\n"
    for number in range(OFTEN):
        read(reader, b"GET /a" + lines % number)
    heads = [read(reader, b"GET " + path + lines % number) for path in (b"/b", b"/b?c=d") for number in range(3)]
    assert heads[1].line is heads[2].line, "a line is cached at its second occurrence"
    assert heads[4].line is not heads[5].line


def test_lines_that_never_come_again_displace_none_that_does() -> None:
    reader = requests()
    lines = b" HTTP/1.1\r\nHost: a\r\n\r\n"
    known = [read(reader, b"GET /known" + lines).line for _ in range(3)]
    for number in range(2 * head_cache._START_LINES_MAX):
        read(reader, b"GET /%d" % number + lines)
    assert read(reader, b"GET /known" + lines).line is known[-1]


Likes = list[Any]


def outcome(
    reader: RequestReader | ResponseReader, raw: bytes, after: bytes = b"", likes: Likes | None = None
) -> Reason | tuple[Any, ...]:
    """All properties of a head, or why it was refused: the same whichever head is given as similar.

    `likes`: heads that were read before; this one joins them.
    """
    likes = [] if likes is None else likes
    found: list[Reason | tuple[Any, ...]] = []
    end = len(raw) - 4
    for like in (None, *likes):
        try:
            head = read_after(reader, raw + after, end, like)
        except Refusal as refusal:
            found.append(refusal.reason)
        else:
            found.append(everything_of(head))
            likes += [head] if like is None else []
    assert found == found[:1] * len(found)
    return found[0]


def read_after(
    reader: RequestReader | ResponseReader, buffer: bytes, end: int, like: Any
) -> RequestHead | ResponseHead:
    """Read a head as the streams do, after another one on the same connection."""
    alike: RequestHead | ResponseHead | None = None
    if isinstance(reader, ResponseReader):
        alike = None if like is None else reader.read_alike(buffer, like)
        return reader.read(buffer, end) if alike is None else whole(alike, buffer, end)
    alike = None if like is None else reader.read_alike(buffer, like, HEAD_BYTES_MAX)
    return reader.read(buffer, end, like) if alike is None else whole(alike, buffer, end)


def whole(head: RequestHead | ResponseHead, buffer: bytes, end: int) -> RequestHead | ResponseHead:
    assert head.raw == buffer[: end + 4], "a head that is read without searching for its end is a whole one"
    return head


def everything_of(head: RequestHead | ResponseHead) -> tuple[Any, ...]:
    shared = (dataclasses.astuple(head.fields), head.block, head.content_length)
    if isinstance(head, ResponseHead):
        return (dataclasses.astuple(head.line), *shared)
    line = head.line
    stated = (line.method, line.target, line.path, line.minor_version, line.start, line.holds_key, line.is_plain)
    return (stated, *shared, head.credentials, head.forwarded, head.request_id, head.act_for, head.has_body)


def head(*lines: bytes, start: bytes = b"POST /a HTTP/1.1") -> bytes:
    return b"\r\n".join([start, b"Host: a.example", *lines, b"", b""])


WITHOUT_COLON = [head(b"X-Custom: v"), head(b"X-Custom")]


@given(header_strategies.similar_heads())
@example(WITHOUT_COLON)
@example([head(b"X-Request-Id: r-1", b"x-api-key: k", b"X-Request-Id: r-2", b"X-Api-Key: l")])
@settings(max_examples=200)
def test_a_warm_reader_reads_every_request_as_a_cold_one_does(heads: list[bytes]) -> None:
    warm, strangers, likes = requests(), requests(), Likes()
    for _ in range(OFTEN):
        outcome(strangers, heads[0], likes=likes)  # read on other terms
    expected = {raw: outcome(requests(), raw) for raw in heads}
    for raw in heads * OFTEN:
        event("refused" if isinstance(expected[raw], Reason) else "read")
        del likes[:-LIKES_MAX]
        assert outcome(warm, raw, AFTER, likes) == expected[raw]


@given(header_strategies.similar_heads(is_request=False))
@example([one.replace(b"POST /a HTTP/1.1", b"HTTP/1.1 200 OK") for one in WITHOUT_COLON])
@settings(max_examples=300)
def test_a_warm_reader_reads_every_response_as_a_cold_one_does(heads: list[bytes]) -> None:
    warm, likes = responses(), Likes()
    expected = {raw: outcome(responses(), raw) for raw in heads}
    for raw in heads * OFTEN:
        del likes[:-LIKES_MAX]
        assert outcome(warm, raw, AFTER, likes) == expected[raw]


@given(st.lists(header_strategies.similar_heads(), min_size=2, max_size=4))
@settings(max_examples=50)
def test_heads_of_many_kinds_do_not_disturb_each_other(kinds: list[list[bytes]]) -> None:
    warm, likes = requests(), Likes()
    heads = [raw for heads in zip(*kinds, strict=False) for raw in heads]
    expected = {raw: outcome(requests(), raw) for raw in heads}
    for raw in heads * OFTEN:
        del likes[:-LIKES_MAX]
        assert outcome(warm, raw, likes=likes) == expected[raw]


@pytest.mark.parametrize(
    ("known", "changed"),
    [
        (b"X-Custom: v", b"X-Custom"),
        (b"X-Custom: v", b"X-Custom : v"),
        (b"X-Custom: v", b" X-Custom: v"),
        (b"X-Custom: v", b"X-Custom: v\x00"),
        (b"X-Custom: v", b"X-Custom: v\x7f"),
        (b"X-Custom: v", b"X-Custom: v\rX-Keyproxy-User: evil"),
        (b"X-Custom: v", b"X-Custom: v\nX-Keyproxy-User: evil"),
        (b"X-Custom: v", b"X-Custom: v\r\n w"),
        (b"X-Custom: v", b"X!Custom: v"),
        (b"Content-Type: v", b"Content_Type: v"),
        (b"X-Custom: v", b"Transfer-Encoding: chunked\r\nContent-Length: 5"),
        (b"Authorization: Api-Key k", b"Authorization"),
        (b"X-Request-Id: r", b"X-Request-Id"),
        (b"Upgrade: h2c", b"Upgrade"),
        (b"X-Keyproxy-User: evil", b"X-Keyproxy-User"),
        (b"X-Keyproxy-Act-For: u", b"X-Keyproxy-Act-For"),
        (b"X-Keyproxy-Act-For: u", b"X-Keyproxy-Act-For: u\x00"),
        (b"X-Keyproxy-Act-For: u", b"X-Keyproxy-Act-For: u\r\nX-Keyproxy-Act-For: u"),
        (b"X-Keyproxy-Act-For: u", b"X-Keyproxy-Act-For: u\r\nx_keyproxy.act_for: u"),
        (b"X-Keyproxy-Act-For: u", b"X-Keyproxy-Act-For: u\r\n w"),
        (b"X-Keyproxy-Act-For: u", b"X-Keyproxy-Act-For: u\r\nConnection: x-keyproxy-act-for"),
        (b"X-Forwarded-For: x", b"X-Forwarded-For"),
        (b"Content-Length: 5", b"Content-Length"),
        (b"Content-Length: 5", b"Content-Length: "),
        (b"Content-Length: 5", b"Content-Length: +5"),
        (b"Content-Length: 5", b"Content-Length: 5\r\nContent-Length: 5"),
        (b"Content-Length: 5", b"Content-Length: " + b"9" * 19),
        (b"Content-Length: 5", b"Content-Length: \xb2"),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked, chunked"),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
        (b"Content-Type: a", b"Content-Type: a\r\nContent-Type: b"),
        (b"Upgrade: h2c", b"Upgrade: websocket"),
        (b"Connection: x", b"Connection: host"),
        (b"X-Custom: v", b"Host: a.example"),  # a second one
    ],
)
def test_a_malformed_head_that_resembles_a_known_one_is_refused(known: bytes, changed: bytes) -> None:
    good, bad, reader, likes = head(known), head(changed), requests(), Likes()
    for raw in [good] * OFTEN:
        assert isinstance(outcome(reader, raw, likes=likes), tuple)
    for raw in (bad, bad):
        assert outcome(reader, raw, likes=likes) is Reason.REQUEST_MALFORMED
        assert outcome(requests(), raw) is Reason.REQUEST_MALFORMED


def test_one_client_s_values_never_turn_up_in_another_s_head() -> None:
    reader = requests()
    for number in range(20):
        mine = b"%d" % (number + 1) * 3
        lines = [
            b"X-Custom: " + mine, b"Authorization: Api-Key " + mine, b"X-Request-Id: " + mine, b"Content-Length: " + mine,
            b"X-Forwarded-For: " + mine, b"User-Agent: " + mine, b"X-Keyproxy-Act-For: " + mine,
        ]  # fmt: skip
        found = read(reader, head(*lines, start=b"POST /%b HTTP/1.1" % mine))
        assert isinstance(found, RequestHead)
        assert found.line.target == b"/" + mine
        assert found.block == b"".join(line + b"\r\n" for line in (b"Host: a.example", lines[0], lines[3], lines[5]))
        assert [one.value for one in found.credentials] == [b"Api-Key " + mine]
        assert (found.content_length, found.request_id, found.act_for) == (int(mine), mine, mine)
        assert found.forwarded == ((b"x-forwarded-for", mine),)


# -- memory


def remembered(reader: RequestReader | ResponseReader) -> list[bytes]:
    """All bytes that can be reached from a reader."""
    found: list[bytes] = []
    reachable: list[object] = [reader]
    seen: set[int] = set()
    while reachable:
        thing = reachable.pop()
        if id(thing) in seen or isinstance(thing, type | types.FunctionType | types.ModuleType):
            continue
        seen.add(id(thing))
        if isinstance(thing, bytes):
            found.append(thing)
        reachable += referents(thing)
    return found


def table_sizes(reader: RequestReader | ResponseReader) -> dict[str, int]:
    attributes = {name: getattr(reader, name) for name in dir(reader) if not name.startswith("__")}
    return {name: len(value) for name, value in attributes.items() if isinstance(value, dict)}


LIMITS = {
    "_by_fields": head_cache._SHAPES_MAX,
    "_lines": head_cache._LINES_MAX,
    "_meanings": head_cache._LINES_MAX,
    "_shapes": head_cache._SHAPES_MAX,
    "_start_lines": head_cache._START_LINES_MAX,
}


@pytest.mark.parametrize(
    ("make", "start"), [(requests, b"POST /%d HTTP/1.1"), (responses, b"HTTP/1.1 200 %d")], ids=["requests", "answers"]
)
@pytest.mark.parametrize(
    "lines", [[b"X-%d: v"], [b"User-Agent: %d"], [b"X-Custom: %d"], [b"X-%d: v", b"User-Agent: %d"]]
)
def test_no_table_ever_exceeds_its_limit_and_all_stay_in_use(
    make: Callable[[], RequestReader | ResponseReader], start: bytes, lines: list[bytes]
) -> None:
    reader = make()
    assert set(table_sizes(reader)) == set(LIMITS)
    for number in range(6_000):
        raw = head(*(line.replace(b"%d", b"%d" % number) for line in lines), start=start % number)
        read(reader, raw)
        assert all(size <= LIMITS[name] for name, size in table_sizes(reader).items())
    known = head(b"X-Custom: v", start=start % 1)
    assert outcome(reader, known) == outcome(make(), known)


@pytest.mark.parametrize("raw", [head(b"X-Custom:no-space"), head(b"X-Custom: v", b"Content-Length:5")])
def test_a_head_that_has_to_be_judged_each_time_is_remembered_once(raw: bytes) -> None:
    reader = requests()
    for _ in range(10):
        assert isinstance(read(reader, raw), RequestHead)
    assert len(reader._by_fields) == len(reader._shapes) == 1


def test_one_head_full_of_new_lines_does_not_exceed_a_limit_either() -> None:
    reader = requests()
    for number in range(20):
        read(reader, head(*(b"X-%d-%d: v" % (number, place) for place in range(250))))
        read(reader, head(*(b"Accept: %d-%d" % (number, place) for place in range(250))))
        assert all(size <= LIMITS[name] for name, size in table_sizes(reader).items())


LONG = b"a" * 16_000


@pytest.mark.parametrize(
    "raw",
    [
        head(b"X-Custom: " + LONG),
        head(b"User-Agent: " + LONG),
        head(b"Connection: " + LONG),
        head(LONG + b": v"),
        head(b"X-Keyproxy-" + LONG + b": v"),
        head(b"Cookie: v", start=b"GET /%b HTTP/1.1" % LONG),
        head(b"Cookie: v", start=b"GET /?%b HTTP/1.1" % LONG),
        head(b"X-Custom: " + LONG, start=b"HTTP/1.1 200 OK"),
        head(b"Server: " + LONG, start=b"HTTP/1.1 200 OK"),
        head(LONG + b": v", start=b"HTTP/1.1 200 OK"),
        head(start=b"HTTP/1.1 200 " + LONG),
    ],
    ids=["value", "stable value", "connection", "name", "reserved name", "path", "query", "response's value",
         "response's stable value", "response's name", "status line"],
)  # fmt: skip
def test_long_lines_are_read_but_not_remembered(raw: bytes) -> None:
    reader = responses() if raw.startswith(b"HTTP") else requests()
    for _ in range(2):
        assert isinstance(outcome(reader, raw), tuple)
    assert max(map(len, remembered(reader)), default=0) <= 1_024


@pytest.mark.parametrize(
    "raw",
    [
        *(head(name + gap + scheme + KEY + end)
          for name in (b"Authorization:", b"AUTHORIZATION:", b"X-Api-Key:", b"Proxy-Authorization:", b"X-Custom:")
          for gap in (b" ", b"", b"\t") for scheme in (b"Api-Key ", b"") for end in (b"", b" ")),
        head(b"X-Api-Key: " + KEY, b"Authorization: Bearer " + KEY, b"Connection: authorization, x-api-key"),
        head(b"X-Api-Key: " + KEY, b"X-Request-Id: " + KEY, b"X-Keyproxy-User: " + KEY, b"X-Forwarded-For: " + KEY),
        head(b"X-Api-Key: " + KEY, b"X : malformed"),
        head(b"X-Api-Key: " + KEY, b"Content-Length: x"),
        head(b"X_Api_Key: " + KEY),
        head(b"X-Api-Key : " + KEY),
        head(KEY + b": x"),
        head(start=b"GET /?x=%b HTTP/1.1" % KEY),
        head(start=b"GET /%b HTTP/1.1" % KEY),
        head(start=b"GET http://a.example/?x=%b HTTP/1.1" % KEY),
    ],
)  # fmt: skip
def test_no_key_stays_behind(raw: bytes) -> None:
    reader = requests()
    for _ in range(2):
        outcome(reader, raw)
    assert not [one for one in remembered(reader) if KEY[8:] in one]

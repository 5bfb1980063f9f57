"""Where bodies end: the same for every way in which their bytes may arrive."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.http.headers import NOT_IN_TRAILERS, FieldNames
from keyproxy.wire.parsing.framing import (
    EXTENSION_BYTES_MAX,
    LAST_CHUNK,
    TRAILER_BYTES_MAX,
    Body,
    ChunkedBody,
    CountedBody,
    EmptyBody,
    EndlessBody,
    FramingError,
    chunk,
)

#: Content, what is left over, and whether the body is complete; or None for a body that is refused.
Outcome = tuple[bytes, bytes, bool] | None


def chunked() -> ChunkedBody:
    return ChunkedBody(lambda _name: False)


def fed(body: Body, pieces: Iterable[bytes]) -> Outcome:
    content = left = b""
    for piece in pieces:
        try:
            more, rest = body.feed(piece)
        except FramingError:
            return None
        content, left = content + more, left + rest
    return content, left, body.is_complete


def bytewise(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


@st.composite
def pieces(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    """The data in pieces, some of them empty."""
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


# -- by count, to the end, none


@given(st.binary(max_size=20), pieces(st.binary(max_size=60)))
def test_a_counted_body_is_its_first_bytes_however_they_arrive(expected: bytes, arriving: list[bytes]) -> None:
    whole, count = b"".join(arriving), len(expected)
    assert fed(CountedBody(count), arriving) == (whole[:count], whole[count:], len(whole) >= count)


@pytest.mark.parametrize("data", [b"", b"a", b"a\r\n\r\n"])
def test_no_body_takes_nothing_and_an_endless_one_takes_all(data: bytes) -> None:
    assert fed(EmptyBody(), [data, data]) == (b"", data + data, True)
    assert fed(EndlessBody(), [data, data]) == (data + data, b"", False)


@pytest.mark.parametrize(
    ("make", "data", "is_end"),
    [
        (EmptyBody, b"", True),
        (EndlessBody, b"", True),
        (EndlessBody, b"a", True),
        (lambda: CountedBody(0), b"", True),
        (lambda: CountedBody(2), b"", False),
        (lambda: CountedBody(2), b"a", False),
        (lambda: CountedBody(2), b"ab", True),
        (lambda: CountedBody(2), b"abc", True),
        (chunked, b"", False),
        (chunked, b"2\r\nab\r\n", False),
        (chunked, b"2\r\nab\r\n0\r\n", False),
        (chunked, b"2\r\nab\r\n0\r\n\r\n", True),
    ],
)
def test_the_end_of_the_connection_ends_a_body_that_is_whole_or_has_no_other_end(
    make: Callable[[], Body], data: bytes, is_end: bool
) -> None:
    body = make()
    body.feed(data)
    assert body.ends_with_connection() is is_end


# -- chunks


contents = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
extensions = st.sampled_from([b"", b"", b";a", b";a=b", b' ; a = "q;\\""', b";a;b=1"])
trailers = st.lists(st.sampled_from([b"X: y", b"x-y:", b"X: \xff\t"]), max_size=2)


@st.composite
def encoded(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """(content, the same in chunks), with all the freedom that the grammar gives."""
    parts = draw(contents)
    sizes = [draw(st.sampled_from([b"%x", b"%X", b"%04x"])) % len(part) for part in parts]
    lines = [size + draw(extensions) + b"\r\n" + part + b"\r\n" for size, part in zip(sizes, parts, strict=True)]
    last = draw(st.sampled_from([b"0", b"000"])) + draw(extensions) + b"\r\n"
    return b"".join(parts), b"".join([*lines, last, *(one + b"\r\n" for one in draw(trailers)), b"\r\n"])


@given(encoded().flatmap(lambda one: st.tuples(st.just(one), st.binary(max_size=9), pieces(st.just(one[1])))))
def test_chunks_end_at_the_same_byte_however_they_arrive(
    drawn: tuple[tuple[bytes, bytes], bytes, list[bytes]],
) -> None:
    (content, wire), after, arriving = drawn
    expected = (content, after, True)
    assert fed(chunked(), [wire + after]) == expected
    assert fed(chunked(), [*arriving[:-1], arriving[-1] + after]) == expected
    assert fed(chunked(), bytewise(wire + after)) == expected
    for end in (0, 1, len(wire) // 2, len(wire) - 1):
        outcome = fed(chunked(), [wire[:end]])
        assert outcome is not None
        assert content.startswith(outcome[0])
        assert outcome[1:] == (b"", False)


@given(contents, st.binary(max_size=9))
def test_chunked_content_round_trips(parts: list[bytes], after: bytes) -> None:
    wire = b"".join(map(chunk, parts)) + LAST_CHUNK
    assert fed(chunked(), [wire + after]) == (b"".join(parts), after, True)


@pytest.mark.parametrize("length", [1, 9, 10, 15, 16, 255, 256, 1_023, 1_024, 4_096, 70_000])
def test_a_chunk_of_any_length_has_its_size_in_front(length: int) -> None:
    content = b"x" * length
    assert chunk(content) == b"%x\r\n%b\r\n" % (length, content)
    for size in (b"%x" % length, b"%X" % length, b"%08x" % length, b"%09x" % length, b"%016x" % length):
        wire = size + b"\r\n" + content + b"\r\n" + LAST_CHUNK
        assert fed(chunked(), [wire]) == fed(chunked(), bytewise(wire)) == (content, b"", True)


@pytest.mark.parametrize("size", [b"", b"g", b"1g", b"+1", b"-1", b" 1", b"1_0", b"0x1", b"1\r", b"\x801", b"\xb2"])
def test_a_size_is_digits_whatever_the_chunk_after_it(size: bytes) -> None:
    content = b"x" * 16
    assert fed(chunked(), [size + b"\r\n" + content[:1] + b"\r\n" + LAST_CHUNK]) is None
    assert fed(chunked(), [size + b"\r\n" + content + b"\r\n" + LAST_CHUNK]) is None


def test_a_chunked_body_is_freed_without_the_garbage_collector() -> None:
    gc.collect()
    for _ in range(1_000):
        chunked().feed(b"5\r\nhello\r\n0;a=b\r\nX: y\r\n\r\n")
    assert gc.collect() < 1_000


_SOUP = [
    b"0", b"1", b"5", b"A", b"\r\n", b"\r\n", b"\r\n", b"\r", b"\n", b";", b"=", b'"', b"x", b" ", b"hello", b"X: y",
    b":", b"\x00", b"5\r\nhello\r\n", b"0\r\n", b"0\r\n\r\n", b"\xff", b"-", b"0x",
]  # fmt: skip


@given(pieces(st.lists(st.sampled_from(_SOUP), max_size=10).map(b"".join)))
def test_no_bytes_are_chunks_in_one_piece_and_none_in_several(arriving: list[bytes]) -> None:
    whole = b"".join(arriving)
    assert fed(chunked(), [whole]) == fed(chunked(), arriving) == fed(chunked(), bytewise(whole))


@pytest.mark.parametrize(
    "size",
    [
        b"5", b"05", b"0000000000000005", b"5;a", b"5;a=b", b"5;a;b;c", b'5;a="b"', b'5;a=""', b'5;a="\\"\\\\;\t\xff"',
        b"5 ;a", b"5\t; a = b ; c", b"5;!#$%&'*+-.^_`|~0Aa=1",
    ],
)  # fmt: skip
def test_a_size_is_up_to_16_digits_with_extensions(size: bytes) -> None:
    wire = size + b"\r\nhello\r\n0\r\n\r\n"
    assert fed(chunked(), [wire]) == fed(chunked(), bytewise(wire)) == (b"hello", b"", True)


@pytest.mark.parametrize("digit", [*b"0123456789abcdefABCDEF"])
def test_sizes_are_hexadecimal(digit: int) -> None:
    size = int(bytes([digit]), 16)
    wire = b"1%c\r\n" % digit + b"a" * (16 + size) + b"\r\n"
    assert fed(chunked(), [wire]) == (b"a" * (16 + size), b"", False)


@pytest.mark.parametrize(
    "wire",
    [
        # Sizes.
        b"\r\n", b" 5\r\nhello\r\n", b"5 \r\nhello\r\n", b"5\t\r\nhello\r\n", b"+5\r\nhello\r\n", b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n", b"5h\r\nhello\r\n", b"5_0\r\n", b"5,5\r\n", b"5.0\r\n", b"g\r\n", b"\xb2\r\n",
        b"\xd9\xa5\r\n",
        b"00000000000000005\r\nhello\r\n", b"FFFFFFFFFFFFFFFFF\r\n", b"5\x00\r\nhello\r\n", b"5\x0b\r\nhello\r\n",
        b"5 5\r\n",
        # Extensions.
        b";a\r\n", b"5;\r\nhello\r\n", b"5; \r\nhello\r\n", b"5;;a\r\nhello\r\n", b"5;a;\r\nhello\r\n",
        b"5;=b\r\nhello\r\n",
        b"5;a=\r\nhello\r\n", b"5;a=b=c\r\n", b"5;a b\r\n", b'5;a="\r\nhello\r\n', b'5;a="b\r\n', b'5;a="b"c\r\n',
        b'5;"a"=b\r\n',
        b'5;a="\\\r\n', b"5;a\x00\r\nhello\r\n", b"5;a=\xff\r\n", b'5;a="\x7f"\r\n', b"5 a\r\n", b"5,a\r\n",
        # Line ends.
        b"5\nhello\r\n", b"5\rhello\r\n", b"5\r\r\nhello\r\n", b"5\n\rhello\r\n", b"5;a\nhello\r\n",
        b"5;a\rb\r\nhello\r\n",
        b'5;a="\n"\r\nhello\r\n', b'5;a="\r\n"\r\nhello\r\n', b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n", b"5\r\nhello\n\r0\r\n\r\n", b"\r\n5\r\nhello\r\n", b"\n5\r\n",
        # Sizes that do not fit.
        b"4\r\nhello\r\n0\r\n\r\n", b"6\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n\r\n0\r\n\r\n",
        # The end.
        b"0\n\r\n", b"0\r\n\n", b"0\r\n\r\r\n", b"0\r\r\n\r\n", b"0\r\nX\r\n\r\n", b"0\r\n X: y\r\n\r\n",
        b"0\r\nX: y\r\n z\r\n\r\n",
        b"0\r\nX : y\r\n\r\n", b"0\r\n: y\r\n\r\n", b"0\r\nX: y\n\r\n", b"0\r\nX: y\r\n\n", b"0\r\nX: \x00\r\n\r\n",
        b"0\r\nX\xe9: y\r\n\r\n",
        b"0\r\nX: y\rZ: z\r\n\r\n", b"0\r\nX\x00: y\r\n\r\n", b"0\r\nX(: y\r\n\r\n", b"0\r\nGET / HTTP/1.1\r\n\r\n",
    ],
)  # fmt: skip
def test_framing_that_servers_read_differently_is_refused(wire: bytes) -> None:
    assert fed(chunked(), [wire]) is None
    assert fed(chunked(), bytewise(wire)) is None


def test_a_refusal_repeats_nothing_of_the_body() -> None:
    with pytest.raises(FramingError) as error:
        chunked().feed(b"secret\r\n")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", [b"X", b"x-checksum", b"Server_Timing", b"X.Y", b"!#$%&'*+-.^_`|~1"])
def test_a_trailer_may_have_any_name_that_a_field_may_have(name: bytes) -> None:
    looked_up: list[bytes] = []

    def forbids(one: bytes) -> bool:
        looked_up.append(one)
        return False

    assert fed(ChunkedBody(forbids), [b"0\r\n" + name + b": y\r\n\r\nrest"]) == (b"", b"rest", True)
    assert looked_up == [name]


@pytest.mark.parametrize(
    ("name", "is_accepted"),
    [
        (b"X-Checksum", True), (b"X-Keyproxy-User", True), (b"x-keyproxy-test", True), (b"X-Request-Id", True),
        (b"X-Forwarded-For", True), (b"Trailer", True), (b"Host", False), (b"HOST", False), (b"Content-Length", False),
        (b"Transfer-Encoding", False), (b"Content-Type", False), (b"Authorization", False), (b"x-api-key", False),
        (b"Connection", False), (b"Expect", False), (b"Content_Length", False), (b"X!Y", False),
    ],
)  # fmt: skip
def test_a_trailer_of_a_request_is_dropped_or_refused_but_never_content(name: bytes, is_accepted: bool) -> None:
    names = FieldNames()
    body = ChunkedBody(lambda one: names.kind(one) in NOT_IN_TRAILERS)
    outcome = fed(body, [b"1\r\na\r\n0\r\n" + name + b": evil\r\n\r\n"])
    assert outcome == ((b"a", b"", True) if is_accepted else None)


# -- bounds


def long_extensions(count: int, total: int) -> bytes:
    """So many chunks whose extensions have so many bytes together."""
    first = b";" + b"a" * (total - 2 * (count - 1) - 1)
    return b"".join(b"1%b\r\nx\r\n" % extension for extension in [first, *[b";a"] * (count - 1)])


def long_trailers(count: int, total: int) -> bytes:
    first = b"X:" + b"a" * (total - 2 * (count - 1) - 2)
    return b"0\r\n" + b"".join(line + b"\r\n" for line in [first, *[b"X:"] * (count - 1)]) + b"\r\n"


@pytest.mark.parametrize("count", [10, 8_000])
@pytest.mark.parametrize(
    ("make", "limit"), [(long_extensions, EXTENSION_BYTES_MAX), (long_trailers, TRAILER_BYTES_MAX)]
)
def test_extensions_and_trailers_of_a_body_are_bounded_together(
    make: Callable[[int, int], bytes], limit: int, count: int
) -> None:
    assert fed(chunked(), [make(count, limit)]) is not None
    assert fed(chunked(), [make(count, limit + 1)]) is None


@pytest.mark.parametrize("before", [b"5;", b"0\r\nX:"], ids=["extension", "trailer"])
@pytest.mark.parametrize("length", [1, 4_093, 4_094, 4_095, 16_381, 16_382, 16_383, 16_384])
def test_the_limit_of_a_line_does_not_depend_on_the_pieces_in_which_it_arrives(before: bytes, length: int) -> None:
    wire = before + b"a" * length + b"\r\n" + (b"hello\r\n0\r\n\r\n" if before == b"5;" else b"\r\n")
    whole = fed(chunked(), [wire])
    assert fed(chunked(), bytewise(wire)) == whole
    assert fed(chunked(), [wire[: len(before) + length + 1], wire[len(before) + length + 1 :]]) == whole


@pytest.mark.parametrize("start", [b"", b"5;", b"5;a=", b"0\r\n", b"0\r\nX:", b"1\r\na\r\n"])
def test_a_line_that_never_ends_is_not_held(start: bytes) -> None:
    assert fed(chunked(), [start, *[b"a" * 1_000] * 20]) is None


def test_many_small_chunks_cost_their_number_and_not_its_square() -> None:
    # The square would be some hundred gigabytes copied.
    count = 200_000
    wire = b"1\r\na\r\n" * count + LAST_CHUNK
    start = time.process_time()
    assert fed(chunked(), [wire]) == (b"a" * count, b"", True)
    assert time.process_time() - start < 15


@pytest.mark.parametrize("piece", [b"1\r\na\r\n", b"0001\r\na\r\n", b"2\r\n\r\n\r\n"])
def test_a_piece_of_tiny_chunks_does_not_take_long_to_read(piece: bytes) -> None:
    number = 262_144 // len(piece)
    body = ChunkedBody(lambda _: False)
    begun = time.thread_time()
    content, _ = body.feed(piece * number)
    assert time.thread_time() - begun < 0.05
    assert len(content) in (number, 2 * number)
    assert body.feed(b"0\r\n\r\n") == (b"", b"")
    assert body.is_complete

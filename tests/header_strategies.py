"""Hypothesis strategies for request heads, including hostile ones."""

from __future__ import annotations

from hypothesis import strategies as st

IDENTITY_NAMES = [b"User", b"Tenant", b"Scope", b"Test", b"Key-Id", b"Act-For"]

STARTS = [
    b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"POST /v1/jobs?x=%2e HTTP/1.1", b"POST /v1/jobs HTTP/1.0",
    b"DELETE /a/..b HTTP/1.1", b"GET http://a.example/x HTTP/1.1", b"OPTIONS * HTTP/1.1", b"QUERY /a HTTP/1.1",
]  # fmt: skip
BAD_STARTS = [
    b"GET  / HTTP/1.1", b"GET / HTTP/1.2", b"GET /a/../b HTTP/1.1", b"GET /", b"CONNECT a:80 HTTP/1.1", b"G@T / HTTP/1.1",
    b"GET /\xe9 HTTP/1.1", b"GET http://b.example/ HTTP/1.1", b"GET / HTTP/1.1 ", b"GET / HTTP/2.0", b"",
]  # fmt: skip
STATUS_LINES = [
    b"HTTP/1.1 200 OK",
    b"HTTP/1.0 200 OK",
    b"HTTP/1.1 404 ",
    b"HTTP/1.1 503",
    b"HTTP/1.1 204 \xe9",
    b"HTTP/2 200",
]

#: Values by name: those that make a difference, beside some that do not.
_VALUES: dict[bytes, list[bytes]] = {
    b"Host": [b"a.example", b"b.example", b"", b"a b", b"a.example:80"],
    b"Content-Length": [b"0", b"5", b"7", b"05", b"5 ", b"", b"+5", b"5,5", b"9" * 18, b"9" * 19, b"\xb2"],
    b"Transfer-Encoding": [b"chunked", b"Chunked", b"chunked ", b"gzip, chunked", b"identity", b"", b"\x0bchunked"],
    b"Connection": [
        b"x-custom, close", b"keep-alive", b"X-Custom", b"close", b"Cookie", b"X-Keyproxy-User, X-Request-Id", b"Host",
        b"content-length", b"upgrade", b"", b",", b"Authorization", b"X-Forwarded-For", b"te, X_Custom",
        b"x_keyproxy_act_for",
    ],
    b"Expect": [b"100-continue", b"100-Continue", b"200-ok", b""],
    b"Content-Type": [b"application/json", b"text/plain", b""],
    b"Authorization": [b"Api-Key k1", b"Bearer k2", b"  Api-Key k1 ", b"", b"Basic eDp5"],
    b"X-Api-Key": [b"k1", b"", b"\tk2"],
    b"X-Request-Id": [b"r-1", b"", b"r 2", b"\xe9", b"r-3 "],
    b"X-Keyproxy-Act-For": [b"u_1", b"u_2 ", b"", b"u 3", b"\xe9"],
}  # fmt: skip
_ANY_VALUES = [b"v", b"w", b"", b"a: b", b"a, b", b" v ", b"\tv\t", b"caf\xc3\xa9", b'"', b"a\tb", b"0", b"evil"]
_BAD_VALUES = [b"a\x00b", b"a\x7f", b"a\rb", b"a\nb", b"a\r\n b", b"a\x0b", b"\x01"]

_NAMES = [
    *_VALUES, b"X-Custom", b"X-Custom", b"User-Agent", b"Accept", b"Cookie", b"Forwarded", b"X-Forwarded-For",
    b"X-Forwarded-Host", b"X-Real-Ip", b"Keep-Alive", b"Upgrade", b"TE", b"Proxy-Authorization", b"X_Request_Id",
    b"X-Keyproxy-User", b"X_Keyproxy_User", b"X-Keyproxy-Other", b"X_Custom", b"X.Custom", b"X_Api_Key",
    b"X.Forwarded.For", b"X-Original-Url", b"X_Keyproxy_Act_For",
]  # fmt: skip
_BAD_NAMES = [
    b"",
    b"X Custom",
    b"X!Custom",
    b"X\xe9",
    b"X\x00",
    b" X-Custom",
    b"Content_Length",
    b"Transfer.Encoding",
    b"Content_Type",
    b"Content_Encoding",
    b"X(",
    b"X-Custom ",
]


def _spelt(name: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from([name, name, name.lower(), name.upper(), name.swapcase()])


@st.composite
def _lines(draw: st.DrawFn, name: bytes, *, is_odd: bool) -> bytes:
    values = _VALUES.get(name, _ANY_VALUES)
    values = values + values[:1] * 2 * len(values)  # mostly one that is accepted
    if not is_odd:
        return draw(_spelt(name)) + b": " + draw(st.sampled_from(values))
    odd = draw(st.sampled_from(["value", "space", "name", "bare name", "empty"]))
    if odd == "bare name":
        return name
    if odd == "empty":
        return name + draw(st.sampled_from([b":", b": ", b":\t", b" :", b"::"]))
    name = draw(st.sampled_from(_BAD_NAMES)) if odd == "name" else draw(_spelt(name))
    separator = draw(st.sampled_from([b":", b":  ", b":\t", b" : ", b"\t:"])) if odd == "space" else b": "
    return name + separator + draw(st.sampled_from(_BAD_VALUES if odd == "value" else values))


@st.composite
def similar_heads(draw: st.DrawFn, *, is_request: bool = True) -> list[bytes]:
    """Heads with nearly the same names in the same order, so that what was learnt from one is put to use for another."""
    names = draw(st.lists(st.sampled_from(_NAMES), max_size=5))
    if is_request:
        names.insert(draw(st.integers(0, len(names))), b"Host")
    heads = []
    for _ in range(draw(st.integers(1, 5))):
        odd_place = draw(st.integers(-9, len(names) - 1))
        lines = [draw(_lines(name, is_odd=place == odd_place)) for place, name in enumerate(names)]
        if not is_request:
            start = draw(st.sampled_from(STATUS_LINES))
        else:
            start = draw(st.sampled_from(BAD_STARTS if odd_place == -9 else STARTS))
        heads.append(b"\r\n".join([start, *lines, b"", b""]))
    return heads


def _respelt(name: bytes, flips: int) -> bytes:
    """The name with some letters in the other case, and some `-` as `_` or `.`: one for each bit."""
    other = name.swapcase().replace(b"-", b"_."[flips % 2 : flips % 2 + 1])
    return bytes(pair[flips >> place & 1] for place, pair in enumerate(zip(name, other, strict=True)))


@st.composite
def hostile_heads(draw: st.DrawFn) -> bytes:
    """A well-formed head full of names that are ours, in every spelling."""
    ours = st.sampled_from([b"X-Keyproxy-" + name for name in IDENTITY_NAMES] + [b"X-Request-Id", b"X-Keyproxy-"])
    spelt = st.builds(_respelt, ours, st.integers(0, 2**18))
    values = st.sampled_from([b"evil", b"", b"u_1, u_2", b"true", b" evil ", b"r-evil", b"a: b"])
    line = st.one_of(
        st.builds(
            lambda name, gap, value: name + b":" + gap + value, spelt, st.sampled_from([b" ", b"", b"\t"]), values
        ),
        st.builds(lambda options: b"Connection: " + b", ".join(options), st.lists(spelt, max_size=3)),
        st.sampled_from(
            [
                b"X-Custom: v",
                b"Cookie: a=b",
                b"Accept: */*",
                b"Authorization: Api-Key k",
                b"x-api-key: k",
                b"Upgrade: h2c",
                b"X-Forwarded-For: 192.0.2.1",
                b"x-forwarded-proto: gopher",
                b"Forwarded: for=x",
                b"TE: trailers",
                b"Transfer-Encoding: chunked",
                b"X-Keyproxyuser: v",
                b"Trailer: X-Keyproxy-User",
                b"X-Real-IP: 192.0.2.1",
            ]
        ),
    )
    lines = draw(st.lists(line, max_size=10))
    place = draw(st.integers(0, len(lines)))
    return b"\r\n".join([b"POST /v1/jobs HTTP/1.1", *lines[:place], b"Host: a.example", *lines[place:], b"", b""])


@st.composite
def act_for_heads(draw: st.DrawFn) -> bytes:
    """A well-formed head that names at most a few users to act for, and often only one."""
    spelt = st.builds(_respelt, st.just(b"X-Keyproxy-Act-For"), st.integers(0, 2**18))
    names = draw(st.lists(spelt, min_size=draw(st.integers(0, 1)), max_size=draw(st.sampled_from([1, 1, 1, 2]))))
    values = st.sampled_from([b" u_1", b" u_2", b"u_3", b"", b" u 4 ", b" \xe9", b"\tu_5\t"])
    lines = [name + b":" + draw(values) for name in names]
    lines += draw(
        st.lists(st.sampled_from([b"X-Custom: v", b"Cookie: a=b", b"Connection: close, x-custom"]), max_size=3)
    )
    if draw(st.integers(0, 9)) == 9:
        lines.append(b"Connection: " + draw(spelt))
    start = draw(st.sampled_from([b"POST /v1/jobs HTTP/1.1", b"GET / HTTP/1.0"]))
    return b"\r\n".join([start, b"Host: a.example", *draw(st.permutations(lines)), b"", b""])

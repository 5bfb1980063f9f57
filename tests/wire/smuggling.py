"""Ways in which proxies have been made to disagree with the servers behind them, as facts: name, bytes, verdict.

`reject`: refused with a 4xx, and nothing of it reaches the upstream. `accept`: gets a 200. `first`: the first
request gets a 200, the bytes after it are refused. `alone`: it gets a 200, the bytes after it are ignored. A number is
the status that a well-formed request is refused with. The names state where such a request was observed, or which rule
it breaks. Every row is sent by a client that then closes its side.
"""

from __future__ import annotations

from typing import Final

_HOST: Final = b"Host: h\r\n"
_GET: Final = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"


def _post(fields: bytes, body: bytes = b"", *, version: bytes = b"1.1") -> bytes:
    return b"POST /a HTTP/%b\r\n%b%b\r\n\r\n%b" % (version, _HOST, fields, body)


def _chunked(body: bytes) -> bytes:
    return _post(b"Transfer-Encoding: chunked", body)


def _get(target: bytes, fields: bytes = _HOST, *, version: bytes = b"HTTP/1.1") -> bytes:
    return b"GET %b %b\r\n%b\r\n" % (target, version, fields)


_EMPTY: Final = b"0\r\n\r\n"

ROWS: Final[list[tuple[str, bytes, str | int]]] = [
    # Content-Length beside Transfer-Encoding.
    ("CL.TE", _post(b"Content-Length: 6\r\nTransfer-Encoding: chunked", _EMPTY + b"G"), "reject"),
    ("TE.CL", _post(b"Transfer-Encoding: chunked\r\nContent-Length: 4", b"5c\r\n" + _GET + _EMPTY), "reject"),
    ("CL.0 beside TE", _post(b"Content-Length: 0\r\nTransfer-Encoding: chunked", _EMPTY), "reject"),
    ("TE.TE: the last one odd", _post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow", _EMPTY), "reject"),
    ("TE.TE: the first one odd", _post(b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked", _EMPTY), "reject"),
    ("TE: x, chunked", _post(b"Transfer-Encoding: x, chunked", _EMPTY), "reject"),
    ("TE: chunked, identity", _post(b"Transfer-Encoding: chunked, identity", _EMPTY), "reject"),
    ("TE: identity with a length", _post(b"Transfer-Encoding: identity\r\nContent-Length: 2", b"hi"), "reject"),
    ("TE: empty", _post(b"Transfer-Encoding:\r\nContent-Length: 2", b"hi"), "reject"),
    ("TE: vertical tab, CVE-2019-16276's kin", _post(b"Transfer-Encoding: \x0bchunked", _EMPTY), "reject"),
    ("TE: space before colon, CVE-2019-16276", _post(b"Transfer-Encoding : chunked", _EMPTY), "reject"),
    ("TE: folded", _post(b"Transfer-Encoding:\r\n chunked", _EMPTY), "reject"),
    ("TE: after a bare LF, CVE-2020-11724's kin", _post(b"X: y\nTransfer-Encoding: chunked", _EMPTY), "reject"),
    ("TE: after a bare CR", _post(b"X: y\rTransfer-Encoding: chunked", _EMPTY), "reject"),
    ("TE: underscore", _post(b"Transfer_Encoding: chunked", _EMPTY), "reject"),
    ("TE: quoted", _post(b'Transfer-Encoding: "chunked"', _EMPTY), "reject"),
    ("TE: parameter", _post(b"Transfer-Encoding: chunked;q=1", _EMPTY), "reject"),
    ("TE: NUL in the name", _post(b"Transfer\x00Encoding: chunked", _EMPTY), "reject"),
    ("TE: 0xff after it", _post(b"Transfer-Encoding: chunked\xff", _EMPTY), "reject"),
    ("TE: named by Connection", _post(b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked", _EMPTY), "reject"),
    ("TE in HTTP/1.0, CVE-2019-20372's kin", _post(b"Transfer-Encoding: chunked", _EMPTY, version=b"1.0"), "reject"),
    ("TE: in capitals", _post(b"TRANSFER-ENCODING: CHUNKED", _EMPTY), "accept"),
    # Content-Length.
    ("CL: plus, CVE-2018-7159's kin", _post(b"Content-Length: +2", b"hi"), "reject"),
    ("CL: minus", _post(b"Content-Length: -2", b"hi"), "reject"),
    ("CL: list of equals", _post(b"Content-Length: 2, 2", b"hi"), "reject"),
    ("CL: twice the same", _post(b"Content-Length: 2\r\nContent-Length: 2", b"hi"), "reject"),
    ("CL: twice, differing", _post(b"Content-Length: 2\r\nContent-Length: 0", b"hi"), "reject"),
    ("CL: hexadecimal", _post(b"Content-Length: 0x2", b"hi"), "reject"),
    ("CL: spaces within, CVE-2018-7159", _post(b"Content-Length: 2 2", b"hi"), "reject"),
    ("CL: beyond 64 bits, CVE-2021-32802's kin", _post(b"Content-Length: 18446744073709551618", b"hi"), "reject"),
    ("CL: Arabic digits", _post(b"Content-Length: \xd9\xa2", b"hi"), "reject"),
    ("CL: superscript two", _post(b"Content-Length: \xb2", b"hi"), "reject"),
    ("CL: fraction", _post(b"Content-Length: 2.0", b"hi"), "reject"),
    ("CL: underscore in the number", _post(b"Content-Length: 0_2", b"hi"), "reject"),
    ("CL: empty, CVE-2022-32213's kin", _post(b"Content-Length:", b""), "reject"),
    ("CL: named by Connection", _post(b"Connection: content-length\r\nContent-Length: 2", b"hi"), "reject"),
    ("CL: leading zeros", _post(b"Content-Length: 0002", b"hi"), "accept"),
    ("CL: plus zero", _post(b"Content-Length: +0"), "reject"),
    ("CRLF after a body", _post(b"Content-Length: 2", b"hi\r\n"), "accept"),
    ("two CRLFs after a body", _post(b"Content-Length: 2", b"hi\r\n\r\n"), "reject"),
    ("LF after a body", _post(b"Content-Length: 2", b"hi\n"), "reject"),
    ("CR after a body", _post(b"Content-Length: 2", b"hi\r"), "first"),
    ("CRLF and half a word after a body", _post(b"Content-Length: 2", b"hi\r\nhello"), "reject"),
    ("CL: too long for what follows", _post(b"Content-Length: 2", b"hi" + _GET[:20]), "first"),
    ("CL: nothing after it", _post(b"Content-Length: 2", b"hiX"), "reject"),
    # Chunks.
    ("chunk: 0x, CVE-2022-2880's kin", _chunked(b"0x2\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: plus, CVE-2021-22959's kin", _chunked(b"+2\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: space after the size, CVE-2021-22959", _chunked(b"2 \r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: bare LF after the size, CVE-2025-22871", _chunked(b"2\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: bare LF in an extension, CVE-2025-22871", _chunked(b"2;a\nb\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: bare CR in an extension, CVE-2025-4366's kin", _chunked(b"2;a\rb\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: CRLF in a quoted extension, TERM.EXT", _chunked(b'2;a="\r\n"\r\nhi\r\n' + _EMPTY), "reject"),
    ("chunk: empty extension", _chunked(b"2;\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: extension", _chunked(b"2;a=b\r\nhi\r\n" + _EMPTY), "accept"),
    ("chunk: quoted extension", _chunked(b'2;a="b;c"\r\nhi\r\n' + _EMPTY), "accept"),
    ("chunk: spilled, any two bytes for CRLF", _chunked(b"2\r\nhiXX0\r\n\r\n"), "reject"),
    ("chunk: longer than its size", _chunked(b"1\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: 64 bits, CVE-2013-2028", _chunked(b"FFFFFFFFFFFFFFFF\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: wraps 64 bits", _chunked(b"10000000000000002\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: wraps 32 bits", _chunked(b"100000002\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: last one with a bare LF", _chunked(b"2\r\nhi\r\n0\r\n\n"), "reject"),
    ("chunk: the end is missing", _chunked(b"2\r\nhi\r\n0\r\n"), "reject"),
    ("chunk: NUL after the size", _chunked(b"2\x00\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: negative", _chunked(b"-2\r\nhi\r\n" + _EMPTY), "reject"),
    ("chunk: leading zeros", _chunked(b"002\r\nhi\r\n000\r\n\r\n"), "accept"),
    ("trailer", _chunked(b"2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n"), "accept"),
    ("trailer: frames", _chunked(b"2\r\nhi\r\n0\r\nContent-Length: 9\r\n\r\n"), "reject"),
    ("trailer: credential", _chunked(b"2\r\nhi\r\n0\r\nAuthorization: Api-Key x\r\n\r\n"), "reject"),
    ("trailer: folded", _chunked(b"2\r\nhi\r\n0\r\nX: y\r\n z\r\n\r\n"), "reject"),
    ("trailer: a request in it, CVE-2023-46589's kin", _chunked(b"0\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"), "reject"),
    # Heads.
    ("HTTP/0.9", b"GET /\r\n", "reject"),
    ("HTTP/0.9 with a version", _get(b"/", version=b"HTTP/0.9"), "reject"),
    ("HTTP/1.2", _get(b"/", version=b"HTTP/1.2"), "reject"),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "reject"),
    ("HTTP/11", _get(b"/", version=b"HTTP/11"), "reject"),
    ("version in lower case", _get(b"/", version=b"http/1.1"), "reject"),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", "reject"),
    ("tab for space", b"GET\t/\tHTTP/1.1\r\nHost: h\r\n\r\n", "reject"),
    ("space in the target", _get(b"/a b"), "reject"),
    ("bare LF after the request line", b"GET / HTTP/1.1\nHost: h\r\n\r\n", "reject"),
    ("bare LF at the end of the head, CVE-2022-32214", b"GET / HTTP/1.1\r\nHost: h\n\n" + _GET, "reject"),
    ("first header folded, CVE-2020-10108's kin", b"GET / HTTP/1.1\r\n Host: h\r\nHost: h\r\n\r\n", "reject"),
    ("empty name", _get(b"/", _HOST + b": x\r\n"), "reject"),
    ("no colon", _get(b"/", _HOST + b"X\r\n"), "reject"),
    ("NUL in a value", _get(b"/", _HOST + b"X: a\x00b\r\n"), "reject"),
    ("delete character in a value", _get(b"/", _HOST + b"X: a\x7fb\r\n"), "reject"),
    ("0x80+ in a name", _get(b"/", _HOST + b"X\xe9: y\r\n"), "reject"),
    ("0x80+ in a value", _get(b"/", _HOST + b"X: \xe9\r\n"), "accept"),
    ("underscore that servers fold, CVE-2015-0219's kin", _get(b"/", _HOST + b"Content_Type: y\r\n"), "reject"),
    ("underscore in a name that means nothing here", _get(b"/", _HOST + b"X_User: y\r\n"), "accept"),
    ("dot in a name that means nothing here", _get(b"/", _HOST + b"X.User: y\r\n"), "accept"),
    ("Expect: unknown", _get(b"/", _HOST + b"Expect: x\r\n"), 417),
    ("Expect: obfuscated, 2025", _post(b"Expect: y 100-continue\r\nContent-Length: 2", b"hi"), 417),
    ("Expect: empty", _post(b"Expect:\r\nContent-Length: 2", b"hi"), "accept"),
    ("Expect: unknown, and a request for a body", _post(b"Expect: x\r\nContent-Length: %d" % len(_GET), _GET), 417),
    ("Content-Type twice", _post(b"Content-Type: a\r\nContent-Type: b\r\nContent-Length: 2", b"hi"), "reject"),
    ("Content-Type twice the same", _post(b"Content-Type: a\r\nContent-Type: a\r\nContent-Length: 2", b"hi"), "accept"),
    # Host and target.
    ("no Host", _get(b"/", b""), "reject"),
    ("two Hosts", _get(b"/", _HOST + _HOST), "reject"),
    ("empty Host", _get(b"/", b"Host:\r\n"), "reject"),
    ("Host: user", _get(b"/", b"Host: u@h\r\n"), "reject"),
    ("Host: path", _get(b"/", b"Host: h/a\r\n"), "reject"),
    ("Host: port is no number", _get(b"/", b"Host: h:a\r\n"), "reject"),
    ("Host: port out of range", _get(b"/", b"Host: h:65536\r\n"), "reject"),
    ("Host: two names", _get(b"/", b"Host: h, g\r\n"), "reject"),
    ("Host: not an address", _get(b"/", b"Host: [::g]\r\n"), "reject"),
    ("Host: not an address either", _get(b"/", b"Host: [:::1]\r\n"), "reject"),
    ("Host: empty port", _get(b"/", b"Host: h:\r\n"), "accept"),
    ("Host: port alone", _get(b"/", b"Host: :80\r\n"), "reject"),
    ("Host: address", _get(b"/", b"Host: [::1]:80\r\n"), "accept"),
    ("absolute, Host agrees", _get(b"http://h/a", _HOST), "accept"),
    ("absolute, Host disagrees", _get(b"http://g/a", _HOST), "reject"),
    ("absolute, port disagrees", _get(b"http://h:81/a", _HOST), "reject"),
    ("absolute, user", _get(b"http://u@h/a", _HOST), "reject"),
    ("absolute, backslash", _get(b"http://h\\@g/a", _HOST), "reject"),
    ("absolute, other scheme", _get(b"file://h/a", _HOST), "reject"),
    ("authority form", _get(b"h:80", b"Host: h:80\r\n"), "reject"),
    ("CONNECT", b"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n", "reject"),
    ("CONNECT with a path", b"CONNECT / HTTP/1.1\r\nHost: h\r\n\r\n", "reject"),
    ("asterisk for GET", _get(b"*"), "reject"),
    ("asterisk for OPTIONS, absolute", b"OPTIONS http://h HTTP/1.1\r\nHost: h\r\n\r\n", "accept"),
    ("asterisk for OPTIONS", b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "accept"),
    ("fragment", _get(b"/a#b"), "reject"),
    ("no slash", _get(b"a"), "reject"),
    ("dot segments", _get(b"/a/../b"), "reject"),
    ("dot segments, encoded, CVE-2021-41773", _get(b"/a/.%2e/b"), "reject"),
    ("dot segments with a parameter, CVE-2018-11759", _get(b"/a/..;/b"), "reject"),
    ("backslash", _get(b"/a\\b"), "reject"),
    ("encoded slash", _get(b"/a%2Fb"), "reject"),
    ("encoded NUL", _get(b"/a%00b"), "reject"),
    ("overlong slash", _get(b"/a%c0%afb"), "reject"),
    ("full-width dot", _get(b"/a/\xef\xbc\x8e\xef\xbc\x8e/b"), "reject"),
    ("a URL in the query", _get(b"/a?u=http://h/../b%2f%00"), "accept"),
    # Methods, upgrades, pipelines.
    ("method in lower case", b"get / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
    ("method that is not registered", b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
    ("method of WebDAV", b"PROPFIND / HTTP/1.1\r\nHost: h\r\n\r\n", "accept"),
    ("method that llhttp does not know", b"VERSION-CONTROL / HTTP/1.1\r\nHost: h\r\n\r\n", "accept"),
    ("method that is no token", b"G(T / HTTP/1.1\r\nHost: h\r\n\r\n", "reject"),
    ("unknown method after a request", _get(b"/") + b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n", "reject"),
    ("TRACE", b"TRACE / HTTP/1.1\r\nHost: h\r\n\r\n", 405),
    ("TRACE with a body", b"TRACE / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(_GET) + _GET, 405),
    ("GET with a body", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi", "accept"),
    ("h2c", _get(b"/", _HOST + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"), "accept"),
    ("bytes with a handshake", _get(b"/", _HOST + b"Upgrade: websocket\r\nConnection: upgrade\r\n") + b"X", "reject"),
    ("half a handshake", _get(b"/", _HOST + b"Upgrade: websocket\r\nConnection: upgrade\r\n"), "reject"),
    ("after Connection: close", _get(b"/", _HOST + b"Connection: close\r\n") + _GET, "alone"),
    ("nonsense after Connection: close", _get(b"/", _HOST + b"Connection: close\r\n") + b"\x00\n", "alone"),
    ("malformed chunks with Connection: close", _post(b"Connection: close\r\nTransfer-Encoding: chunked", b"x"),
     "reject"),
    ("after HTTP/1.0", _get(b"/", version=b"HTTP/1.0") + _GET, "reject"),
    ("the second one malformed", _get(b"/") + _get(b"/", b""), "first"),
    ("the second one has a bad target", _get(b"/") + _get(b"/a/../b"), "first"),
    ("the second one has TE and CL", _get(b"/") + _post(b"Content-Length: 5\r\nTransfer-Encoding: chunked"), "reject"),
    ("the second one broken off", _get(b"/") + _GET[:-2], "first"),
]  # fmt: skip

"""What real servers make of what is forwarded: nginx, aiohttp, WSGI and SCGI behind the proxy, curl in front of it.

nginx decodes `%2F`, merges slashes and resolves dot segments; aiohttp keeps `%2F`; the WSGI program decodes a path and
drops `;parameters`, and gets header names folded, as does the SCGI program, which folds dots too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from aiohttp import web

from keyproxy.config.schema import RouteRow
from tests.rawhttp import free_port
from tests.wire.conftest import KEY, Start, Wire
from tests.wire.test_request_names import OURS, OVERRIDES, folded, spellings

pytestmark = [
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]

#: Route and expression of what a server does for a path; the first one that matches.
HANDLERS = {
    "meta": r"/v1/files/[^/]+/meta",
    "files": r"/v1/files/[^/]+",
    "tree": r"/v1/tree/.*",
    "admin": r"/admin/.*",
    "public": r"/public/[^/]+",
    "disk": r"/disk/.*",
}
ROWS = [
    RouteRow("GET /v1/files/{id}/meta", ["never"], name="meta"),
    RouteRow("GET /v1/files/{id}", name="files", encoded_slash="forward"),
    RouteRow("GET /v1/tree/{rest...}", name="tree", encoded_slash="forward"),
    RouteRow("GET /disk/{file}", name="disk", encoded_slash="forward"),
    RouteRow("* /admin/{rest...}", ["never"], name="admin"),
    RouteRow("GET /public/{id}", name="public", access="public"),
]

PATHS = [
    "/v1/files/a", "/v1/files/a%2Fb", "/v1/files/a%2fmeta", "/v1/files/a%2Fb%2Fmeta", "/v1/files/..%2F..%2Fadmin%2Fx",
    "/v1/files/a%2F..%2F..%2F..%2Fadmin%2Fx", "/v1/files/%2Fa", "/v1/files/a%2F", "/v1/files/a%2F%2Fb",
    "/v1/files/a;x%2Fmeta", "/v1/files/a%3Bx%2Fmeta", "/v1/files/a%2F..;x", "/v1/files/a%2F;x%2Fmeta",
    "/v1/files/a/meta", "/v1/files/a/%6Deta", "/v1/files/a//meta", "/v1/files//a", "/v1/files/./a", "/v1/files/%61",
    "/v1/tree/a%2Fb", "/v1/tree/a/b%2Fc", "/v1/tree/..%2Fadmin%2Fx", "/v1/tree/a%2F..%2F..%2F..%2Fadmin%2Fx",
    "/v1/tree/../../admin/x", "/v1/tree/%2e%2e/%2e%2e/admin/x", "/v1/tree/..%252F..%252Fadmin", "/v1/tree/a%5C..%5Cb",
    "/public/x", "/public/..%2Fadmin%2Fx", "/public/../admin/x", "/public/%2e%2e/admin/x", "/public//admin/x",
    "/public;/admin/x", "/public/;/admin/x", "//public/x", "/%70ublic/x", "/admin%2Fx", "/admin/x", "/%61dmin/x",
    "/public/..;/admin/x", "/public%2Fx", "/v1%2Ffiles%2Fa", "/./admin/x", "/admin;v/x", "/disk/sub%2Fb.txt",
    "/disk/..%2Fsecret.txt", "/disk/sub%2F..%2F..%2Fsecret.txt", "/disk/a.txt", "/disk/%2Fetc%2Fpasswd",
]  # fmt: skip


def handler(path: str) -> str | None:
    """What a server that matches its routes in order does for a path."""
    return next((name for name, expression in HANDLERS.items() if re.fullmatch(expression, path)), None)


async def curl(wire: Wire, path: str, *lines: str, key: bytes | None = KEY) -> tuple[int, str]:
    """(status, body) of a GET, whose path curl sends as it is."""
    assert isinstance(wire.address, tuple)
    host, port = wire.address
    headers = [*lines, *([f"Authorization: Api-Key {key.decode()}"] if key is not None else [])]
    arguments = [part for line in headers for part in ("-H", line)]
    command = ["curl", "-sS", "--path-as-is", "-m", "10", "-w", "\n%{http_code}", *arguments]
    process = await asyncio.create_subprocess_exec(*command, f"http://{host}:{port}{path}", stdout=-1, stderr=-1)
    out, err = await process.communicate()
    assert process.returncode == 0, err
    body, _, status = out.decode("utf-8", "replace").rpartition("\n")
    return int(status), body


@contextlib.asynccontextmanager
async def nginx(directory: Path, locations: str) -> AsyncIterator[str]:
    """Run nginx with these locations; its URL."""
    port = free_port()
    paths = "".join(
        f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {paths} default_type text/plain;\n"
        f"server {{ listen 127.0.0.1:{port}; underscores_in_headers on; ignore_invalid_headers off;\n{locations}\n}} }}\n"
    )
    command = ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", str(directory / "error.log")]
    process = await asyncio.create_subprocess_exec(*command, stdout=-3, stderr=-3)
    try:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                assert process.returncode is None, (directory / "error.log").read_text()
                await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def serving_nginx(directory: Path) -> AsyncIterator[str]:
    """nginx with one location for each handler, and files."""
    files = directory / "files"
    (files / "sub").mkdir(parents=True)
    (files / "a.txt").write_text("disk")
    (files / "sub" / "b.txt").write_text("disk")
    (directory / "secret.txt").write_text("secret")
    known = {name: expression for name, expression in HANDLERS.items() if name != "disk"}
    locations = "\n".join(f"location ~ ^{one}$ {{ return 200 {name}; }}" for name, one in known.items())
    async with nginx(
        directory, f"{locations}\nlocation /disk/ {{ alias {files}/; }}\nlocation / {{ return 404; }}"
    ) as url:
        yield url


@contextlib.asynccontextmanager
async def serving_aiohttp(_directory: Path) -> AsyncIterator[str]:
    """An aiohttp server with a route for each handler."""

    def responding(name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def respond(_request: web.Request) -> web.Response:
            return web.Response(text=name)

        return respond

    app = web.Application()
    for name, path in (
        ("meta", "/v1/files/{id}/meta"), ("files", "/v1/files/{id}"), ("tree", "/v1/tree/{rest:.*}"),
        ("admin", "/admin/{rest:.*}"), ("public", "/public/{id}"), ("disk", "/disk/{rest:.*}"),
    ):  # fmt: skip
        app.router.add_route("*", path, responding(name))
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_arguments: object) -> None: ...


def _by_path(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Parameters are dropped, as Java servers do, from the decoded path."""
    name = handler(re.sub(r";[^/]*", "", environ["PATH_INFO"]))
    start_response("200 OK" if name else "404 Not Found", [("Content-Type", "text/plain")])
    return [(name or "").encode()]


def _environment(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Every request header as the program sees it."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [json.dumps({name: value for name, value in environ.items() if name.startswith("HTTP_")}).encode()]


@contextlib.asynccontextmanager
async def serving_wsgi(_directory: Path, app: Callable[..., Iterable[bytes]] = _by_path) -> AsyncIterator[str]:
    """A WSGI server with this program."""
    with make_server("127.0.0.1", 0, app, handler_class=_Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


Serving = Callable[[Path], contextlib.AbstractAsyncContextManager[str]]


@pytest.mark.parametrize("serving", [serving_nginx, serving_aiohttp, serving_wsgi], ids=["nginx", "aiohttp", "wsgi"])
async def test_a_real_server_does_what_the_route_of_a_path_allows_or_nothing(
    start: Start, tmp_path: Path, serving: Serving
) -> None:
    async with serving(tmp_path) as url:
        wire = await start(rows=ROWS, upstream={"url": url})
        seen: dict[str, list[int]] = {}
        for path in PATHS:
            for key in (KEY, None) if "public" in path or "admin" in path else (KEY,):
                status, body = await curl(wire, path, key=key)
                seen.setdefault(path, []).append(status)
                route = wire.recorder.seen[-1].route
                assert "secret" not in body, path
                assert status != 200 or body == route, f"{path}: {body} by the route {route}"
                assert status != 200 or route not in ("meta", "admin"), path
                assert status != 200 or key is not None or route == "public", path
        # The paths that are meant are served, and judged alike by whatever is behind the proxy.
        for path in ("/v1/files/a", "/v1/tree/a%2Fb", "/v1/tree/a/b%2Fc", "/disk/a.txt", "/disk/sub%2Fb.txt"):
            assert seen[path] == [200], path
        assert seen["/public/x"] == [200, 200]
        assert seen["/v1/files/a%2Fb"] == [200 if serving is serving_aiohttp else 404]
        assert seen["/v1/files/a%2fmeta"] == [400]


async def test_a_program_that_folds_header_names_sees_only_ours(start: Start, tmp_path: Path) -> None:
    async with serving_wsgi(tmp_path, _environment) as url:
        await _check_names(await start(rows=ROWS, upstream={"url": url}))


async def test_a_program_behind_nginx_that_folds_header_names_sees_only_ours(start: Start, tmp_path: Path) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """SCGI: the headers are one netstring of names and values that end in NUL."""
        length = int((await reader.readuntil(b":"))[:-1])
        parts = (await reader.readexactly(length)).decode("latin-1").split("\0")
        environ: dict[str, str] = {}
        for name, value in zip(parts[::2], parts[1::2], strict=False):
            if name.startswith("HTTP_"):
                # As PHP does, with a repeated name joined as servers do.
                name = name.replace(".", "_")
                environ[name] = f"{environ[name]}, {value}" if name in environ else value
        writer.write(b"Status: 200 OK\r\nContent-Type: text/plain\r\n\r\n" + json.dumps(environ).encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        locations = (
            f"location / {{ scgi_pass 127.0.0.1:{port}; scgi_param REQUEST_METHOD $request_method;"
            " scgi_param CONTENT_LENGTH 0; scgi_param SCGI 1; }"
        )
        async with nginx(tmp_path, locations) as url:
            await _check_names(await start(rows=ROWS, upstream={"url": url}))


async def _check_names(wire: Wire) -> None:
    lines = [f"{spelling}: evil" for name in (*OURS, *OVERRIDES, "X-Api-Key") for spelling in spellings(name)]
    status, body = await curl(wire, "/v1/files/a", *lines, "X_Custom: 1", "X-Mine: a b " + KEY.decode())
    environ: dict[str, str] = json.loads(body)
    assert status == 200
    assert "evil" not in body
    assert KEY.decode() not in body
    assert environ["HTTP_X_KEYPROXY_USER"] == "u_42"
    assert environ["HTTP_X_CUSTOM"] == "1"
    gone = {f"HTTP_{folded(name)}" for name in (*OVERRIDES, "X-Api-Key", "Authorization", "Proxy-Authorization")}
    assert not gone & set(environ)
    # Without a key, on a public route: no identity at all.
    status, body = await curl(wire, "/public/x", *lines, key=None)
    assert status == 200
    assert "evil" not in body
    assert not [name for name in json.loads(body) if name.startswith(("HTTP_X_KEYPROXY", "HTTP_AUTH", "HTTP_X_API"))]

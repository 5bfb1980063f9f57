"""When the keys of keyproxy are fetched, how long they count, and what a bad server can do."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import socketserver
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from keyproxy_client.incoming import key_set_fetch
from keyproxy_client.incoming.key_set_fetch import FetchFailed, KeySetFetcher
from keyproxy_client.incoming.key_sets import KeySets, KeysMissing, KeysUnavailable


class Fetcher:
    """Returns these keys; None: it fails."""

    shown = "http://keyproxy/jwks.json"

    def __init__(self, keys: dict[str, str] | None) -> None:
        self.keys = keys

    def fetch(self) -> tuple[Any, float]:
        if self.keys is None:
            raise FetchFailed("status 503")
        return dict(self.keys), 60.0


class World:
    """Key sets with a clock that stands still."""

    def __init__(self, keys: dict[str, str] | None) -> None:
        self.seconds = 1000.0
        self.fetcher = Fetcher(keys)
        self.sets = KeySets(self.fetcher, lambda content: content, lambda: self.seconds)  # type: ignore[arg-type]

    def key(self, kid: str) -> str | None:
        """As a request looks it up: it waits for one fetch at most. Raises KeysUnavailable."""
        try:
            return self.sets.key(kid, may_fetch=True)
        except KeysMissing as missing:
            missing.fetched.result(5)
        return self.sets.key(kid, may_fetch=False)

    def outcome(self, kid: str) -> str | None:
        try:
            return self.key(kid)
        except KeysUnavailable:
            return "unavailable"


def test_keys_are_fetched_once_and_count_for_their_max_age() -> None:
    world = World({"k1": "one"})
    assert [world.key("k1") for _ in range(100)] == ["one"] * 100
    world.seconds += 44.9
    assert (world.key("k1"), world.sets.fetches) == ("one", 1)


def test_key_set_is_replaced_before_its_end_while_requests_use_it() -> None:
    world = World({"k1": "one"})
    world.key("k1")
    world.seconds += 45.0
    world.fetcher.keys = {"k2": "two"}
    # Without a wait: the old set still counts.
    assert world.sets.key("k1", may_fetch=False) == "one"
    deadline = time.monotonic() + 5
    while "2 keys" in repr(world.sets) or world.outcome("k2") != "two":
        assert time.monotonic() < deadline
    assert world.sets.fetches == 2
    world.seconds += 30.0
    assert world.key("k2") == "two"


def test_key_that_left_the_set_is_unknown_after_max_age() -> None:
    world = World({"k1": "one"})
    world.key("k1")
    world.fetcher.keys = {"k2": "two"}
    world.seconds += 60.0
    assert world.outcome("k1") is None


def test_set_does_not_count_after_max_age_if_it_cannot_be_fetched() -> None:
    world = World({"k1": "one"})
    world.key("k1")
    world.fetcher.keys = None
    world.seconds += 59.9
    assert world.outcome("k1") == "one"
    world.seconds += 0.1
    assert world.outcome("k1") == "unavailable"
    world.fetcher.keys = {"k1": "one"}
    world.seconds += 1.0
    assert world.outcome("k1") == "one"


def test_unknown_key_id_causes_a_fetch_and_is_found_in_it() -> None:
    world = World({"k1": "one"})
    world.key("k1")
    world.fetcher.keys = {"k1": "one", "k2": "two"}
    assert (world.key("k2"), world.sets.fetches) == ("two", 2)


def test_flood_of_unknown_key_ids_causes_a_fetch_in_ten_seconds() -> None:
    world = World({"k1": "one"})
    world.key("k1")
    assert {world.outcome(f"x{number}") for number in range(1000)} == {None}
    assert world.sets.fetches == 2
    world.seconds += 9.9
    assert (world.outcome("y"), world.sets.fetches) == (None, 2)
    world.seconds += 0.1
    assert (world.outcome("z"), world.sets.fetches) == (None, 3)
    assert world.key("k1") == "one"


def test_unknown_key_id_is_unverifiable_while_the_fetch_for_it_fails() -> None:
    world = World({"k1": "one"})
    world.key("k1")
    world.fetcher.keys = None
    assert world.outcome("k2") == "unavailable"
    assert world.outcome("k1") == "one"
    world.fetcher.keys = {"k1": "one"}
    world.seconds += 10.0
    assert world.outcome("k2") is None


def test_without_keys_a_fetch_is_tried_once_a_second() -> None:
    world = World(None)
    assert {world.outcome("k1") for _ in range(50)} == {"unavailable"}
    assert world.sets.fetches == 1
    world.seconds += 1.0
    assert (world.outcome("k1"), world.sets.fetches) == ("unavailable", 2)


def test_requests_that_wait_for_keys_share_one_fetch() -> None:
    world = World({"k1": "one"})
    begun, goes_on = threading.Event(), threading.Event()
    fetch = world.fetcher.fetch

    def slow() -> tuple[Any, float]:
        begun.set()
        assert goes_on.wait(5)
        return fetch()

    world.fetcher.fetch = slow  # type: ignore[method-assign]
    waiting = []
    for kid in ("k1", "k1", "k2"):
        with pytest.raises(KeysMissing) as caught:
            world.sets.key(kid, may_fetch=True)
        waiting.append(caught.value.fetched)
    assert begun.wait(5)
    assert waiting[0].cancel() is False
    goes_on.set()
    for one in waiting:
        one.result(5)
    assert (world.sets.fetches, world.sets.key("k1", may_fetch=False)) == (1, "one")


# The fetch itself, from a real server.


class Jwks(http.server.BaseHTTPRequestHandler):
    """Responds as the path names; counts redirected requests."""

    redirected = 0

    def do_GET(self) -> None:
        case = self.path.strip("/")
        if case == "drip-header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        status, headers, body = {
            "plain": (200, {"Cache-Control": "public, max-age=30"}, b'{"keys": []}'),
            "no-age": (200, {}, b"{}"),
            "no-store": (200, {"Cache-Control": "no-store"}, b"{}"),
            "long": (200, {"Cache-Control": "max-age=999999999"}, b"{}"),
            "zero": (200, {"Cache-Control": "max-age=0"}, b"{}"),
            "s-maxage": (200, {"Cache-Control": "s-maxage=5"}, b"{}"),
            "error": (503, {}, b"{}"),
            "redirect": (302, {"Location": "/target"}, b"{}"),
            "target": (200, {}, b"{}"),
            "html": (200, {}, b"<html>"),
            "nested": (200, {}, b"[" * 100_000),
            "big": (200, {}, b" " * 300_000),
            "latin": (200, {}, b'"\xff"'),
        }.get(case, (200, {}, b"{}"))
        type(self).redirected += case == "target"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + (case in ("short", "drip"))))
        self.end_headers()
        self.wfile.write(body)
        if case == "drip":
            self.wfile.flush()
            time.sleep(0.3)
            self.wfile.write(b" ")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Jwks) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("case", "seconds"),
    [("plain", 30), ("no-age", 60), ("no-store", 1), ("zero", 1), ("long", 86_400), ("s-maxage", 60)],
)
def test_max_age_of_the_response_counts_within_bounds(origin: str, case: str, seconds: float) -> None:
    assert KeySetFetcher(f"{origin}/{case}").fetch()[1] == seconds


@pytest.mark.parametrize("case", ["error", "redirect", "html", "nested", "big", "latin", "short"])
def test_unusable_response_is_a_failure(origin: str, case: str) -> None:
    with pytest.raises(FetchFailed):
        KeySetFetcher(f"{origin}/{case}").fetch()
    assert Jwks.redirected == 0


@pytest.mark.parametrize("case", ["drip", "drip-header"])
def test_response_that_takes_too_long_is_a_failure(origin: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_set_fetch, "FETCH_SECONDS_MAX", 0.2)
    began = time.monotonic()
    with pytest.raises(FetchFailed):
        KeySetFetcher(f"{origin}/{case}").fetch()
    assert time.monotonic() - began < 2.0


def test_proxy_of_the_environment_is_not_used(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert KeySetFetcher(f"{origin}/plain").fetch()[0] == {"keys": []}


def test_query_of_the_address_is_used_and_not_shown(origin: str) -> None:
    sets = KeySets(KeySetFetcher(f"{origin}/plain?token=secret"), lambda content: content)
    assert sets._fetcher._path == "/plain?token=secret"
    assert "secret" not in repr(sets)


def test_server_that_does_not_exist_is_a_failure() -> None:
    with pytest.raises(FetchFailed, match="ConnectionRefusedError"):
        KeySetFetcher("http://127.0.0.1:9/jwks.json").fetch()


@pytest.mark.parametrize(
    "url",
    ["", "jwks.json", "file:///etc/passwd", "ftp://a/jwks.json", "http://", "http://u:p@host/", "http://host/#a",
     "http://host/a b", "http://host/\r\nX: y", "http://höst/", "http://host:x/"],
)  # fmt: skip
def test_address_that_is_not_of_http_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        KeySetFetcher(url)


@pytest.mark.parametrize(
    ("url", "warns"),
    [("http://keyproxy:9090/jwks.json", True), ("http://10.0.0.1/", True), ("https://keyproxy/jwks.json", False),
     ("http://127.0.0.1:9090/jwks.json", False), ("http://localhost/", False), ("http://[::1]/", False),
     ("http://127.example.org/", True)],
)  # fmt: skip
def test_keys_from_another_host_without_tls_are_logged(url: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "keyproxy_client"):
        KeySetFetcher(url)
    assert bool(caplog.records) is warns


def test_keys_that_cannot_be_read_are_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(content: Any) -> Any:
        raise ValueError("no JWKS")

    sets = KeySets(Fetcher({"secret-id": "x"}), refuse)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "keyproxy_client"), pytest.raises(KeysMissing) as caught:
        sets.key("k1", may_fetch=True)
    caught.value.fetched.result(5)
    with pytest.raises(KeysUnavailable):
        sets.key("k1", may_fetch=False)
    assert json.dumps(caplog.text).count("secret-id") == 0


def test_fetch_that_fails_in_an_unexpected_way_does_not_prevent_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    world = World({"k1": "one"})
    keys_of, world.sets._keys_of = world.sets._keys_of, None  # type: ignore[misc, assignment]
    assert world.outcome("k1") == "unavailable"
    world.sets._keys_of = keys_of  # type: ignore[misc]
    world.seconds += 1.0
    assert world.outcome("k1") == "one"

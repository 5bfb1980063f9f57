"""Sources of the secret for outgoing requests, and the origin that receives it."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from keyproxy_client import keys
from keyproxy_client.acting import Acting
from keyproxy_client.outgoing.authorizer import Authorizer, Credential
from keyproxy_client.outgoing.key_sources import KeyFile, SecretUnavailable, source_of
from keyproxy_client.outgoing.origin import Origin
from keyproxy_client.outgoing.repetition import retry_after_seconds

KEY = keys.make(entropy=b"\1" * 32)
NEW_KEY = keys.make(entropy=b"\2" * 32)
TEST_KEY = keys.make(entropy=b"\3" * 32, is_test=True)
ACTING = Acting("u_1", "acme")


def test_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f" {KEY}\n\n", encoding="ascii")
    source = source_of(path)
    assert source.secret(None) == KEY
    replacement = tmp_path / "new"
    replacement.write_text(NEW_KEY, encoding="ascii")
    replacement.rename(path)
    assert source.secret(None) == NEW_KEY


@pytest.mark.parametrize("content", [None, b"", b"\n", b"kp_live", KEY.encode() + b"\n" + KEY.encode(), b"\xff" * 30])
def test_last_secret_is_used_while_its_file_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    path = tmp_path / "key"
    path.write_text(KEY, encoding="ascii")
    source = source_of(str(path))
    assert source.secret(None) == KEY
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "keyproxy_client"):
        assert [source.secret(None) for _ in range(3)] == [KEY] * 3
    assert len(caplog.records) == 1
    assert KEY not in caplog.text
    path.write_text(NEW_KEY, encoding="ascii")
    assert source.secret(None) == NEW_KEY


def test_a_client_that_is_made_while_the_file_is_replaced_uses_the_last_secret(tmp_path: Path) -> None:
    path = tmp_path / "{tenant}.key"
    (tmp_path / "acme.key").write_text(KEY)
    assert Authorizer("http://localhost", path).credential(ACTING).secret == KEY
    (tmp_path / "acme.key").unlink()
    assert Authorizer("http://localhost", path).credential(ACTING).secret == KEY
    (tmp_path / "acme.key").write_text(NEW_KEY)
    assert Authorizer("http://localhost", path).credential(ACTING).secret == NEW_KEY


@pytest.mark.parametrize("content", [None, b"", b"kp_live", KEY.encode() + b"\r\nX-Other: 1", KEY.encode() + b"\xff"])
def test_file_without_one_key_gives_an_error_that_does_not_show_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SecretUnavailable, match=str(path)) as raised:
        source_of(path).secret(None)
    assert KEY not in repr(raised.value)
    assert raised.value.__cause__ is None


def test_file_of_the_tenant_is_chosen_by_the_acting_user(tmp_path: Path) -> None:
    for tenant, secret in (("acme", KEY), ("globex", NEW_KEY)):
        (tmp_path / f"{tenant}.key").write_text(secret, encoding="ascii")
    source = KeyFile(str(tmp_path / "{tenant}.key"), "globex")
    assert source.secret(Acting("u_1", "acme")) == KEY
    assert source.secret(Acting("u_1")) == source.secret(None) == NEW_KEY
    with pytest.raises(SecretUnavailable, match="tenant"):
        KeyFile(str(tmp_path / "{tenant}.key")).secret(Acting("u_1"))


async def _found() -> str:
    return KEY


@pytest.mark.parametrize(
    ("key", "works_in_sync_code"),
    [
        (KEY, True),
        (f" {KEY}\n", True),
        (lambda: KEY, True),
        (lambda: f"{KEY}\r\n", True),
        (lambda acting: KEY if acting == ACTING else "", True),
        (lambda acting=None: KEY, True),
        (_found, False),
    ],
    ids=["text", "text-of-line", "function", "line-of-function", "of-acting", "optional", "async"],
)
def test_key_is_a_secret_or_a_function(key: Any, works_in_sync_code: bool) -> None:
    source = source_of(key)
    assert asyncio.run(source.secret_async(ACTING)) == KEY
    if works_in_sync_code:
        assert source.secret(ACTING) == KEY
    else:
        with pytest.raises(TypeError, match="asynchronous"):
            source.secret(ACTING)


@pytest.mark.parametrize("found", [None, "", "short", f"{KEY}\r\nX-Other: 1", b"bytes" * 3, "é" * 20])
def test_function_that_gives_no_key_raises_before_sending(found: Any) -> None:
    with pytest.raises(SecretUnavailable):
        source_of(lambda: found).secret(None)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("", ValueError),
        ("a b c d e f", ValueError),
        ("secrets/worker.key", ValueError),
        (7, TypeError),
        (None, TypeError),
    ],
)
def test_other_values_are_no_key(key: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Authorizer("http://localhost", key)


def test_test_mode_uses_the_test_key_or_a_key_that_is_one() -> None:
    test_user = Acting("u_1", is_test=True)
    both = Authorizer("http://localhost", KEY, test_key=TEST_KEY)
    assert both.credential(test_user).secret == TEST_KEY
    assert both.credential(ACTING).secret == KEY
    assert Authorizer("http://localhost", TEST_KEY).credential(test_user).secret == TEST_KEY
    with pytest.raises(SecretUnavailable, match="test"):
        Authorizer("http://localhost", KEY).credential(test_user)


def test_no_request_goes_out_with_a_key_of_the_other_mode() -> None:
    live_user, test_user = ACTING, Acting("u_1", is_test=True)
    swapped = Authorizer("http://localhost", TEST_KEY, test_key=KEY)
    with pytest.raises(SecretUnavailable, match="test mode, and the test key is a live key"):
        swapped.credential(test_user)
    with pytest.raises(SecretUnavailable, match="live mode, and the live key is a test key"):
        swapped.credential(live_user)
    with pytest.raises(SecretUnavailable, match="live key"):
        asyncio.run(Authorizer("http://localhost", KEY, test_key=lambda: KEY).credential_async(test_user))
    # A refused credential is not replaced by one of the other mode.
    found = iter([KEY, TEST_KEY])
    rotated = Authorizer("http://localhost", lambda: next(found), test_key=TEST_KEY)
    assert rotated.renewed(rotated.credential(live_user), live_user) is None


def test_secret_is_not_shown() -> None:
    authorizer = Authorizer("http://localhost:8080", KEY)
    credential = Credential(KEY, "u_1")
    for text in (repr(authorizer), str(credential), repr(credential), f"{credential}"):
        assert KEY not in text
    assert repr(authorizer) == "Authorizer('http://localhost:8080')"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://localhost", Origin("http", "localhost", 80)),
        ("HTTPS://API.Example.COM:443/", Origin("https", "api.example.com", 443)),
        ("http://[::1]:8080", Origin("http", "::1", 8080)),
        ("https://bücher.example", Origin("https", "xn--bcher-kva.example", 443)),
    ],
)
def test_origin_is_scheme_host_and_port(text: str, expected: Origin) -> None:
    assert Origin.configured(text) == expected
    assert Origin.configured(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "localhost:80", "//localhost", "ftp://localhost", "http://", "http://u:p@localhost", "http://localhost/path",
        "http://localhost?a", "http://localhost#a", "http://localhost:99999", "http://@localhost",
    ],
)  # fmt: skip
def test_other_text_is_no_origin(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - urllib has messages of its own
        Origin.configured(text)


@pytest.mark.parametrize(
    ("scheme", "host", "port", "is_same"),
    [
        ("http", "localhost", 8080, True), ("HTTP", "LOCALHOST", 8080, True), ("ws", "localhost", 8080, True),
        ("https", "localhost", 8080, False), ("wss", "localhost", 8080, False), ("http", "localhost", None, False),
        ("http", "localhost.", 8080, False), ("http", "localhost.evil.example", 8080, False),
        ("http", "", 8080, False), ("file", "localhost", 8080, False), ("", "localhost", 8080, False),
        ("file", "localhost", None, False),
    ],
)  # fmt: skip
def test_request_goes_to_the_origin_or_not(scheme: str, host: str, port: int | None, is_same: bool) -> None:
    assert Origin("http", "localhost", 8080).is_of(scheme, host, port) is is_same


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None), ("", None), ("0", 0.0), (" 12 ", 12.0), ("-1", None), ("1.5", None), ("soon", None),
        ("\u0661", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("Thu, 99 Jan 1970 00:00:00 GMT", None),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_of_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value) == seconds


@pytest.mark.once
def test_importing_http_imports_no_client_library() -> None:
    script = (
        "import sys, keyproxy_client.http, keyproxy_client.keys, keyproxy_client.acting\n"
        "print(sys.modules.keys() & {'httpx', 'requests', 'aiohttp', 'django', 'celery', 'keyproxy'})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["httpx_client", "httpx_async_client", "requests_session", "keyproxy_middleware"])
def test_missing_client_library_names_the_extra_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyproxy_client import http

    for library in ("httpx", "requests", "aiohttp"):
        monkeypatch.setitem(sys.modules, library, None)
    for module in ("requests_auth", "aiohttp_middleware", "httpx_flow"):
        monkeypatch.delitem(sys.modules, f"keyproxy_client.outgoing.{module}", raising=False)
    extra = {"httpx_client": "httpx", "httpx_async_client": "httpx", "requests_session": "requests"}.get(
        name, "aiohttp"
    )
    with pytest.raises(ImportError, match=rf"keyproxy-client\[{extra}\]"):
        getattr(http, name)(origin="http://localhost", key=KEY)


def test_clients_without_settings_need_an_origin_and_a_key() -> None:
    from keyproxy_client.outgoing.configuration import authorizer

    with pytest.raises(TypeError, match="origin"):
        authorizer({})
    with pytest.raises(TypeError, match="belong together"):
        authorizer({"key": KEY})


def test_exception_for_a_malformed_secret_keeps_it_in_no_local_variable(tmp_path: Path) -> None:
    malformed = f"KEY={KEY} x"
    (tmp_path / "key").write_text(malformed, encoding="ascii")
    for source in (source_of(tmp_path / "key"), source_of(lambda: malformed)):
        for look_up in (source.secret, lambda acting, of=source: asyncio.run(of.secret_async(acting))):
            with pytest.raises(SecretUnavailable) as raised:
                look_up(None)
            error: BaseException | None = raised.value
            while error is not None:
                frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
                shown = [str(value) for frame in frames[1:] for value in frame.f_locals.values()]
                assert [text for text in shown if KEY in text] == []
                error = error.__context__

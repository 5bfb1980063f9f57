"""Credentials of a request: exactly one key, in a header."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

import pytest

from keyproxy.auth import credentials
from keyproxy.auth.api_key import KeyFormat
from keyproxy.http_messages import CredentialField, RequestFields, RequestHead, RequestLine
from keyproxy.reasons import Reason, Refusal
from tests import fakes

KEY = fakes.key(1).reveal()
OTHER = fakes.key(2).reveal()
FOREIGN = b"sk-proj-0123456789"
AUTH, X_KEY = b"authorization", b"x-api-key"
TEXT = KEY.decode()


def head(*shown: tuple[bytes, bytes], target: bytes = b"/v1/jobs") -> RequestHead:
    line = RequestLine(b"GET", target, target.partition(b"?")[0], 1, b"", fakes.holds_key(target))
    fields = RequestFields(host=b"a", host_block=b"")
    return RequestHead(line, fields, b"", tuple(CredentialField(*one) for one in shown), 0)


def refused(request: RequestHead) -> Refusal:
    with pytest.raises(Refusal) as error:
        credentials.digest(request)
    return error.value


@pytest.mark.parametrize(
    ("shown", "key"),
    [
        ([(AUTH, b"Api-Key " + KEY)], KEY),
        ([(AUTH, b"API-KEY " + KEY)], KEY),
        ([(AUTH, b"api-key   " + KEY)], KEY),
        ([(AUTH, b"Bearer " + KEY)], KEY),
        ([(AUTH, b"bEARER " + FOREIGN)], FOREIGN),
        ([(X_KEY, KEY)], KEY),
        ([(X_KEY, FOREIGN)], FOREIGN),
        ([(AUTH, b"Api-Key " + KEY), (AUTH, b"Bearer " + KEY)], KEY),
        ([(X_KEY, KEY), (AUTH, b"Bearer " + KEY), (X_KEY, KEY)], KEY),
    ],
)
def test_repeated_identical_key_is_one_credential(shown: list[tuple[bytes, bytes]], key: bytes) -> None:
    assert credentials.digest(head(*shown)) == hashlib.sha256(key).digest()


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ([], Reason.KEY_MISSING),
        ([(AUTH, b"")], Reason.KEY_MISSING),
        ([(AUTH, b"Basic dXNlcjpwYXNz")], Reason.KEY_MISSING),
        ([(AUTH, b"Api-Keys " + KEY)], Reason.KEY_MISSING),
        ([(AUTH, KEY)], Reason.KEY_MISSING),
        ([(AUTH, b"Api-Key")], Reason.KEY_INVALID),
        ([(AUTH, b"Bearer")], Reason.KEY_INVALID),
        ([(AUTH, b"Api-Key\t" + KEY)], Reason.KEY_INVALID),
        ([(AUTH, b"Api-Key " + KEY + b" " + OTHER)], Reason.KEY_INVALID),
        ([(AUTH, b"Api-Key " + KEY + b", Bearer " + OTHER)], Reason.KEY_INVALID),
        ([(X_KEY, b"")], Reason.KEY_INVALID),
        ([(AUTH, b"Api-Key " + KEY), (AUTH, b"Api-Key " + OTHER)], Reason.CREDENTIALS_AMBIGUOUS),
        ([(AUTH, b"Api-Key " + KEY), (X_KEY, OTHER)], Reason.CREDENTIALS_AMBIGUOUS),
        ([(AUTH, b"Api-Key " + KEY), (X_KEY, KEY.lower())], Reason.CREDENTIALS_AMBIGUOUS),
        ([(X_KEY, KEY), (X_KEY, KEY), (X_KEY, OTHER)], Reason.CREDENTIALS_AMBIGUOUS),
        ([(AUTH, b"Basic dXNlcjpwYXNz"), (X_KEY, KEY)], Reason.CREDENTIALS_AMBIGUOUS),
        ([(AUTH, b"Api-Key " + KEY), (X_KEY, b"")], Reason.CREDENTIALS_AMBIGUOUS),
    ],
)
def test_anything_but_one_key_is_refused_without_repeating_it(shown: list[tuple[bytes, bytes]], reason: Reason) -> None:
    refusal = refused(head(*shown))
    assert refusal.reason is reason
    texts = f"{refusal!r} {refusal.args} {refusal.caller_text} {refusal.detail}"
    assert TEXT[8:] not in texts
    assert OTHER.decode()[8:] not in texts


@pytest.mark.parametrize(
    "target",
    [
        f"/{TEXT}",
        f"/hooks/{TEXT}/run",
        f"/?x={TEXT}",
        f"/?{TEXT}",
        f"/{TEXT.upper()}",
        f"/{TEXT.lower()[:24]}",
        f"/{TEXT.replace('_', '%5f')}",
        f"/{TEXT.replace('_', '%5F').replace('k', '%6b')}",
        f"/{quote(TEXT.replace('_', '%5f'))}",
        "/?api_key=secret",
        "/?a=1&API-KEY=secret",
        "/?a=1;apikey=secret",
        "/?ApiKey=secret",
        "/?x_api_key=secret",
        "/?X-Api-Key=secret",
        "/?access_token=secret",
        "/?%61pi%5Fkey=secret",
        "/?%2561pi_key=secret",
        "/a%3Fapi_key=secret",
        "/?api_key=&api_key=secret",
    ],
)
@pytest.mark.parametrize("shown", [(), ((AUTH, b"Api-Key " + KEY),)], ids=["alone", "beside a header"])
def test_a_key_in_the_url_is_refused_even_beside_one_in_a_header(
    target: str, shown: tuple[tuple[bytes, bytes], ...]
) -> None:
    assert refused(head(*shown, target=target.encode())).reason is Reason.KEY_IN_URL


@pytest.mark.parametrize(
    "target",
    [
        "/v1/kp_live_keys",
        "/docs/api_key",
        "/?api_key=",
        "/?api_key",
        "/?api_keys=1&my_api_key=2",
        "/?q=api_key",
        "/?id=kp_live_0123456789abcde",
        "/?a=%",
        "*",
    ],
)
def test_text_that_resembles_a_key_is_allowed_in_the_url(target: str) -> None:
    credentials.digest(head((X_KEY, KEY), target=target.encode()))


@pytest.mark.parametrize(
    ("plaintext", "accepts_foreign", "may_exist"),
    [
        (KEY, True, True),
        (KEY[:-1] + b"!", True, False),
        (KEY[:-1], True, False),
        (FOREIGN, True, True),
        (FOREIGN, False, False),
        (b"a b c d e f", True, False),
    ],
)
def test_key_that_cannot_exist_is_refused_without_a_lookup(
    plaintext: bytes, accepts_foreign: bool, may_exist: bool
) -> None:
    request, key_format = head((X_KEY, plaintext)), KeyFormat(accepts_foreign=accepts_foreign)
    if may_exist:
        assert credentials.checked(request, key_format).digest() == credentials.digest(request)
        return
    with pytest.raises(Refusal) as error:
        credentials.checked(request, key_format)
    assert error.value.reason is Reason.KEY_INVALID


def test_key_in_the_url_is_refused_even_if_a_similar_head_is_cached() -> None:
    request = head((X_KEY, KEY), target=b"/" + KEY)
    request.digest = credentials.digest(head((X_KEY, KEY)))
    assert refused(request).reason is Reason.KEY_IN_URL


def test_no_intermediate_value_displays_the_key() -> None:
    request = head((X_KEY, KEY), target=b"/" + KEY)
    key = credentials.checked(head((X_KEY, KEY)), fakes.FORMAT)
    assert TEXT[8:] not in f"{request!r} {request.credentials!r} {key!r}"


@pytest.mark.parametrize("times", range(1, 12))
def test_a_key_in_the_url_is_found_however_often_its_start_was_encoded(times: int) -> None:
    start = "".join(f"%{sign:02x}" for sign in KEY[:3])
    for _ in range(times - 1):
        start = start.replace("%", "%25")
    assert fakes.holds_key(b"/a/" + start.encode() + KEY[3:])


@pytest.mark.parametrize("target", [b"/a%25252525", b"/?next=%252Fa%252Fb%25", b"/%E2%82%AC?%", b"/a?" + b"%25" * 4000])
def test_repeatedly_encoded_url_without_a_key_is_accepted(target: bytes) -> None:
    assert not fakes.holds_key(target)

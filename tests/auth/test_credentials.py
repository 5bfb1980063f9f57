"""Credentials of a request: exactly one key, in a header."""

from __future__ import annotations

import base64
import hashlib
import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.auth import credentials
from keyproxy.auth.api_key import KeyFormat, masked
from keyproxy.http_messages import CredentialField, RequestFields, RequestHead, RequestLine
from keyproxy.reasons import Reason, Refusal
from tests import fakes
from tests.auth.test_agent_token_format import ASSERTION_HEADER, HEADER, jwt

KEY = fakes.key(1).reveal()
OTHER = fakes.key(2).reveal()
FOREIGN = b"sk-proj-0123456789"
AUTH, X_KEY = b"authorization", b"x-api-key"
TEXT = KEY.decode()
TOKEN = jwt(HEADER, b'{"sub":"u_42","jti":"agt_0"}', bytes(range(64)))
OTHER_TOKEN = jwt(HEADER, b'{"sub":"u_43","jti":"agt_1"}', bytes(range(64, 128)))
ASSERTION = jwt(ASSERTION_HEADER)
#: Signed by another issuer.
THEIRS = jwt(b'{"alg":"HS256","typ":"JWT"}', b"{}", b"s" * 32)


def head(*shown: tuple[bytes, bytes], target: bytes = b"/v1/jobs") -> RequestHead:
    line = RequestLine(b"GET", target, target.partition(b"?")[0], 1, b"", fakes.holds_key(target))
    fields = RequestFields(host=b"a", host_block=b"")
    return RequestHead(line, fields, b"", tuple(CredentialField(*one) for one in shown), 0)


def refused(request: RequestHead) -> Refusal:
    with pytest.raises(Refusal) as error:
        credentials.digest(request, fakes.FORMAT)
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
        ([(AUTH, b"Bearer " + TOKEN)], TOKEN),
        ([(AUTH, b"Api-Key " + TOKEN), (X_KEY, TOKEN)], TOKEN),
    ],
)
def test_repeated_identical_key_is_one_credential(shown: list[tuple[bytes, bytes]], key: bytes) -> None:
    assert credentials.digest(head(*shown), fakes.FORMAT) == hashlib.sha256(key).digest()


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
        ([(AUTH, b"Bearer " + TOKEN), (X_KEY, OTHER_TOKEN)], Reason.CREDENTIALS_AMBIGUOUS),
        ([(AUTH, b"Bearer " + TOKEN), (X_KEY, KEY)], Reason.CREDENTIALS_AMBIGUOUS),
        ([(AUTH, b"Bearer " + TOKEN + b", " + OTHER_TOKEN)], Reason.KEY_INVALID),
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
        f"/{TOKEN.decode()}",
        f"/{TOKEN.decode()[:60]}",
        f"/?x={TOKEN.decode()}&y=1",
        f"/?x={TOKEN.decode().lower()}",
        f"/?x={ASSERTION.decode()}",
        "/?" + "".join(f"%{sign:02x}" for sign in TOKEN),
        "/?" + quote("".join(f"%{sign:02X}" for sign in TOKEN)),
        "/?" + quote(quote("".join(f"%{sign:02X}" for sign in TOKEN[:20]))) + TOKEN.decode()[20:],
        f"/?access_token={THEIRS.decode()}",
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
        f"/?a={THEIRS.decode()}",
        f"/a/{THEIRS.decode()}/b",
        f"/?a={TOKEN.decode()[:40]}",
        "*",
    ],
)
def test_text_that_resembles_a_key_is_allowed_in_the_url(target: str) -> None:
    credentials.digest(head((X_KEY, KEY), target=target.encode()), fakes.FORMAT)


@pytest.mark.parametrize(
    ("plaintext", "accepts_foreign", "may_exist"),
    [
        (KEY, True, True),
        (KEY[:-1] + b"!", True, False),
        (KEY[:-1], True, False),
        (FOREIGN, True, True),
        (FOREIGN, False, False),
        (b"a b c d e f", True, False),
        (b"f" * 512, True, True),
        (b"f" * 513, True, False),
        (TOKEN, True, True),
        (TOKEN, False, True),
        (ASSERTION, False, True),
        (THEIRS, False, True),
        (jwt(b'{"alg":"none"}', signature=b""), False, True),
        (jwt(b'{"typ":"at+jwt"}'), False, False),
        (jwt(b'{"alg":1}', b"", b"")[:-1] + b"a" * (4096 - 14) + b".", False, True),
        (jwt(b'{"alg":1}', b"", b"")[:-1] + b"a" * (4097 - 14) + b".", True, False),
    ],
)
def test_key_that_cannot_exist_is_refused_without_a_lookup(
    plaintext: bytes, accepts_foreign: bool, may_exist: bool
) -> None:
    request, key_format = head((X_KEY, plaintext)), KeyFormat(accepts_foreign=accepts_foreign)
    if may_exist:
        assert credentials.checked(request, key_format).digest() == credentials.digest(request, fakes.FORMAT)
        return
    with pytest.raises(Refusal) as error:
        credentials.checked(request, key_format)
    assert error.value.reason is Reason.KEY_INVALID


def test_a_json_web_token_is_never_a_key_of_another_program() -> None:
    for token in (TOKEN, ASSERTION, THEIRS):
        assert len(token) <= 512
        assert not KeyFormat().may_exist(token)


def holding(credential: bytes, *lines: bytes) -> RequestHead:
    """A request with this credential, and with these lines."""
    made = head((AUTH, b"Bearer " + credential))
    made.block = b"".join(line + b"\r\n" for line in lines)
    return made


SHARED_HEADER = TOKEN.partition(b".")[0]
SIGNATURE = TOKEN.rpartition(b".")[2]


@pytest.mark.parametrize(
    ("line", "is_dropped"),
    [
        (b"Cookie: a=b; session=" + TOKEN + b"; c=d", True),
        (b"Referer: https://h.example/?token=" + TOKEN, True),
        (b"Referer: https://h.example/?token=" + quote(quote(TOKEN)).replace("-", "%2D").encode(), True),
        (b"X-Forwarded-Access-Token: " + TOKEN, True),
        (b"Api-Key: " + TOKEN, True),
        (b"Cookie: sig=" + SIGNATURE, True),
        (b"X-Basic: Basic " + base64.b64encode(b"user:" + TOKEN), True),
        (b"X-Header: " + SHARED_HEADER, False),
        (b"X-Claims: " + TOKEN.rpartition(b".")[0], False),
        (b"Cookie: other=" + OTHER_TOKEN, False),
        (b"Cookie: assertion=" + ASSERTION, False),
        (b"Cookie: session=" + THEIRS, False),
    ],
)
def test_lines_with_the_presented_token_are_dropped_but_not_those_that_share_its_header(
    line: bytes, is_dropped: bool
) -> None:
    request = holding(TOKEN, b"A: 1", line, b"B: 2")
    credentials.digest(request, fakes.FORMAT)
    assert request.block == b"A: 1\r\n" + (b"" if is_dropped else line + b"\r\n") + b"B: 2\r\n"


@pytest.mark.parametrize("token", [TOKEN, THEIRS, jwt(b'{"alg":"HS256","typ":"JWT"}', b"{}", b"a-_" * 20)])
def test_on_a_public_route_the_lines_with_a_token_are_dropped_but_not_those_that_share_its_header(token: bytes) -> None:
    header = b"X-Header: " + token.partition(b".")[0]
    request = holding(token, header, b"Cookie: t=" + token, b"A: 1")
    credentials.discard(request)
    assert request.block == header + b"\r\nA: 1\r\n"


#: Foreign keys of several words: without `_`, with the longest one first, in the middle or last.
_KEYS = st.text(alphabet="aZ09_-.", min_size=16, max_size=70).map(str.encode)


@given(st.sampled_from([KEY, FOREIGN]) | _KEYS)
def test_lines_with_the_longest_word_of_a_key_are_dropped_whatever_the_form_of_the_key(key: bytes) -> None:
    word = max(re.findall(rb"[0-9A-Za-z]+", key), key=len, default=b"")
    shown = word if len(word) >= 16 else key
    request = holding(key, b"A: 1", b"Cookie: a=" + quote(key).encode() + b";", b"X: " + shown, b"B: 2")
    credentials.digest(request, fakes.FORMAT)
    assert request.block == b"A: 1\r\nB: 2\r\n"


@given(
    st.sampled_from([b"Api-Key", b"Bearer", b"api-key", b"BEARER", b"Basic", b"Api-Key:", b"Bearer Bearer", b""]),
    st.text(alphabet=" \t", max_size=3).map(str.encode),
    st.text(alphabet="aZ09_- \t", max_size=12).map(str.strip).map(str.encode),
)
def test_key_is_what_follows_the_scheme_after_spaces_and_contains_no_blank(
    scheme: bytes, blanks: bytes, key: bytes
) -> None:
    value = (scheme + blanks + key).strip(b" \t")
    found = re.fullmatch(rb"(?:api-key|bearer) +([^ \t]+)", value, re.IGNORECASE)
    if found is None:
        assert refused(head((AUTH, value))).reason in {Reason.KEY_INVALID, Reason.KEY_MISSING}
    else:
        assert credentials.digest(head((AUTH, value)), fakes.FORMAT) == hashlib.sha256(found[1]).digest()


def test_key_in_the_url_is_refused_even_if_a_similar_head_is_cached() -> None:
    request = head((X_KEY, KEY), target=b"/" + KEY)
    request.digest = credentials.digest(head((X_KEY, KEY)), fakes.FORMAT)
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


OAUTH = KeyFormat(accepts_access_tokens=True)
ACCESS, REFRESH, SECRET = (
    make(bytes(31) + b"\7").reveal()
    for make in (OAUTH.make_access_token, OAUTH.make_refresh_token, OAUTH.make_client_secret)
)


@pytest.mark.parametrize(
    "shown", [[(AUTH, b"Bearer " + ACCESS)], [(AUTH, b"bEARER   " + ACCESS)], [(AUTH, b"Bearer " + ACCESS)] * 2]
)
def test_access_token_is_a_credential_under_the_bearer_scheme(shown: list[tuple[bytes, bytes]]) -> None:
    request = head(*shown)
    assert credentials.digest(request, OAUTH) == hashlib.sha256(ACCESS).digest()
    assert credentials.checked(request, OAUTH).digest() == request.digest
    assert credentials.has_access_token(request, OAUTH)
    assert not credentials.has_access_token(head((AUTH, b"Bearer " + KEY)), OAUTH)


@pytest.mark.parametrize(
    "shown",
    [
        [(AUTH, b"Api-Key " + ACCESS)],
        [(X_KEY, ACCESS)],
        [(AUTH, b"Bearer " + ACCESS), (X_KEY, ACCESS)],
        [(AUTH, b"Bearer " + ACCESS), (AUTH, b"Api-Key " + ACCESS)],
        *([(AUTH, scheme + b" " + secret)] for scheme in (b"Bearer", b"Api-Key") for secret in (REFRESH, SECRET)),
        *([(X_KEY, secret)] for secret in (REFRESH, SECRET)),
    ],
)
def test_secret_of_oauth_elsewhere_is_refused_even_if_its_digest_is_cached(shown: list[tuple[bytes, bytes]]) -> None:
    """The digest, by which the cache is looked up, does not come to exist."""
    request = head(*shown)
    for attempt in (credentials.digest, credentials.checked):
        with pytest.raises(Refusal) as error:
            attempt(request, OAUTH)
        assert error.value.reason is Reason.KEY_INVALID
    assert request.digest is None
    # What a log line may show of the request is still searched for it.
    assert credentials.shows_key(request, b"x=" + shown[0][1].rpartition(b"_")[2], OAUTH)


@pytest.mark.parametrize("secret", [ACCESS, REFRESH, SECRET, b"kp_live_" + bytes(49).replace(b"\0", b"0")])
def test_any_secret_of_ours_is_found_as_a_password_of_basic_authentication(secret: bytes) -> None:
    """As a client sends its secret to the authorization server (RFC 6749 section 2.3.1)."""
    for password in (b"client:" + secret, secret, b"a:" + secret[:30]):
        text = b'{"authorization": "Basic ' + base64.b64encode(password) + b'"}'
        assert credentials.shows_key(head((AUTH, b"Bearer x")), text, OAUTH)
    assert not credentials.shows_key(head((AUTH, b"Bearer x")), b"Basic " + base64.b64encode(b"client:word"), OAUTH)


@pytest.mark.parametrize("plaintext", [ACCESS[:-1], ACCESS[:-1] + b"!", ACCESS + b"0", ACCESS.replace(b"0", b"1", 1)])
def test_malformed_access_token_is_refused_without_a_lookup(plaintext: bytes) -> None:
    with pytest.raises(Refusal) as error:
        credentials.checked(head((AUTH, b"Bearer " + plaintext)), OAUTH)
    assert error.value.reason is Reason.KEY_INVALID


def test_without_oauth_no_access_token_is_accepted() -> None:
    assert refused(head((AUTH, b"Bearer " + ACCESS))).reason is Reason.KEY_INVALID


@pytest.mark.parametrize("secret", [ACCESS, REFRESH, SECRET])
def test_secrets_of_oauth_are_refused_in_the_url_and_masked(secret: bytes) -> None:
    for target in (
        b"/" + secret,
        b"/?x=" + secret.upper(),
        b"/a?b=" + quote(quote(secret.replace(b"_", b"%5f"))).encode(),
    ):
        assert credentials.holds_key(target, OAUTH)
    assert secret[-20:].decode() not in masked(f"Bearer {secret.decode()}")


@pytest.mark.parametrize("secret", [ACCESS, REFRESH, SECRET])
def test_lines_with_a_presented_access_token_are_dropped(secret: bytes) -> None:
    line = b"Cookie: a=" + secret
    request = holding(ACCESS, line, b"A: 1")
    credentials.digest(request, OAUTH)
    assert request.block == (b"" if secret is ACCESS else line + b"\r\n") + b"A: 1\r\n"

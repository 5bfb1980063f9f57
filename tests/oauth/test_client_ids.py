"""Ids of clients that encode their metadata: one program, one id; one id, one text."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyproxy.oauth.client import AuthMethod, ClientKind, row_id
from keyproxy.oauth.client_ids import decode_value_id, encode_value_id, is_presentable, may_be_registered
from keyproxy.oauth.names import clean_name

URI = "https://acme.example/cb"


def encoded(content: object, **options: object) -> str:
    """An id of any content, canonical or not."""
    text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return "kpc1_" + base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


NAMES = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
WORDS = st.text("abz", max_size=4)
HOSTS = st.sampled_from(["localhost", "localhost:1", "127.0.0.1:65535", "[::1]:8080"])
URIS = st.lists(
    st.one_of(
        st.builds("https://{}a.example/{}?x={}".format, WORDS, WORDS, WORDS),
        st.builds("http://{}/{}".format, HOSTS, WORDS),
        st.builds("com.{}:/{}".format, WORDS, WORDS),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=50)
@given(URIS, NAMES)
def test_id_describes_its_program_and_reads_as_the_same_bytes(uris: list[str], name: str) -> None:
    text = encode_value_id(uris, name)
    client = decode_value_id(text)
    assert client is not None
    assert (client.client_id, client.presented_as, client.kind) == (text, text, ClientKind.VALUE)
    assert client.auth_method is AuthMethod.NONE
    assert encode_value_id(client.redirect_uris, name) == text


@settings(max_examples=50)
@given(URIS, NAMES)
def test_order_repetition_and_loopback_ports_do_not_change_the_id(uris: list[str], name: str) -> None:
    moved = [uri.replace("localhost:1", "localhost:7").replace("[::1]:8080", "[::1]") for uri in reversed(uris)]
    assert encode_value_id([*uris, uris[0]], name) == encode_value_id(moved, name)


@given(st.text(max_size=60))
def test_no_other_text_is_an_id(text: str) -> None:
    client = decode_value_id("kpc1_" + text)
    assert client is None or encode_value_id(client.redirect_uris, client.name) == "kpc1_" + text


@given(NAMES)
def test_cleaning_a_name_twice_changes_nothing(name: str) -> None:
    cleaned = clean_name(name)
    assert clean_name(cleaned) == cleaned
    assert cleaned == cleaned.strip()


def test_name_has_no_control_and_no_bidirectional_characters() -> None:
    assert clean_name(" Acme\n\t\u202eemcA\u2066\u200b \0 App\u00a0\ud800\U000e0041 ") == "Acme emcA App"


GOOD = {"name": "Acme", "redirect_uris": [URI]}


@pytest.mark.parametrize(
    "text",
    [
        "kpc1_",
        "kpc1_!",
        "kpc1_A",
        "KPC1_" + encoded(GOOD)[5:],
        encoded(GOOD) + "=",
        encoded(GOOD) + "\n",
        encoded(json.dumps(GOOD)),  # spaces
        encoded({"redirect_uris": [URI], "name": "Acme"}),  # order
        encoded({**GOOD, "extra": 1}),
        encoded({"redirect_uris": [URI]}),
        encoded({"name": None, "redirect_uris": [URI]}),
        encoded({"name": 1, "redirect_uris": [URI]}),
        encoded({"name": " Acme", "redirect_uris": [URI]}),
        encoded({"name": "Ac\u202eme", "redirect_uris": [URI]}),
        encoded({"name": "A" * 201, "redirect_uris": [URI]}),
        encoded({"name": "Acme", "redirect_uris": []}),
        encoded({"name": "Acme", "redirect_uris": URI}),
        encoded({"name": "Acme", "redirect_uris": [1]}),
        encoded({"name": "Acme", "redirect_uris": [URI, URI]}),
        encoded({"name": "Acme", "redirect_uris": ["https://b.example/", "https://a.example/"]}),
        encoded({"name": "Acme", "redirect_uris": ["http://localhost:1/"]}),
        encoded({"name": "Acme", "redirect_uris": ["javascript:alert(1)"]}),
        encoded({"name": "Acme", "redirect_uris": ["http://acme.example/"]}),
        encoded({"name": "Acme", "redirect_uris": ["cursor://x"]}),
        encoded({"name": "", "redirect_uris": [f"https://a.example/{number}" for number in range(10, 21)]}),
        encoded('{"name":"Acme","name":"Acme","redirect_uris":["https://acme.example/cb"]}'),
        encoded('{"name":"\\u0041cme","redirect_uris":["https://acme.example/cb"]}'),
        encoded("[" * 1_400),
        encoded("[]"),
        encoded("1e999"),
        "kpc1_" + base64.urlsafe_b64encode(b'{"name":"\xff"}').decode().rstrip("="),
        "kpc1_" + "A" * 2_000,
    ],
)
def test_text_that_is_not_canonical_is_no_id(text: str) -> None:
    assert decode_value_id(text) is None


def test_stray_bits_at_the_end_of_an_id_make_it_another_text() -> None:
    text = next(
        one
        for one in (encode_value_id([URI], "A" * length) for length in range(4))
        if len(one.removeprefix("kpc1_")) % 4
    )
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    altered = text[:-1] + digits[digits.index(text[-1]) + 1]
    assert decode_value_id(text) is not None
    assert decode_value_id(altered) is None


def test_scheme_of_a_known_client_is_valid_in_an_id_while_that_client_is_known() -> None:
    text = encode_value_id(["cursor://anysphere.cursor-mcp/cb"], "Cursor")
    assert decode_value_id(text, {"cursor"}) is not None
    assert decode_value_id(text) is None


def test_program_without_a_name_is_shown_by_its_host() -> None:
    client = decode_value_id(encode_value_id([URI], ""))
    assert client is not None
    assert client.name == "acme.example"


@pytest.mark.parametrize(
    ("client_id", "presentable", "registrable"),
    [
        ("worker", True, True),
        ("a" * 2_000, True, True),
        ("a" * 2_001, False, False),
        ("", False, False),
        ("wörker", False, False),
        ("a\nb", False, False),
        ("kpc1_worker", True, False),
        ("https://acme.example/c", True, False),
        ("https:x", True, False),
        ("listed:Claude", True, False),
    ],
)
def test_operators_register_ids_that_do_not_describe_themselves(
    client_id: str, presentable: bool, registrable: bool
) -> None:
    assert (is_presentable(client_id), may_be_registered(client_id)) == (presentable, registrable)


def test_row_id_is_made_of_the_client_id() -> None:
    assert row_id("listed:Claude") == row_id("listed:Claude")
    assert len(row_id("")) == len("cli_") + 32

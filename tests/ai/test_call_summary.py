"""The approver of a call sees what it does, without secrets, in a bounded size that PostgreSQL can store."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai.tools.call_summary import SUMMARY_BYTES_MAX, CalledWith, call_summary, is_secret_name
from keyproxy.ai.tools.canonical_json import CanonicalJson
from keyproxy.ai.tools.tool import HUMAN, Tool
from keyproxy.http.headers import FieldNames
from keyproxy.http_messages import RequestHead
from keyproxy.model import AgentToken
from keyproxy.wire.parsing.head_cache import RequestReader
from tests import fakes
from tests.ai.test_canonical_json import VALUES

PAY = Tool("call_partner", "call_partner", approval=HUMAN)
KEY = fakes.key(7).reveal().decode()


def head(target: str = "/pay") -> RequestHead:
    raw = f"POST {target} HTTP/1.1\r\nHost: proxy.test\r\n\r\n".encode("latin-1")
    return RequestReader(FieldNames(), lambda _target: False).read(raw, len(raw) - 4)


def written(arguments: bytes, *, target: str = "/pay") -> bytes:
    sent = CalledWith(arguments, b"application/json", CanonicalJson(arguments).whole())
    return call_summary(
        fakes.identity(),
        PAY,
        head(target),
        sent,
        digest=b"d" * 32,
        client="192.0.2.1",
        holds_key=fakes.FORMAT.is_within,
    )


def shown(value: object) -> object:
    return json.loads(written(json.dumps({"v": value}).encode()))["arguments"]["v"]


def test_summary_names_the_caller_and_the_call() -> None:
    agent = dataclasses.replace(
        fakes.identity(), agent_token=AgentToken("agt_1", ("cleaner", "boss"), 2), actor_user_id="u_service"
    )
    sent = CalledWith(b'{"amount": 100}', b"application/json", b'{"amount":100}')
    summary = call_summary(
        agent, PAY, head("/pay?dry=1"), sent, digest=b"\xab" * 32, client=None, holds_key=fakes.FORMAT.is_within
    )
    assert json.loads(summary) == {
        "tool": "call_partner", "kind": "human", "user": "u_42", "tenant": "acme", "agent": "cleaner", "is_test": False,
        "client": None, "method": "POST", "path": "/pay", "query": "dry=1", "body_bytes": 15, "digest": "ab" * 32,
        "actor": "u_service", "arguments": {"amount": 100}, "truncated": False,
    }  # fmt: skip


def test_body_of_another_media_type_is_shown_as_type_length_and_digest() -> None:
    sent = CalledWith(b"\0" * 100_000, b"application/zip", None)
    summary = json.loads(
        call_summary(fakes.identity(), PAY, head(), sent, digest=b"", client=None, holds_key=fakes.FORMAT.is_within)
    )
    assert summary["media_type"] == "application/zip"
    assert summary["body_bytes"] == 100_000
    assert len(summary["body_sha256"]) == 64
    assert summary["truncated"] is False
    assert "arguments" not in summary


@pytest.mark.parametrize(
    "name",
    ["password", "user_password", "Passwd", "secret", "clientSecret", "token", "access-token", "X-Auth-Token", "tokens",
     "Authorization", "proxy_authorization", "api_key", "apiKey", "X-Api-Key", "API KEY", "private_key", "credentials"],
)  # fmt: skip
def test_values_under_names_of_secrets_are_masked(name: str) -> None:
    for value in ("hunter2", ["hunter2", {"a": "hunter2"}], {"a": "hunter2]}"}, 'hunter2"\\'):
        summary = written(json.dumps({"z": 1, "deep": [{name: value}], name: value}).encode())
        assert b"hunter2" not in summary
        assert json.loads(summary)["arguments"]["z"] == 1
        assert json.loads(summary)["arguments"][name] == "[masked]"
    pair = written(json.dumps([{"name": name, "value": "hunter2"}, {"key": "a", "value": "seen"}]).encode())
    assert b"hunter2" not in pair
    assert b"seen" in pair
    assert b"hunter2" not in written(b"{}", target=f"/pay?a=1&{name.replace(' ', '%20')}=hunter2&b=2")


def test_names_that_only_resemble_secrets_are_shown() -> None:
    assert not any(is_secret_name(name) for name in ("pass", "key", "path", "author", "tok", ""))
    assert json.loads(written(b'{"max_tokens": 100}'))["arguments"] == {"max_tokens": 100}
    assert json.loads(written(b"{}", target="/pay?a=1&b=token"))["query"] == "a=1&b=token"


@pytest.mark.parametrize("text", [KEY, f"use {KEY} now", KEY.upper(), f"x{KEY[:40]}"])
def test_strings_that_hold_a_key_are_masked_wherever_they_are(text: str) -> None:
    for arguments in ({"a": text}, {text: "a"}, [text], {"a": {"b": [text, {"c": text}]}}, {"a": "x" * 5_000 + text}):
        summary = written(json.dumps(arguments).encode())
        assert KEY[:30].lower() not in summary.decode().lower()
        assert b"[masked]" in summary
    assert KEY.encode() not in written(b"{}", target=f"/pay?a={KEY}")
    assert KEY.encode() not in written(b"{}", target=f"/pay/{KEY}")


def test_two_masked_names_do_not_hide_each_other() -> None:
    other = fakes.key(8).reveal().decode()
    arguments = json.loads(written(json.dumps({KEY: 1, other: 2}).encode()))["arguments"]
    assert sorted(arguments.values()) == [1, 2]


def test_long_strings_are_cut_before_members_are_left_out() -> None:
    summary = json.loads(written(json.dumps({"a": "x" * 20_000, "b": "y" * 500, "c": 3}).encode()))
    assert summary["truncated"] is True
    assert summary["arguments"]["a"].startswith("xxx")
    assert summary["arguments"]["b"] == "y" * 500
    assert summary["arguments"]["c"] == 3
    whole = json.loads(written(json.dumps({"a": "x" * 5_000}).encode()))
    assert whole["truncated"] is False
    assert len(whole["arguments"]["a"]) == 5_000


@pytest.mark.parametrize(
    "arguments",
    [
        b'{"a":"' + b"x" * 4_000_000 + b'"}',
        b'{"' + b"x" * 4_000_000 + b'":1}',
        b"[" + b"[]," * 500_000 + b"0]",
        b"[" + b'{"a":[1,2,"\\n\\u0001"]},' * 20_000 + b"0]",
        b'{"password":[' + b"[]," * 500_000 + b'0],"z":1}',
        b"[" * 60 + b'"' + b'\\u00e9' * 9_000 + b'"' + b"]" * 60,
        b"[" + b"1e99," * 5_000 + b"0]",
        b'["' + b"\\u0001" * 9_000 + b'"]',
        b"[" + b'"' + b"x" * 7_650 + b'",12345678901234567890]',
    ],
    ids=range(9),
)  # fmt: skip
def test_summary_of_any_size_is_valid_json_within_its_bound_and_marked_as_truncated(arguments: bytes) -> None:
    summary = written(arguments)
    assert len(summary) <= SUMMARY_BYTES_MAX - 200
    assert len(as_printed_by_postgresql(summary)) <= SUMMARY_BYTES_MAX
    assert json.loads(summary)["truncated"] is True


def as_printed_by_postgresql(summary: bytes) -> bytes:
    """With one space after each colon and comma, and numbers without exponents."""

    def plain(number: str) -> int:
        return int(float(number))

    return json.dumps(json.loads(summary, parse_float=plain), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        ("0.1000000000000000055", "0.1000000000000000055"),
        ("-1000000.00000000001", "-1000000.00000000001"),
        ("1.23456789012345671e3", "1.23456789012345671e3"),
        ("0.30000000000000004", 0.30000000000000004),
        ("12345678901234567890123", 12345678901234567890123),
        ("0.12345678901234", 0.12345678901234),
        ("-12.5e3", -12.5e3),
    ],
)
def test_no_number_is_shown_rounded(number: str, shown: object) -> None:
    assert json.loads(written(b"[%b]" % number.encode()))["arguments"] == [shown]


@pytest.mark.parametrize("number", ["1e400", "1e-400", "1E131072", "1" * 100, "-0.000e999"])
def test_numbers_that_postgresql_would_expand_are_shown_as_strings(number: str) -> None:
    assert json.loads(written(b"[%b]" % number.encode()))["arguments"] in ([number], [f"{number[:64]}…"])


def test_nul_characters_which_postgresql_cannot_store_are_spelt_out() -> None:
    assert shown("a\0b") == "a\\u0000b"
    assert b"\\u0000" not in written(b'{"a\\u0000":"\\u0000"}').replace(b"\\\\u0000", b"")


@given(value=st.lists(VALUES))
def test_short_arguments_are_shown_unchanged(value: list[object]) -> None:
    text = json.dumps(value)
    if re.search(r"token|\\u0000|[eE][-+]?[0-9]{3}|[0-9.]{60}", text) or len(text) > 5_000:
        return
    got = json.loads(written(text.encode()))
    assert got["truncated"] is False
    assert json.dumps(got["arguments"], sort_keys=True) == json.dumps(value, sort_keys=True)


def test_summary_is_within_its_bound_at_every_place_where_it_can_be_cut() -> None:
    for length in range(7_560, 7_700, 3):
        for value in (b"123", b"1e9", b'"ab"', b"[[1]]", b'{"a":"b"}', b'{"token":1}', b'"\\u0001"', '"é"'.encode()):
            summary = written(b'["' + b"x" * length + b'",' + value + b"," + value + b"]")
            assert len(summary) <= SUMMARY_BYTES_MAX - 200
            assert json.loads(summary)["arguments"]

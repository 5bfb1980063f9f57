"""Equal JSON has one canonical form, different JSON another one, and ambiguous JSON has none."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai.tools.call_digest import canonical_params
from keyproxy.ai.tools.canonical_json import CanonicalJson
from keyproxy.reasons import Reason, Refusal


def canonical(text: bytes) -> bytes:
    return CanonicalJson(text).whole()


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (b"{}", b"{}"),
        (b"[]", b"[]"),
        (b' { "b" : [ 1 , 2 , [ ] , { } ] , "a" : null } \n', b'{"a":null,"b":[1,2,[],{}]}'),
        (b'{"a":1,"A":2,"":3,"aa":4}', b'{"":3,"A":2,"a":1,"aa":4}'),
        (b'{"n":[1.0,1.00,1e2,1E2,-0,0,12345678901234567890123]}',
         b'{"n":[1.0,1.00,1e2,1E2,-0,0,12345678901234567890123]}'),
        (b'{"s":"\\u0041\\/\\u00e9\\ud83d\\ude00\\n"}', '{"s":"A/é😀\\n"}'.encode()),
        (b'{"\\u0061":true}', b'{"a":true}'),
    ],
)  # fmt: skip
def test_members_are_sorted_space_and_escapes_removed_and_numbers_kept_as_written(text: bytes, form: bytes) -> None:
    assert canonical(text) == form
    assert canonical(form) == form


@pytest.mark.parametrize(
    "text",
    [
        b"", b"1", b'"a"', b"null", b"{", b"[", b"{]", b"[}", b"{}{}", b"[] 1", b'{"a"}', b'{"a":}', b'{"a":1,}', b"[1,]",
        b"[1 2]", b"[1,2 ,]", b'["a",]', b"[,1]", b'{,"a":1}', b'{"a":1 "b":2}', b"{a:1}", b"[01]", b"[1.]", b"[+1]",
        b"[NaN]",
        b"[Infinity]", b"[tru]", b'["\x01"]', b'["\\x"]', b'["\\u12"]', b'["a', b"[/**/1]", b"[-]", b"\xef\xbb\xbf[]",
        b'{"a":1,"a":1}', b'{"a":1,"\\u0061":2}', b'[[{"b":[{"x":1,"y":2,"x":3}]}]]', b'{"a\\u0000":1,"a\\u0000":2}',
        b'["\\ud800"]', b'["\\udc00"]', b'["\\ud800\\u0041"]', b'{"\\udfff":1}', b'["\\ude00\\ud83d"]',
    ],
)  # fmt: skip
def test_malformed_json_repeated_names_and_lone_surrogates_are_refused(text: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        canonical(text)
    assert refused.value.reason is Reason.REQUEST_MALFORMED


def test_json_is_nested_at_most_64_levels_deep() -> None:
    assert canonical(b"[" * 64 + b"]" * 64) == b"[" * 64 + b"]" * 64
    with pytest.raises(Refusal):
        canonical(b"[" * 65 + b"]" * 65)


def test_an_object_has_at_most_16384_members() -> None:
    members = [b'"%d":0' % number for number in range(16_385)]
    assert canonical(b"{" + b",".join(members[:-1]) + b"}").count(b":") == 16_384
    with pytest.raises(Refusal):
        canonical(b"{" + b",".join(members) + b"}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(value=st.dictionaries(st.text(), VALUES) | st.lists(VALUES))
def test_canonical_form_is_the_same_value_and_the_same_for_every_spelling(value: object) -> None:
    form = canonical(json.dumps(value, ensure_ascii=True, indent=1).encode())
    assert canonical(json.dumps(value, ensure_ascii=False).encode()) == form
    assert json.loads(form) == value


@given(text=st.binary(max_size=40) | st.text(alphabet='{}[]",:01.e-\\u \ntrue', max_size=40).map(str.encode))
def test_accepted_text_is_unambiguous_json(text: bytes) -> None:
    try:
        form = canonical(text)
    except Refusal:
        return
    assert json.loads(form.decode("latin-1")) == json.loads(text.decode("latin-1"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_meta_members_of_the_transport_are_left_out_only_where_they_are_meta() -> None:
    bare = canonical_params(b'{"name":"pay","arguments":{"_meta":{"traceparent":1}}}').whole()
    assert b"traceparent" in bare
    for meta in (
        b"{}", b'{"progressToken":7}', b'{"baggage":1,"tracestate":"x","traceparent":"y"}',
        b'{"io.modelcontextprotocol/clientInfo":{"name":"a"}, "io.modelcontextprotocol/protocolVersion":"2"}',
    ):  # fmt: skip
        params = b'{"_meta":%b,"name":"pay","arguments":{"_meta":{"traceparent":1}}}' % meta
        assert canonical_params(params).whole() == bare, meta
    for meta in (b'{"tenant":1}', b'{"progressToken":1,"a":{"progressToken":1}}', b"[]", b"null", b'{"Traceparent":1}'):
        params = b'{"_meta":%b,"name":"pay","arguments":{"_meta":{"traceparent":1}}}' % meta
        assert canonical_params(params).whole() != bare, meta
    nested = b'{"a":{"_meta":{"progressToken":1}}}'
    assert canonical_params(nested).whole() == nested


def test_a_long_text_is_read_in_short_portions() -> None:
    reader = CanonicalJson(b"[" + b",".join([b"[{}]"] * 100_000) + b"]")
    portions = 1
    longest = 0.0
    began = time.thread_time()
    while not reader.advance():
        portions += 1
        now = time.thread_time()
        longest, began = max(longest, now - began), now
    assert portions > 100
    assert longest < 0.1


def test_a_vector_of_numbers_is_read_in_few_portions() -> None:
    reader = CanonicalJson(b'{"v":[' + b"0.25, " * 500_000 + b"1]}")
    assert reader.advance()
    assert reader.members[b'"v"'].startswith(b"[0.25,0.25,")

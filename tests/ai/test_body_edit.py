"""The proxy changes a body only by the output cap and the request for a stream's usage; all other bytes stay."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai.requests.body_edit import cap_member, edited, edits_of, pieces
from keyproxy.ai.requests.inflation import Deflation
from tests.ai.requests_support import HELLO, endpoint, reading


def capped(
    body: bytes | dict[str, Any], dialect: str = "openai", *, cap: int | None = 5, adds_usage: bool = False,
    cap_field: str = "", path: bytes | None = None,
) -> bytes:  # fmt: skip
    found = reading(body, dialect, path)
    assert found.facts is not None
    assert found.facts.parts is not None
    member = None if cap is None else (cap_member(endpoint(dialect, path), cap_field), cap)
    return edited(found.content, edits_of(found.facts.parts, cap=member, adds_usage=adds_usage))


@pytest.mark.parametrize(
    ("dialect", "body", "new"),
    [
        ("openai", b'{"model":"m"}', b'{"max_completion_tokens":5,"model":"m"}'),
        ("openai", b' { }', b' {"max_completion_tokens":5 }'),
        ("openai", b'{"max_completion_tokens":null,"a":1}', b'{"max_completion_tokens":5,"a":1}'),
        ("openai", b'{"max_tokens":null}', b'{"max_completion_tokens":5,"max_tokens":null}'),
        ("anthropic", b'{"a":[1.50,"\\u00e4"]}', b'{"max_tokens":5,"a":[1.50,"\\u00e4"]}'),
        ("gemini", b'{"contents":[]}', b'{"generationConfig":{"maxOutputTokens":5},"contents":[]}'),
        ("gemini", b'{"generationConfig":{}}', b'{"generationConfig":{"maxOutputTokens":5}}'),
        ("gemini", b'{"generationConfig": { "x":1}}', b'{"generationConfig": {"maxOutputTokens":5, "x":1}}'),
        ("gemini", b'{"generation_config":{"x":1}}', b'{"generation_config":{"maxOutputTokens":5,"x":1}}'),
        ("gemini", b'{"generation_config":{"max_output_tokens": null }}',
         b'{"generation_config":{"max_output_tokens": 5 }}'),
        ("gemini", b'{"generationConfig":null}', b'{"generationConfig":{"maxOutputTokens":5}}'),
        ("ollama", b'{"options":{"num_predict":-1,"seed":1}}', b'{"options":{"num_predict":5,"seed":1}}'),
        ("ollama", b'{"model":"m"}', b'{"options":{"num_predict":5},"model":"m"}'),
        ("bedrock", b'{"messages":[]}', b'{"inferenceConfig":{"maxTokens":5},"messages":[]}'),
        ("bedrock", b'{"inferenceConfig":{"topP":1}}', b'{"inferenceConfig":{"maxTokens":5,"topP":1}}'),
    ],
)  # fmt: skip
def test_a_cap_is_inserted_and_nothing_else_changes(dialect: str, body: bytes, new: bytes) -> None:
    assert capped(body, dialect) == new


@pytest.mark.parametrize(
    ("body", "new"),
    [
        (b'{"stream":true}', b'{"stream_options":{"include_usage":true},"stream":true}'),
        (b' {\n "prompt":"a"}', b' {"stream_options":{"include_usage":true},\n "prompt":"a"}'),
        (b'{"a":[12345678901234567890,1.50,"\\u00e4"],"stream_options": null }',
         b'{"a":[12345678901234567890,1.50,"\\u00e4"],"stream_options": {"include_usage":true} }'),
        (b'{"stream_options":{ }}', b'{"stream_options":{"include_usage":true }}'),
        (b'{"stream_options":{"x":false}}', b'{"stream_options":{"include_usage":true,"x":false}}'),
        (b'{"stream_options":{"x":[{}],"include_usage" : false},"\xc3\xa4":"}"}',
         b'{"stream_options":{"x":[{}],"include_usage" : true},"\xc3\xa4":"}"}'),
        (b'{"a":{"stream_options":{}},"stream_options":{"x":1}}',
         b'{"a":{"stream_options":{}},"stream_options":{"include_usage":true,"x":1}}'),
    ],
)  # fmt: skip
def test_usage_is_requested_of_a_stream_and_nothing_else_changes(body: bytes, new: bytes) -> None:
    assert capped(body, cap=None, adds_usage=True) == new


def test_both_edits_are_made_at_once() -> None:
    assert (
        capped(b'{"a":1,"stream_options":{},"b":2}', adds_usage=True)
        == b'{"max_completion_tokens":5,"a":1,"stream_options":{"include_usage":true},"b":2}'
    )
    assert capped(b"{}", adds_usage=True) == b'{"stream_options":{"include_usage":true},"max_completion_tokens":5}'


@pytest.mark.parametrize(
    ("path", "cap_field", "member"),
    [
        (None, "", "max_completion_tokens"), (None, "max_tokens", "max_tokens"),
        (b"/v1/responses", "max_tokens", "max_output_tokens"), (b"/v1/completions", "", "max_tokens"),
    ],
)  # fmt: skip
def test_a_route_selects_the_member_for_older_servers(path: bytes | None, cap_field: str, member: str) -> None:
    assert json.loads(capped(HELLO, cap_field=cap_field, path=path)) == {**HELLO, member: 5}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
COUNTING = ("n", "model", "models", "stream", "prompt", "best_of")
options = st.none() | st.fixed_dictionaries({}, optional={"include_usage": st.none() | st.just(False), "{x": values})


@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name.partition("\0")[0].strip().casefold() not in COUNTING),
        values, max_size=4,
    ),
    st.fixed_dictionaries({}, optional={"stream_options": options, "max_completion_tokens": st.none()}),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_new_body_is_the_same_json_but_for_the_cap_and_the_usage(
    others: dict[str, Any], given_members: dict[str, Any], indent: int | None, is_ascii: bool, random: Any
) -> None:
    members = list({**others, **given_members}.items())
    random.shuffle(members)
    try:
        body = json.dumps(dict(members), indent=indent, ensure_ascii=is_ascii).encode()
    except UnicodeEncodeError:
        return
    if b"\\ud" in body:
        return  # half a surrogate pair is no text
    new = capped(body, adds_usage=True)
    wanted = {
        **dict(members),
        "max_completion_tokens": 5,
        "stream_options": {**(given_members.get("stream_options") or {}), "include_usage": True},
    }
    assert json.loads(new) == wanted


@pytest.mark.parametrize("bits", [31, 15, -15])
@pytest.mark.parametrize("size", [10, 65_536, 300_000])
def test_a_compressed_body_is_compressed_again_in_portions(bits: int, size: int) -> None:
    body = json.dumps({"a": "x" * size}).encode()
    found = reading(body).facts
    assert found is not None
    assert found.parts is not None
    edits = edits_of(found.parts, cap=(("max_tokens",), 5), adds_usage=False)
    deflation = Deflation(pieces(body, edits), bits)
    portions = 1
    while not deflation.advance():
        portions += 1
    assert portions > size // 65_536
    assert zlib.decompress(deflation.body, wbits=bits) == edited(body, edits)


@pytest.mark.parametrize("size", [0, 65_500, 65_536, 65_600])
def test_a_body_of_any_length_is_edited_alike(size: int) -> None:
    body, edits = b"{" + b"x" * size + b"}", [(1, 1, b'"a":1,'), (1, 1, b""), (size + 1, size + 1, b',"b":2')]
    assert edited(body, edits) == b'{"a":1,' + b"x" * size + b',"b":2}' == b"".join(pieces(body, edits))

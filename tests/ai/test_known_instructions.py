"""Instructions that were read before are those that reading the request again would find."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.judged_request import JudgedRequest
from keyproxy.ai.categories import Category, CategoryRules, parse_category_source
from keyproxy.ai.prompts import SHAPES, counting_paths, instruction_members
from keyproxy.http_messages import RequestFields, RequestHead, RequestLine
from keyproxy.reasons import Refusal

each_shape = pytest.mark.parametrize("shape", SHAPES)


def judging_templates(shape: str) -> AccessRules:
    return AccessRules(
        "r", categories=CategoryRules([parse_category_source("template")], [Category("code")], shape=shape)
    )


def outcome(rules: AccessRules, body: bytes) -> tuple[object, ...]:
    """The instructions of a request, or its refusal."""
    line = RequestLine(b"POST", b"/x", b"/x", 1, b"")
    head = RequestHead(
        line, RequestFields(host=b"p", host_block=b"", media_type=b"application/json"), b"", (), len(body)
    )
    try:
        judged = JudgedRequest(rules, head)
        while not judged.read(head, body):
            pass
    except Refusal as refusal:
        return refusal.reason, refusal.caller_text, refusal.detail
    assert judged.values is not None
    found = judged.values.instructions
    assert found is not None
    return found.digest, found.fault


#: Texts of JSON; None: the member is absent.
ROLES = st.sampled_from(
    ['"user"', '"user"', '"us\\u0065r"', '"assistant"', '"model"', '"system"', '"User"', '"user "', '"user\\\\"', "null",
     '["user"]', '{"role":"user"}', "1", "1e999", None]
)  # fmt: skip
CONTENTS = st.sampled_from(
    ['"A"', '"B"', '"\\u0041"', '""', '"\\u0000"', '"\\ud800"', '[{"type":"text","text":"A"}]', '[{"text":"A"}]',
     '{"text":"A"}', '["A",{"role":"user","content":"A"}]', '{"role":"user","parts":[{"text":"A"}]}', "[]", "{}", "null",
     "7", "[7,8]", "[1e999]", '[{"type":"image_url","text":"A"}]', '"e\u0301"', None]
)  # fmt: skip
EXTRAS = st.sampled_from(
    [None, None, None, '"type":"x"', '"n":1e999', '"n":-0.5E+400', '"n":1e3', f'"n":{"9" * 310}', '"x":{"role":"user"}',
     '"x":[{"role":"user","content":"A"}]', '"x":[1,2]', '"Role":"user"', '"id":"p"', '"version":"1"', '"role":"user"']
)  # fmt: skip
SPACES = st.sampled_from(["", "", " ", "\r\n\t"])


@st.composite
def objects(draw: st.DrawFn, content: str) -> str:
    """The text of an object that may be a message."""
    members = [
        f'"{name}":{value}'
        for name, value in (
            ("role", draw(ROLES)),
            (content, draw(CONTENTS)),
            ("text", draw(st.sampled_from([None, '"A"']))),
        )
        if value is not None
    ]
    extra = draw(EXTRAS)
    members += [] if extra is None else [extra]
    members = draw(st.permutations(members))
    space = draw(SPACES)
    return "{" + space + f",{space}".join(members) + space + "}"


@st.composite
def bodies(draw: st.DrawFn, shape: str) -> bytes:
    """A document with members of the shape that may be anything."""
    content = "parts" if shape == "gemini" else "content"
    entries = st.one_of(objects(content), objects(content), objects(content), CONTENTS.map(lambda text: text or "true"))
    arrays = st.tuples(SPACES, st.lists(entries, max_size=4)).map(
        lambda pair: f"[{pair[0]}" + f"{pair[0]},{pair[0]}".join(pair[1]) + f"{pair[0]}]"
    )
    values = st.one_of(arrays, arrays, entries)
    names = sorted({path[0] for path in counting_paths(shape)} | {"x", "tools"})
    members = draw(st.lists(st.tuples(st.sampled_from(names), values), max_size=3, unique_by=lambda pair: pair[0]))
    text = "{" + ",".join(f'"{name}":{value}' for name, value in members) + "}"
    return draw(st.sampled_from([text, text, text, f"[{text}]", f" {text}\n"])).encode("utf-8")


@each_shape
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_kept_instructions_are_those_of_every_request_that_has_them(shape: str, data: st.DataObject) -> None:
    warm = judging_templates(shape)
    for body in data.draw(st.lists(bodies(shape), min_size=2, max_size=6)):
        expected = outcome(judging_templates(shape), body)
        assert outcome(warm, body) == expected
        assert outcome(warm, body) == expected


SYSTEM, USER = '{"role":"system","content":"A"}', '{"role":"user","content":"a"}'
MANY_DIGITS = "9" * 310

#: Messages besides an instruction that is known, and what else is in the document.
HOSTILE_MESSAGES = [
    "1",
    "1,2",
    "null",
    "true",
    '"A"',
    "[]",
    f"[{USER}]",
    "[1,2]",
    "{}",
    f'{{"x":{USER}}}',
    '{"role":"User","content":"a"}',
    '{"role":"user ","content":"a"}',
    '{"role":"us\\u0065r","content":"a"}',
    '{"role":"user\\u0000","content":"a"}',
    '{"role":["user"],"content":"a"}',
    '{"role":{"role":"user"},"content":"a"}',
    '{"role":null,"content":"a"}',
    '{"content":"a"}',
    '{"content":"a","role":"user"}',
    '{"type":"x"}',
    '{"type":"x","role":"user"}',
    '{"role":"user","content":1e999}',
    '{"role":"user","n":-0.5E+400}',
    '{"role":"user","n":9e308}',
    '{"role":"user","n":[1e999]}',
    f'{{"role":"user","n":{MANY_DIGITS}}}',
    f'{{"role":"user","content":{SYSTEM}}}',
    f'{{"role":"user","content":[{SYSTEM}]}}',
    '{"role":"system","content":[7,8]}',
    '{"role":"system","content":[{"type":"text","text":"A"}]}',
    '{"role":"system"}',
    '{"role":"user","content":"\\ud800"}',
    '{"role":"user","role":"system","content":"A"}',
    '{"Role":"user","content":"a"}',
]
HOSTILE_MEMBERS = [
    '"x":1e999',
    '"x":[1e999,2]',
    '"instructions":null',
    '"instructions":""',
    '"instructions":"B"',
    '"instructions":7',
    '"instructions":{"text":"B"}',
    '"prompt":"text"',
    '"prompt":{}',
    '"prompt":{"id":"p","version":"1"}',
    '"prompt":[{"id":"p"}]',
    '"input":"B"',
    '"input":7',
    '"input":null',
    '"input":true',
    f'"input":{USER}',
    f'"input":{SYSTEM}',
    f'"input":[{SYSTEM}]',
    f'"input":[[{SYSTEM}]]',
    '"input":[1]',
    '"input":[1,2,3]',
    '"Messages":[]',
]
HOSTILE_BODIES = [
    *(f'{{"messages":[{message},{SYSTEM}]}}' for message in HOSTILE_MESSAGES),
    *(f'{{"messages":[{SYSTEM},{message}]}}' for message in HOSTILE_MESSAGES),
    *(f'{{"messages":[{message}]}}' for message in HOSTILE_MESSAGES),
    *(f'{{"messages":{message}}}' for message in HOSTILE_MESSAGES),
    *(f'{{"messages":[{SYSTEM}],{member}}}' for member in HOSTILE_MEMBERS),
    *(f"{{{member}}}" for member in HOSTILE_MEMBERS),
    f'[{{"messages":[{SYSTEM}]}}]',
    "[]",
    f"[{SYSTEM}]",
    '"A"',
    "{}",
    f'{{"messages":[{SYSTEM},{SYSTEM}]}}',
    "",
]


def test_hostile_requests_after_usual_ones_are_read_as_if_they_came_first() -> None:
    warm = judging_templates("openai")
    for body in (f'{{"messages":[{SYSTEM},{USER}]}}', f'{{"messages":[{USER}]}}'):
        outcome(warm, body.encode())
    for body in HOSTILE_BODIES:
        expected = outcome(judging_templates("openai"), body.encode())
        assert outcome(warm, body.encode()) == expected, body
        assert outcome(warm, body.encode()) == expected, body


MEMBERS: dict[str, tuple[str, str, str]] = {
    "openai": ("messages", "content", "system"), "anthropic": ("messages", "content", "system"),
    "gemini": ("contents", "parts", "system"),
}  # fmt: skip


def conversation(shape: str, instruction: str, text: str) -> bytes:
    entries, content, role = MEMBERS[shape]

    def content_of(text: str) -> Any:
        return [{"text": text}] if shape == "gemini" else text

    messages = [
        {"role": role, content: content_of(instruction)},
        *({"role": "user", content: content_of(one)} for one in text),
    ]
    return json.dumps({"max": 50, entries: messages}).encode()


@each_shape
def test_requests_that_differ_in_the_text_of_the_user_share_their_instructions(shape: str) -> None:
    rules = judging_templates(shape)
    first = outcome(rules, conversation(shape, "Be brief.", "a"))
    kept = repr(rules.known)
    assert kept.startswith("KnownInstructions(1,")
    assert outcome(rules, conversation(shape, "Be brief.", "bc")) == first
    assert repr(rules.known) == kept
    assert outcome(rules, conversation(shape, "Be long.", "a")) != first
    assert repr(rules.known).startswith("KnownInstructions(2,")


@pytest.mark.parametrize(("characters", "count"), [(1, 1_024), (10_000, 104), (20_000, 0)])
def test_kept_instructions_are_bounded_in_number_and_bytes(characters: int, count: int) -> None:
    rules, most = judging_templates("openai"), 0
    for number in range(1_200 if characters == 1 else 120):
        outcome(rules, conversation("openai", f"{number:04}" + "x" * characters, "a"))
        most = max(most, int(repr(rules.known).partition("(")[2].partition(",")[0]))
    assert most == count


@each_shape
def test_every_member_with_instructions_counts(shape: str) -> None:
    members = instruction_members(shape)
    counting = set(counting_paths(shape))
    assert {(name,) for name in (*members.whole, *members.stored, *members.entries)} <= counting
    assert {(*name, "role") for entry in members.entries for name in ((entry,), (entry, "*"))} <= counting


@pytest.mark.parametrize("source", ["header:X-Category", "json:/category"])
def test_instructions_are_parsed_where_other_values_are_read_too(source: str) -> None:
    sources = [parse_category_source(text) for text in ("template", source)]
    assert AccessRules("r", categories=CategoryRules(sources, [Category("code")], shape="openai")).known is None

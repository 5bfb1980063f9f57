"""A template is identified by what the upstream obeys, so no spelling hides an instruction from its digest."""

from __future__ import annotations

import copy
import hashlib
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai import prompts
from keyproxy.ai.prompts import SHAPES, counting_paths, instructions_of, prompt_text, stored_prompt_text
from keyproxy.reasons import Reason, Refusal

ROLES = {
    "openai": ("user", "assistant", "tool", "function"),
    "anthropic": ("user", "assistant"),
    "gemini": ("user", "model", "function"),
}

USER = {
    "openai": {"role": "user", "content": "hello"},
    "anthropic": {"role": "user", "content": "hello"},
    "gemini": {"role": "user", "parts": [{"text": "hello"}]},
}
ENTRIES = {"openai": "messages", "anthropic": "messages", "gemini": "contents"}


def digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()


EMPTY = hashlib.sha256(b"").digest()


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def registered(shape: str, document: dict[str, Any]) -> bytes | None:
    """The digest by which a document's instructions are looked up; None if they are unregistered whatever it is."""
    found = instructions_of(shape, document)
    return found.digest if found.is_registrable else None


@pytest.mark.parametrize(
    ("shape", "document", "texts"),
    [
        ("openai", {"messages": [{"role": "system", "content": "Be brief."}, USER["openai"]]}, ["Be brief."]),
        ("openai", {"messages": [{"role": "developer", "content": "A"}, {"role": "system", "content": "B"}]}, ["A", "B"]),
        ("openai", {"messages": [USER["openai"]]}, []),
        ("openai", {}, []),
        ("openai", {"messages": []}, []),
        ("openai", {"messages": None, "instructions": None, "input": None, "prompt": None}, []),
        ("openai", {"instructions": "A", "input": "user text"}, ["A"]),
        ("openai", {"instructions": "A", "input": [{"role": "developer", "content": "B"}]}, ["A", "B"]),
        ("openai", {"input": [{"role": "developer", "content": "B"}], "instructions": "A"}, ["B", "A"]),
        (
            "openai",
            {"input": [{"role": "system", "content": [{"type": "input_text", "text": "A"}]}], "messages": []},
            ["A"],
        ),
        ("openai", {"messages": [{"role": "system", "content": parts("A", "", "B")}]}, ["A", "B"]),
        ("openai", {"messages": [{"role": "system", "content": ""}]}, []),
        ("openai", {"messages": [{"role": role, "content": role} for role in ROLES["openai"]]}, []),
        ("openai", {"prompt": {"id": "pmpt_1", "version": "2"}}, ["\0pmpt_1:2"]),
        ("openai", {"instructions": "A", "prompt": {"id": "pmpt_1", "version": "2"}}, ["A", "\0pmpt_1:2"]),
        ("openai", {"prompt": "complete this"}, []),
        ("openai", {"input": "A"}, []),
        ("openai", {"prompt": ["complete", "these"]}, []),
        (
            "openai",
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "42"}, {"type": "item_reference"}]},
            [],
        ),
        ("openai", {"messages": [{"content": "no role"}]}, ["no role"]),
        ("anthropic", {"system": "A", "messages": [USER["anthropic"]]}, ["A"]),
        ("anthropic", {"system": parts("A", "B"), "messages": [{"role": "system", "content": "C"}]}, ["A", "B", "C"]),
        ("anthropic", {"messages": [{"role": "tool", "content": "C"}]}, ["C"]),
        ("anthropic", {"messages": [{"role": role, "content": role} for role in ROLES["anthropic"]]}, []),
        (
            "anthropic",
            {"system": [{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}}]},
            ["A"],
        ),
        ("gemini", {"systemInstruction": {"parts": [{"text": "A"}, {"text": "B"}]}}, ["A", "B"]),
        ("gemini", {"system_instruction": {"role": "system", "parts": {"text": "A"}}}, ["A"]),
        ("gemini", {"systemInstruction": "A"}, ["A"]),
        ("gemini", {"systemInstruction": [{"text": "A"}]}, ["A"]),
        ("gemini", {"contents": [{"role": role, "parts": [{"text": role}]} for role in ROLES["gemini"]]}, []),
        ("gemini", {"contents": [{"role": "system", "parts": [{"text": "A"}]}]}, ["A"]),
        ("gemini", {"contents": {"role": "system", "parts": {"text": "A"}}}, ["A"]),
        ("gemini", {"contents": {"role": "user", "parts": {"text": "A"}}}, []),
        ("gemini", {"contents": [{"parts": [{"text": "no role"}]}]}, ["no role"]),
    ],
)  # fmt: skip
def test_digest_is_of_the_instruction_texts_in_document_order(
    shape: str, document: dict[str, Any], texts: list[str]
) -> None:
    found = instructions_of(shape, document)
    assert found.is_registrable
    assert found.digest == (digest(*texts) if texts else EMPTY)


@pytest.mark.parametrize(
    ("shape", "document"),
    [
        ("openai", {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("openai", {"messages": [{"role": "system", "content": [*parts("A"), {"type": "file", "file": {}}]}]}),
        ("openai", {"messages": [{"role": "system", "content": [{"type": "image_url", "text": "A"}]}]}),
        ("openai", {"messages": [{"role": "system", "content": [{"text": "A", "image_url": "x"}]}]}),
        ("openai", {"messages": [{"role": "system", "content": [{"type": None, "text": "A"}]}]}),
        ("openai", {"messages": [{"role": "system", "content": [{"type": "text", "text": None}]}]}),
        ("openai", {"messages": [{"role": "system", "content": [["A"]]}]}),
        ("openai", {"messages": [{"role": "system", "content": {"text": "A"}}]}),
        ("openai", {"messages": [{"role": "system", "content": 7}]}),
        ("openai", {"messages": [{"role": "system", "content": None}]}),
        ("openai", {"messages": [{"role": "system"}]}),
        ("openai", {"messages": [{"role": "system", "type": "function_call_output"}]}),
        ("openai", {"messages": ["A"]}),
        ("openai", {"messages": "SYSTEM: A"}),
        ("openai", {"messages": [[{"role": "system", "content": "A"}]]}),
        ("openai", {"messages": 7}),
        ("openai", {"input": {"text": "A"}}),
        ("openai", {"instructions": 7}),
        ("openai", {"instructions": {"text": "A"}}),
        ("openai", {"instructions": [{"role": "system", "content": "A"}]}),
        ("openai", {"prompt": {"id": "pmpt_1"}}),
        ("openai", {"prompt": {"id": "pmpt_1", "version": None}}),
        ("openai", {"prompt": {"id": "pmpt_1", "version": ""}}),
        ("openai", {"prompt": {"id": "pmpt_1", "version": 2}}),
        ("openai", {"prompt": {"version": "2"}}),
        ("openai", {"prompt": {"id": "a:b", "version": "c"}}),
        ("openai", {"prompt": {"id": "a", "version": "b:c"}}),
        ("openai", {"prompt": {}}),
        ("anthropic", {"system": [{"type": "image", "source": {}}]}),
        ("anthropic", {"system": {"type": "text", "text": "A"}}),
        ("anthropic", {"messages": "A"}),
        ("gemini", {"systemInstruction": {"parts": [{"inlineData": {"mimeType": "image/png", "data": "A"}}]}}),
        ("gemini", {"systemInstruction": {"parts": [{"text": "A", "inlineData": {}}]}}),
        ("gemini", {"systemInstruction": {"parts": [{"text": "A", "fileData": {}}]}}),
        ("gemini", {"systemInstruction": {}}),
        ("gemini", {"systemInstruction": {"parts": 7}}),
        ("gemini", {"contents": "A"}),
        ("gemini", {"cachedContent": "cachedContents/1"}),
        ("gemini", {"cached_content": "cachedContents/1"}),
    ],
)
def test_instructions_that_cannot_be_read_as_text_are_unregistered(shape: str, document: dict[str, Any]) -> None:
    found = instructions_of(shape, document)
    assert not found.is_registrable
    assert found.fault


@pytest.mark.parametrize(
    ("shape", "document"),
    [
        ("openai", {"instructions": "a\0b"}),
        ("openai", {"messages": [{"role": "system", "content": "\0"}]}),
        ("openai", {"messages": [{"role": "system", "content": parts("a", "b\0")}]}),
        ("openai", {"prompt": {"id": "a\0", "version": "1"}}),
        ("openai", {"prompt": {"id": "a", "version": "\0"}}),
        ("openai", {"instructions": "\ud800"}),
        ("anthropic", {"system": "a\0b"}),
        ("gemini", {"systemInstruction": {"parts": [{"text": "a\0b"}]}}),
        ("gemini", {"systemInstruction": {"parts": [{"text": "A"}]}, "system_instruction": {"parts": [{"text": "A"}]}}),
        ("gemini", {"systemInstruction": None, "system_instruction": None}),
    ],
)  # fmt: skip
def test_nul_in_an_instruction_and_two_spellings_of_one_are_malformed(shape: str, document: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as error:
        instructions_of(shape, document)
    assert error.value.reason is Reason.REQUEST_MALFORMED


def test_text_of_instructions_cannot_imitate_a_stored_prompt() -> None:
    stored = instructions_of("openai", {"prompt": {"id": "pmpt_1", "version": "2"}})
    for text in ("pmpt_1:2", " pmpt_1:2"):
        assert registered("openai", {"instructions": text}) != stored.digest
    assert stored_prompt_text("pmpt_1", "2") == "\0pmpt_1:2"


each_shape = pytest.mark.parametrize("shape", SHAPES)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def document_of(shape: str, role: object, content: object) -> dict[str, Any]:
    """A document with one user's message and one of any role."""
    member = "parts" if shape == "gemini" else "content"
    return {ENTRIES[shape]: [USER[shape], {"role": role, member: content}]}


def _other_spellings(role: str) -> st.SearchStrategy[object]:
    return st.sampled_from(
        [role.upper(), role.title(), f" {role}", f"{role} ", f"{role}\n", f"{role}\u200b", f"\ufeff{role}", role[:-1],
         role + "s", role.replace("e", "\u0435"), role.replace("o", "\u03bf"), role.replace("s", "\u017f"), [role],
         {"role": role}, None, "", 0, True]
    ).filter(lambda other: other != role)  # fmt: skip


@each_shape
@given(data=st.data())
def test_no_other_spelling_of_a_role_hides_an_instruction(shape: str, data: st.DataObject) -> None:
    role = data.draw(st.one_of([texts, *map(_other_spellings, ROLES[shape])]))
    if role in ROLES[shape]:
        return
    text = data.draw(texts)
    assert registered(shape, document_of(shape, role, text)) == (digest(text) if text else EMPTY)


@each_shape
@given(
    role=st.sampled_from(["system", "System", "SYSTEM", " system", "developer", "Developer", "root", None]), text=texts
)
def test_spelling_of_an_instruction_role_does_not_change_the_digest(shape: str, role: str | None, text: str) -> None:
    system = registered(shape, document_of(shape, "system", text))
    assert registered(shape, document_of(shape, role, text)) == system


@each_shape
@given(text=texts.filter(bool), other=st.data())
def test_text_of_instructions_is_hashed_as_sent(shape: str, text: str, other: st.DataObject) -> None:
    changed = other.draw(
        st.sampled_from(
            [f" {text}", f"{text} ", f"{text}\n", f"{text}\u200b", text.upper(), text.replace(" ", "  "),
             unicodedata.normalize("NFD", text), unicodedata.normalize("NFKC", text)]
        )
    )  # fmt: skip
    before, after = (registered(shape, document_of(shape, "system", one)) for one in (text, changed))
    assert (before == after) is (text == changed)


@each_shape
@given(given_texts=st.lists(texts, max_size=4))
def test_one_text_and_its_parts_are_joined_by_nul(shape: str, given_texts: list[str]) -> None:
    content: object = parts(*given_texts)
    if shape == "gemini":
        content = [{"text": text} for text in given_texts]
    non_empty = [text for text in given_texts if text]
    assert registered(shape, document_of(shape, "system", content)) == (digest(*non_empty) if non_empty else EMPTY)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "type", "x"]), inner),
    max_leaves=6,
)


@each_shape
@given(extra=st.dictionaries(texts, JSON_VALUES, max_size=3), front=st.booleans())
def test_other_members_of_a_request_leave_the_digest_as_it_is(shape: str, extra: dict[str, Any], front: bool) -> None:
    read = {path[0] for path in counting_paths(shape)}
    others = {name: value for name, value in extra.items() if name not in read}
    document = document_of(shape, "system", "A")
    both = {**others, **document} if front else {**document, **others}
    assert registered(shape, both) == digest("A")


@given(order=st.permutations(["instructions", "messages", "input", "prompt"]))
def test_reordered_members_never_have_the_digest_of_other_texts(order: list[str]) -> None:
    values = {
        "instructions": "A",
        "messages": [{"role": "system", "content": "B"}],
        "input": [{"role": "system", "content": "C"}],
        "prompt": {"id": "p", "version": "1"},
    }
    expected = {"instructions": "A", "messages": "B", "input": "C", "prompt": "\0p:1"}
    found = registered("openai", {name: values[name] for name in order})
    assert found == digest(*[expected[name] for name in order])


@each_shape
@given(content=JSON_VALUES)
def test_content_of_any_form_is_read_or_unregistered(shape: str, content: object) -> None:
    """Whatever stands at the place of an instruction: if it has text, its digest is not that of none."""
    found = registered(shape, document_of(shape, "system", content))
    if found == EMPTY:
        assert not _texts_in(content)


def _texts_in(content: object) -> list[str]:
    if isinstance(content, str):
        return [content] if content else []
    if isinstance(content, list):
        return [text for one in content for text in _texts_in(one)]
    if isinstance(content, dict):
        return [text for one in content.values() for text in _texts_in(one)]
    return []


@pytest.mark.parametrize(
    ("shape", "paths"),
    [
        ("openai", ["messages", "messages.*.role", "messages.*.content", "messages.*.content.*.text", "instructions",
                    "input.*.role", "input.*.content.*.type", "prompt", "prompt.id", "prompt.version"]),
        ("anthropic", ["system", "system.*.text", "messages.*.role", "messages.*.content.*.text"]),
        ("gemini", ["systemInstruction", "system_instruction.parts.*.text", "systemInstruction.parts.text",
                    "contents.*.role", "contents.*.parts.*.text", "contents.parts.text", "cachedContent"]),
    ],
)  # fmt: skip
def test_every_name_that_decides_on_the_digest_counts(shape: str, paths: list[str]) -> None:
    counting = {".".join(path) for path in counting_paths(shape)}
    assert set(paths) <= counting


@each_shape
def test_reading_does_not_change_the_document(shape: str) -> None:
    document = document_of(shape, "system", "A")
    before = copy.deepcopy(document)
    instructions_of(shape, document)
    prompt_text(shape, document)
    assert document == before


@pytest.mark.parametrize(
    ("shape", "document", "expected"),
    [
        (
            "openai",
            {
                "instructions": "a",
                "messages": [
                    {"role": "system", "content": "b"},
                    {"role": "user", "content": [*parts("c"), {"type": "image_url", "image_url": {"url": "data:x"}}]},
                    {"role": "assistant", "tool_calls": [{"id": "no", "function": {"name": "f", "arguments": "d"}}]},
                    {"role": "tool", "tool_call_id": "no", "content": "e"},
                ],
                "tools": [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {
                    "properties": {"x": {"type": "string", "description": "g"}}}}}],
            },
            "abcdefg",
        ),
        ("openai", {"input": "a"}, "a"),
        ("openai", {"input": [{"type": "function_call_output", "output": "a"}, {"role": "user", "content": "b"}]}, "ab"),
        ("openai", {"prompt": "a"}, "a"),
        ("openai", {"prompt": {"id": "no", "version": "no", "variables": {"x": "a", "y": {"text": "b"}}}}, "ab"),
        (
            "anthropic",
            {
                "system": parts("a"),
                "messages": [
                    {"role": "user", "content": [
                        {"type": "document", "title": "b", "source": {"type": "text", "data": "c"}},
                        {"type": "image", "source": {"type": "base64", "data": "no"}},
                        {"type": "tool_result", "tool_use_id": "no", "content": [{"type": "text", "text": "d"}]},
                    ]},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "no", "input": {"q": ["e"]}}]},
                ],
            },
            "abcde",
        ),
        (
            "gemini",
            {
                "system_instruction": {"parts": {"text": "a"}},
                "contents": [
                    {"role": "user", "parts": [{"text": "b"}, {"inlineData": {"data": "no"}}]},
                    {"role": "model", "parts": [{"functionCall": {"name": "no", "args": {"q": "c"}}}]},
                    {"role": "function", "parts": [{"functionResponse": {"name": "no", "response": {"r": ["d"]}}}]},
                ],
            },
            "abcd",
        ),
    ],
)  # fmt: skip
def test_prompt_text_is_that_of_every_role_without_files_and_ids(
    shape: str, document: dict[str, Any], expected: str
) -> None:
    assert "".join(prompt_text(shape, document)) == expected


def test_shapes_are_those_of_the_configuration() -> None:
    assert prompts.SHAPES == ("openai", "anthropic", "gemini")

"""The prompt of an AI request: its instructions, whose digest identifies a template, and all of its text.

Instructions are what the upstream obeys before the user's turn. They are found by exclusion: a message is the user's or
the model's only if its role is spelled exactly as the API spells it, so no other spelling escapes the digest. The texts
are hashed as sent, without normalisation: another text has another digest, and an unknown digest has no category.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, NamedTuple

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.scanning.instruction_spans import InstructionMembers
from keyproxy.mypyc_compat import mypyc_attr

#: Types of parts that hold text, in APIs that name the type.
_TEXT_TYPES: Final = frozenset({"text", "input_text", "output_text"})

#: Members of a text part without a type. With any other, a server might not read the part as text.
_TEXT_PART: Final = frozenset({"text", "thought", "thoughtSignature", "thought_signature", "cache_control"})

#: Members whose value is prompt text, or contains some in members of these names.
_TEXT_MEMBERS: Final = frozenset(
    {
        "arguments", "code", "codeExecutionResult", "code_execution_result", "content", "context", "executableCode",
        "executable_code", "function", "functionCall", "functionResponse", "function_call", "function_response", "input",
        "output", "parts", "reasoning_content", "refusal", "source", "summary", "text", "thinking", "title", "tool_calls",
    }
)  # fmt: skip

#: Members that hold objects of any form. All strings in them are prompt text.
_FREE_MEMBERS: Final = frozenset({"args", "input", "response", "variables"})

_NUL: Final = "\0"


class _Shape(NamedTuple):
    """Where an API has its prompt.

    `instructions`: members that are instructions. `entries`: members with messages; those with one of `roles` are not
    instructions. `content`: the member of a message with its text. `stored`: the member that names a stored prompt.
    `by_reference`: members that name content stored upstream, which may include instructions. `has_items`: an entry
    without role and content is an item of another kind, such as the output of a tool. `text_input`: the member that may
    be a string, which is the user's; some servers take a string of messages for the whole prompt.
    """

    instructions: tuple[str, ...]
    entries: tuple[str, ...]
    roles: frozenset[str]
    content: str = "content"
    stored: str = ""
    by_reference: tuple[str, ...] = ()
    has_items: bool = False
    text_input: str = ""


_SHAPES: Final[dict[str, _Shape]] = {
    "openai": _Shape(
        instructions=("instructions",),
        entries=("messages", "input"),
        roles=frozenset({"user", "assistant", "tool", "function"}),
        stored="prompt",
        has_items=True,
        text_input="input",
    ),
    "anthropic": _Shape(
        instructions=("system",), entries=("messages",), roles=frozenset({"user", "assistant"})
    ),
    "gemini": _Shape(
        instructions=("systemInstruction", "system_instruction"),
        entries=("contents",),
        roles=frozenset({"user", "model", "function"}),
        content="parts",
        by_reference=("cachedContent", "cached_content"),
    ),
}  # fmt: skip

#: Values of `[[routes]].prompt`.
SHAPES: Final = tuple(_SHAPES)


@mypyc_attr(acyclic=True)
class Instructions:
    """The instructions of one request.

    `fault`: why they cannot be registered, for the log; empty if they can. `digest` then covers what could be read.
    """

    __slots__ = ("digest", "fault")

    def __init__(self, digest: bytes, fault: str = "") -> None:
        self.digest: Final = digest
        self.fault: Final = fault

    @property
    def is_registrable(self) -> bool:
        """Whether the digest stands for all of the instructions; if not, they are unregistered, whatever the digest."""
        return not self.fault

    def __repr__(self) -> str:
        return f"Instructions({self.digest.hex()}, {self.fault!r})"


def counting_paths(shape: str) -> tuple[tuple[str, ...], ...]:
    """The paths of members that decide what the instructions are; `*` is every element of an array.

    The path of an array of objects is also listed without `*`: Gemini accepts one object in its place.
    """
    row = _SHAPES[shape]
    paths: list[tuple[str, ...]] = [(name,) for name in row.by_reference]
    contents: list[tuple[str, ...]] = [(name,) for name in row.instructions]
    if row.content == "parts":
        contents += [(name, row.content) for name in row.instructions]
    for name in row.entries:
        paths += [(name,), (name, "*", "role"), (name, "role")]
        contents += [(name, "*", row.content), (name, row.content)]
    for content in contents:
        paths += [content, *[(*content, *element, name) for element in ((), ("*",)) for name in ("type", "text")]]
    if row.stored:
        paths += [(row.stored,), (row.stored, "id"), (row.stored, "version")]
    return tuple(paths)


def instruction_members(shape: str) -> InstructionMembers:
    """The members that decide what the instructions are, for the scan. All of them are among `counting_paths`."""
    row = _SHAPES[shape]
    stored = (row.stored,) if row.stored else ()
    roles = frozenset([role.encode("ascii") for role in row.roles])
    return InstructionMembers((*row.instructions, *row.by_reference), stored, row.entries, roles)


def instructions_of(shape: str, document: dict[str, Any]) -> Instructions:
    """The instructions of a request. Raises a Refusal (REQUEST_MALFORMED)."""
    row = _SHAPES[shape]
    reading = _InstructionReading(row)
    given = [name for name in row.instructions if name in document]
    if len(given) > 1:
        raise malformed(f"The request has both '{given[0]}' and '{given[1]}'.", given[1])
    for name, value in document.items():
        if value is None:
            continue
        if name in row.instructions:
            reading.add_content(value)
        elif name == row.text_input and isinstance(value, str):
            continue  # of the user
        elif name in row.entries:
            reading.add_entries(value)
        elif name in row.by_reference:
            reading.fault = f"'{name}' refers to content that is stored upstream"
        elif row.stored and name == row.stored and isinstance(value, dict):
            reading.add_stored(value)
    return reading.instructions()


def stored_prompt_text(prompt_id: str, version: str) -> str | None:
    """The instruction text for a version of a stored prompt; None if id and version could not be distinguished in it."""
    if not prompt_id or not version or ":" in prompt_id or ":" in version:
        return None
    return f"{_NUL}{prompt_id}:{version}"


def digest_of(texts: list[str]) -> bytes:
    """The digest of instruction texts: SHA-256 of the non-empty ones, joined by NUL. Raises UnicodeEncodeError."""
    return hashlib.sha256(_NUL.join([text for text in texts if text]).encode("utf-8")).digest()


class _InstructionReading:
    """Collects the instruction texts of one document."""

    def __init__(self, row: _Shape) -> None:
        self.fault = ""
        self._row: Final = row
        self._texts: list[str] = []

    def instructions(self) -> Instructions:
        """The instructions read so far. Raises a Refusal."""
        try:
            return Instructions(digest_of(self._texts), self.fault)
        except UnicodeEncodeError as error:
            raise malformed("An instruction text is not well-formed Unicode.") from error

    def add_content(self, content: object) -> None:
        """Add a string, an array of text parts or, where the API has `parts`, an object with them."""
        if isinstance(content, str):
            self._add_text(content)
        elif isinstance(content, list):
            for part in content:
                self._add_part(part)
        elif isinstance(content, dict) and self._row.content == "parts":
            parts = content.get("parts")
            if "text" in content or isinstance(parts, dict):
                self._add_part(content if parts is None else parts)
            elif isinstance(parts, list):
                self.add_content(parts)
            else:
                self.fault = "instructions are neither a string nor text parts"
        else:
            self.fault = "instructions are neither a string nor text parts"

    def add_entries(self, entries: object) -> None:
        """Add the messages that are not the user's or the model's."""
        if isinstance(entries, list):
            for entry in entries:
                self._add_entry(entry)
        elif isinstance(entries, dict):
            self._add_entry(entries)
        else:
            self.fault = "the messages are not an array of objects"

    def add_stored(self, prompt: dict[str, Any]) -> None:
        """Add a prompt that is stored upstream."""
        prompt_id, version = prompt.get("id"), prompt.get("version")
        if not isinstance(prompt_id, str) or not isinstance(version, str):
            self.fault = "the stored prompt has no id or no version"
            return
        self._refuse_nul(prompt_id)
        self._refuse_nul(version)
        text = stored_prompt_text(prompt_id, version)
        if text is None:
            self.fault = "the id or version of the stored prompt is empty or contains ':'"
        else:
            self._texts.append(text)

    def _add_entry(self, entry: object) -> None:
        if not isinstance(entry, dict):
            self.fault = "a message is not an object"
            return
        role = entry.get("role")
        if isinstance(role, str) and role in self._row.roles:
            return
        name = self._row.content
        if self._row.has_items and "role" not in entry and name not in entry and isinstance(entry.get("type"), str):
            return
        content = entry.get(name)
        # Parts may be a single object; content is not.
        if isinstance(content, dict) and name == "parts":
            self._add_part(content)
        else:
            self.add_content(content)

    def _add_part(self, part: object) -> None:
        text = _part_text(part)
        if text is None:
            self.fault = "an instruction has a part that is not text"
        else:
            self._add_text(text)

    def _add_text(self, text: str) -> None:
        self._refuse_nul(text)
        self._texts.append(text)

    def _refuse_nul(self, text: str) -> None:
        if _NUL in text:
            raise malformed("An instruction text contains the character NUL.")


def _part_text(part: object) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return None
    text = part.get("text")
    if not isinstance(text, str):
        return None
    is_text = part["type"] in _TEXT_TYPES if isinstance(part.get("type"), str) else part.keys() <= _TEXT_PART
    return text if is_text else None


def prompt_text(shape: str, document: dict[str, Any]) -> list[str]:
    """All text that the model reads: of every role, of tools and their output. Not the contents of files."""
    row = _SHAPES[shape]
    found: list[str] = []
    for name in (*row.instructions, *row.entries, row.stored):
        if name and name in document:
            _collect(document[name], found)
    for name in ("tools", "functions"):
        if name in document:
            _collect_descriptions(document[name], found)
    return found


def _collect(value: object, found: list[str]) -> None:
    if isinstance(value, str):
        if value:
            found.append(value)
    elif isinstance(value, list):
        for element in value:
            _collect(element, found)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in _FREE_MEMBERS and isinstance(inner, dict):
                _collect_all(inner, found)
            elif name in _TEXT_MEMBERS or (name == "data" and value.get("type") == "text"):
                _collect(inner, found)


def _collect_all(value: object, found: list[str]) -> None:
    if isinstance(value, str):
        if value:
            found.append(value)
    elif isinstance(value, list):
        for element in value:
            _collect_all(element, found)
    elif isinstance(value, dict):
        for inner in value.values():
            _collect_all(inner, found)


def _collect_descriptions(value: object, found: list[str]) -> None:
    if isinstance(value, list):
        for element in value:
            _collect_descriptions(element, found)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name == "description" and isinstance(inner, str):
                found.append(inner)
            else:
                _collect_descriptions(inner, found)

"""Binds: ids in a request that must belong to its key, user or tenant.

An id that does not is refused and never rewritten, and the refusal is the same for a foreign and an unknown id.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.access.judged_values import Found, JudgedValues
from keyproxy.ai.access.object_ids import is_object_id
from keyproxy.ai.access.tenant_records import TenantRecords
from keyproxy.ai.access.value_sources import ValueSource
from keyproxy.model import Identity
from keyproxy.reasons import Reason, Refusal

IS: Final = "is"
STARTS: Final = "starts"
OWNED: Final = "owned"
RULES: Final = (IS, STARTS, OWNED)

REFUSE: Final = "refuse"
ALLOW: Final = "allow"

_PLACEHOLDER: Final = re.compile(r"\{([a-z]*)\}")
_LITERAL: Final = re.compile(r"[A-Za-z0-9._:@|+~/=,!$-]*")
_KIND: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")

#: Ids of tenants, users and keys do not contain these, so that no id is the beginning of another one.
_SEPARATORS: Final = "/~,=!$"
_OWNERS: Final = ("tenant", "user", "key")


class Bind:
    """One bind of a route. `rule`: IS, STARTS or OWNED; `text`: its value as configured.

    `accepts_missing`: a request without the value is accepted.
    """

    __slots__ = ("_pieces", "accepts_missing", "rule", "source", "text")

    def __init__(self, source: ValueSource, rule: str, text: str, *, accepts_missing: bool = False) -> None:
        self.source: Final = source
        self.rule: Final = rule
        self.text: Final = text
        self.accepts_missing: Final = accepts_missing
        #: Literal texts and names of owners, alternating.
        self._pieces: Final = tuple(_PLACEHOLDER.split(text))

    def holds(self, found: Found, identity: Identity, records: TenantRecords) -> bool:
        """Whether the values at the source satisfy the bind."""
        if found.is_other or (found.is_missing and not self.accepts_missing):
            return False
        if self.rule == OWNED:
            return all(is_object_id(value) and records.owns(self.text, value) for value in found.values)
        wanted = self._wanted(identity)
        if self.rule == IS:
            return all(value == wanted and is_object_id(value) for value in found.values)
        # Equal to it is not enough: the value names something within.
        return all(
            value.startswith(wanted) and len(value) > len(wanted) and is_object_id(value) for value in found.values
        )

    def _wanted(self, identity: Identity) -> str:
        owners = {"tenant": identity.tenant_id, "user": identity.user_id, "key": identity.key_id}
        return "".join([owners[piece] if place % 2 else piece for place, piece in enumerate(self._pieces)])


def judge_binds(binds: tuple[Bind, ...], values: JudgedValues, identity: Identity, records: TenantRecords) -> None:
    """Raise a Refusal (NAMESPACE_FORBIDDEN) unless all binds hold. `records.require` has to be called after it."""
    for bind in binds:
        if not bind.holds(values.at(bind.source.text), identity, records):
            raise Refusal(
                Reason.NAMESPACE_FORBIDDEN, f"{bind.source.text} does not satisfy {bind.rule} = {bind.text!r}"
            )


def rule_fault(rule: str, text: str) -> str | None:
    """What is wrong with the value of a bind's rule."""
    if rule == OWNED:
        return None if _KIND.fullmatch(text) else "must be a kind of ids: a-z, 0-9, _ and -, at most 64"
    pieces = _PLACEHOLDER.split(text)
    unknown = [name for name in pieces[1::2] if name not in _OWNERS]
    if unknown or "{" in "".join(pieces[::2]):
        return f"has an unknown placeholder; known: {', '.join(f'{{{name}}}' for name in _OWNERS)}"
    if len(pieces) == 1:
        return "has no placeholder, so that it would be the same for every tenant"
    if not all(_LITERAL.fullmatch(piece) for piece in pieces[::2]):
        return "has a character that no bound value may contain"
    for place, after in enumerate(pieces[2::2], start=1):
        is_last = 2 * place == len(pieces) - 1
        if not (after[:1] and after[0] in _SEPARATORS) and not (rule == IS and is_last and not after):
            return (
                f"must continue with one of {' '.join(_SEPARATORS)} after each placeholder, because ids may contain other"
                " characters"
            )
    return None

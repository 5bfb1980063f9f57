"""The refusal of a document that could not be scanned."""

from __future__ import annotations

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.scanning.json_bounds import TooDenseError
from keyproxy.ai.scanning.member_scope import PROTOTYPE, AmbiguousNameError
from keyproxy.ai.scanning.request_parts import DoubledNameError
from keyproxy.reasons import Refusal


def refusal_of(fault: Exception) -> Refusal:
    """The refusal for a fault that `RequestScanner.advance` raised. It names the member, never its value."""
    if isinstance(fault, TooDenseError):
        return malformed(f"The body exceeds {fault}, which is {fault.bound}.")
    if isinstance(fault, AmbiguousNameError):
        if str(fault).encode() == PROTOTYPE:
            return malformed(f"'{fault}' could replace a member that counts.")
        return malformed(f"'{fault}' is spelled with capitals or with look-alike letters.", str(fault))
    if isinstance(fault, DoubledNameError):
        return malformed(f"'{fault}' appears twice.", str(fault))
    return malformed(f"The body is not well-formed JSON in UTF-8: {fault}.")

"""The result of an import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keyproxy_client.django.importing.old_keys import Problem


@dataclass(slots=True)
class ImportReport:
    """Keys that were imported, were there already, were revoked since the last import; users created; problems."""

    imported: int = 0
    present: int = 0
    revoked: int = 0
    users: int = 0
    written: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, other: ImportReport) -> None:
        """Add another part of the same import."""
        self.imported += other.imported
        self.present += other.present
        self.revoked += other.revoked
        self.users += other.users
        self.written += other.written
        self.problems += other.problems

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "imported": self.imported,
            "present": self.present,
            "revoked": self.revoked,
            "users": self.users,
            "written": self.written,
            "problems": [{"place": one.place, "problem": one.problem} for one in self.problems],
        }

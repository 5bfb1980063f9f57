"""Old keys as a file for `keyproxy key import`."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from keyproxy_client.django.importing.old_keys import OldKey
from keyproxy_client.django.importing.report import ImportReport

COLUMNS: Final = (
    "prefix", "hashed_key", "user", "tenant", "name", "scopes", "is_test", "created", "expires_at", "revoked",
)  # fmt: skip


class CsvFile:
    """A file that only its owner may read: hashes of short keys could be guessed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", newline="")
        csv.writer(self._file).writerow(COLUMNS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, keys: Iterable[OldKey]) -> ImportReport:
        """Write keys."""
        if self._file is None:
            raise ValueError("the file is not open")
        writer, written = csv.writer(self._file), 0
        for key in keys:
            writer.writerow(
                (
                    key.prefix,
                    key.hashed_key,
                    key.user,
                    key.tenant,
                    key.name,
                    " ".join(key.scopes),
                    str(key.is_test).lower(),
                    key.created.isoformat(),
                    "" if key.expires_at is None else key.expires_at.isoformat(),
                    str(key.is_revoked).lower(),
                )
            )
            written += 1
        return ImportReport(written=written)

"""The stored keys of one provider and tenant, opened, and the choice among them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from keyproxy.model import Moment
from keyproxy.ports.tools import UpstreamCredential
from keyproxy.signing.sealing import CannotOpen, SealedPlace, SealingKeys
from keyproxy.store.provider_keys.credential_header import CredentialHeader, read_secret

_log = logging.getLogger(__name__)


class KeySubject(NamedTuple):
    """A provider, and the tenant whose keys are meant; empty: the keys that all tenants without any share."""

    provider: str
    tenant_id: str


class Choice(NamedTuple):
    """The credential to use, and for how long no other one is better unless the upstream refuses it."""

    credential: UpstreamCredential
    holds_seconds: float


class StoredKey:
    """One row. `credential` None: it does not open. `usable_until_wall_seconds` is in the past for a revoked row."""

    __slots__ = ("credential", "is_test", "sealed", "starts_wall_seconds", "usable_until_wall_seconds")

    def __init__(
        self,
        credential: UpstreamCredential | None,
        sealed: str,
        *,
        is_test: bool,
        starts_wall: float,
        until_wall: float,
    ) -> None:
        self.credential: Final = credential
        #: What was opened, to recognise an unchanged row.
        self.sealed: Final = sealed
        self.is_test: Final = is_test
        self.starts_wall_seconds: Final = starts_wall
        self.usable_until_wall_seconds: Final = until_wall


class StoredKeys:
    """All keys of one subject."""

    __slots__ = ("_by_id", "_of_mode")

    def __init__(self, keys: Mapping[str, StoredKey]) -> None:
        """`keys`: by the id of their row."""
        self._by_id: Final = dict(keys)
        in_order = sorted(keys.items(), key=lambda item: (item[1].starts_wall_seconds, item[0]), reverse=True)
        #: Those of live requests, those of test requests.
        self._of_mode: Final = tuple(
            tuple([key for _, key in in_order if key.is_test is is_test]) for is_test in (False, True)
        )

    def get(self, row_id: str) -> StoredKey | None:
        """One row."""
        return self._by_id.get(row_id)

    def has_begun(self, now: Moment, *, is_test: bool) -> bool:
        """Whether there is a row of this mode, usable or not, other than ones that start later.

        A revoked row counts whenever it starts: the clock of this machine may be behind.
        """
        wall = now.wall_seconds
        return any(
            key.starts_wall_seconds <= wall or key.usable_until_wall_seconds == -math.inf
            for key in self._of_mode[is_test]
        )

    def choose(self, now: Moment, *, is_test: bool) -> Choice | None:
        """The newest usable key that the upstream has not just refused, else the newest usable one; None: none is.

        A key of another mode is never chosen.
        """
        newest: UpstreamCredential | None = None
        wall, mono = now.wall_seconds, now.mono_seconds
        holds_seconds = math.inf
        for key in self._of_mode[is_test]:
            found, starts, ends = key.credential, key.starts_wall_seconds, key.usable_until_wall_seconds
            if found is None or not starts <= wall < ends:
                if found is not None and wall < starts:
                    holds_seconds = min(holds_seconds, starts - wall)
                continue
            if newest is None:
                if found.refused_until_mono_seconds <= mono:
                    return Choice(found, min(holds_seconds, ends - wall))
                newest = found
            elif found.can_replace(newest, mono):
                return Choice(found, 0.0)
        return None if newest is None else Choice(newest, 0.0)

    def in_use_since_wall(self, now: Moment) -> float:
        """When the older one of the newest usable keys of both modes was started; infinite without any."""
        return min(self._newest_start(now, keys) for keys in self._of_mode)

    def _newest_start(self, now: Moment, keys: Sequence[StoredKey]) -> float:
        for key in keys:
            starts = key.starts_wall_seconds
            if key.credential is not None and starts <= now.wall_seconds < key.usable_until_wall_seconds:
                return starts
        return math.inf


#: A subject without rows.
NO_KEYS: Final = StoredKeys({})


def opened(
    subject: KeySubject,
    rows: Sequence[Mapping[str, Any]],
    before: StoredKeys,
    *,
    keys: SealingKeys | None,
    header: CredentialHeader | None,
) -> StoredKeys:
    """Open the rows of a subject. Unchanged rows keep their credential, and with it that the upstream has refused it.

    `before`: the rows as they were. Raises what a row with invalid values raises.
    """
    found: dict[str, StoredKey] = {}
    for row in rows:
        row_id, is_test, sealed = str(row["id"]), bool(row["is_test"]), f"{row['sealed_with']} {row['sealed']}"
        known = before.get(row_id)
        is_revoked = bool(row["is_revoked"])
        credential = None
        if known is not None and known.credential is not None and known.sealed == sealed and known.is_test is is_test:
            credential = known.credential
        elif not is_revoked:
            credential = _open(
                SealedPlace(subject.provider, subject.tenant_id or None, is_test, row_id), row, keys, header
            )
        ends = math.inf if row["ends"] is None else float(row["ends"])
        found[row_id] = StoredKey(
            credential, sealed, is_test=is_test, starts_wall=float(row["starts"]),
            until_wall=-math.inf if is_revoked else ends,
        )  # fmt: skip
    return StoredKeys(found)


def _open(
    place: SealedPlace, row: Mapping[str, Any], keys: SealingKeys | None, header: CredentialHeader | None
) -> UpstreamCredential | None:
    if keys is None or header is None:
        _log.error("provider key %s cannot be used: secrets.key_file or its provider is not configured", place.row_id)
        return None
    try:
        secret = keys.open(bytes.fromhex(row["sealed"]), str(row["sealed_with"]), place)
        return header.credential(read_secret(secret))
    except CannotOpen as error:
        _log.error("provider key %s cannot be opened: %s", place.row_id, error)
    except ValueError as error:
        _log.error("provider key %s cannot be used: %s", place.row_id, error)
    return None

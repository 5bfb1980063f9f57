"""Import keys that other programs issued, by SHA-256 digest or by hash of djangorestframework-api-key.

An invalid row is reported with its place and the reason, and does not prevent the import of the others. A key that exists
already is skipped, so that an interrupted import can be run again. A dry run does the same, and rolls back.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from keyproxy.auth.api_key import masked
from keyproxy.auth.names import is_role, is_scope
from keyproxy.store.directory.access.authority import check_scopes, key_warnings
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ACTS_FOR, ACTS_FOR_NONE, KeyWish, new_key_id
from keyproxy.store.directory.errors import Invalid
from keyproxy.store.directory.key_batches import BATCH_MAX
from keyproxy.store.identities import drf_api_keys
from keyproxy.store.postgres.database import Transaction

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_BOOLS: Final = {
    **dict.fromkeys(("true", "t", "1", "yes", "y"), True),
    **dict.fromkeys(("false", "f", "0", "no", "n", ""), False),
}


@dataclass(frozen=True, slots=True)
class ImportedKey:
    """One key of the other program. Either `digest` (64 hexadecimal digits) or `prefix` and `hashed` are given.

    `place`: its source, for messages. `tenant`: where a missing user is created; None: no user is created.
    """

    place: str
    user: str
    tenant: str | None = None
    digest: str | None = None
    prefix: str | None = None
    hashed: str | None = None
    id: str | None = None
    name: str = ""
    hint: str = ""
    scopes: Sequence[str] = ()
    is_test: bool = False
    plan: str | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None
    is_revoked: bool = False
    roles: Sequence[str] = ()
    acts_for: str = ACTS_FOR_NONE


@dataclass(slots=True)
class ImportReport:
    """The result of an import or dry run: keys and users created, keys that existed, problems, and warnings."""

    imported: int = 0
    present: int = 0
    users: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)

    def add(self, other: ImportReport) -> None:
        """Add another part of the same import."""
        self.imported += other.imported
        self.present += other.present
        self.users += other.users
        self.problems += other.problems
        self.warnings |= other.warnings


class _DryRunEndsError(Exception):
    """Rolls back the transaction of a dry run."""


@dataclass(frozen=True, slots=True)
class KeyImporter:
    """The import of keys."""

    _context: DirectoryContext

    async def run(self, keys: Sequence[ImportedKey], *, dry_run: bool) -> ImportReport:
        """Import the valid ones of these keys, in one transaction. For a dry run, pass all keys at once."""
        report = ImportReport()
        try:
            async with self._context.transaction() as transaction:
                for start in range(0, len(keys), BATCH_MAX):
                    report.add(await self._imported(transaction, keys[start : start + BATCH_MAX]))
                if dry_run:
                    raise _DryRunEndsError
        except _DryRunEndsError:
            pass
        return report

    async def _imported(self, transaction: Transaction, keys: Sequence[ImportedKey]) -> ImportReport:
        report = ImportReport()
        wanted = {
            key.user: key.tenant for key in keys if key.tenant is not None and self._context.includes_tenant(key.tenant)
        }
        good = {user: tenant for user, tenant in wanted.items() if _ID.fullmatch(user)}
        made = await transaction.fetch("import_users", list(good), list(good.values()))
        report.users = len(made)
        rows = await transaction.fetch("hold_users", sorted({key.user for key in keys}))
        tenants = {row["id"]: row["tenant_id"] for row in rows if self._context.includes_tenant(row["tenant_id"])}
        plans = {row["id"] for row in await transaction.fetch("plans_there", [key.plan for key in keys if key.plan])}
        roles = await _known_roles(transaction, keys)
        known = await transaction.fetch(
            "imported_already",
            [bytes.fromhex(key.digest) for key in keys if key.digest],
            [key.prefix for key in keys if key.prefix],
            [key.id for key in keys if key.id],
        )
        owners = {(row["known_by"], row["value"]): row["user_id"] for row in known}
        chosen: list[dict[str, Any]] = []
        for key in keys:
            by = ("digest", key.digest.lower()) if key.digest else ("prefix", key.prefix or "")
            problem = self._problem(key, tenants, plans, roles)
            if problem is None and owners.get(by, key.user) != key.user:
                owner = f"user {owners[by]!r}" if self._context.tenant_id is None else "another user"
                problem = f"the key exists and belongs to {owner}"
            elif problem is None and by not in owners and ("id", key.id) in owners:
                problem = f"another key has the id {key.id!r}"
            if problem is not None:
                report.problems.append((key.place, masked(problem)))
            elif by in owners:
                report.present += 1
            else:
                owners[by] = key.user
                row = _row(key)
                owners["id", row["id"]] = key.user
                chosen.append(row)
        report.imported = len(await transaction.fetch("import_keys", json.dumps(chosen)))
        chosen_ids = [row["id"] for row in chosen]
        await check_scopes(transaction, keys=chosen_ids)
        report.warnings = dict.fromkeys(await key_warnings(transaction, chosen_ids))
        return report

    def _problem(self, key: ImportedKey, tenants: Mapping[str, str], plans: set[str], roles: set[str]) -> str | None:
        if key.digest is None and self._context.tenant_id is not None:
            # Prefixes are shared by all tenants, and a hash can be crafted to cost the proxies a second per attempt.
            return "an actor bound to a tenant can import keys by digest only"
        if key.user not in tenants:
            return f"there is no user {key.user!r}" + ("" if key.tenant is None else f" and no tenant {key.tenant!r}")
        if key.tenant is not None and tenants[key.user] != key.tenant:
            return f"user {key.user!r} belongs to a tenant other than {key.tenant!r}"
        if key.plan is not None and key.plan not in plans:
            return f"there is no plan {key.plan!r}"
        unknown = [role for role in key.roles if role not in roles]
        return f"there is no role {unknown[0]!r}" if unknown else None


async def _known_roles(transaction: Transaction, keys: Sequence[ImportedKey]) -> set[str]:
    """The roles of these keys that exist, locked until the transaction ends."""
    wanted = sorted({role for key in keys for role in key.roles})
    return {row["id"] for row in await transaction.fetch("hold_roles", wanted)}


def _row(key: ImportedKey) -> dict[str, Any]:
    is_foreign = key.digest is None
    return {
        "id": key.id or new_key_id(),
        "user_id": key.user,
        # A random placeholder until the first use: no key has this digest.
        "digest": secrets.token_bytes(32).hex() if key.digest is None else key.digest.lower(),
        "hint": key.hint or (f"{key.prefix}.…" if is_foreign else ""),
        "name": key.name,
        "scopes": list(key.scopes),
        "roles": list(key.roles),
        "acts_for": key.acts_for,
        "is_test": key.is_test,
        "plan": key.plan,
        "created_at": None if key.created_at is None else key.created_at.isoformat(),
        "expires_at": None if key.expires_at is None else key.expires_at.isoformat(),
        "is_revoked": key.is_revoked,
        "prefix": key.prefix if is_foreign else None,
        "hashed": key.hashed if is_foreign else None,
    }


def read_key(place: str, row: Mapping[str, Any], defaults: Mapping[str, Any]) -> ImportedKey:
    """Read an ImportedKey from a row of CSV or JSON. `defaults` apply where the row has no value.

    Columns: `digest` or `prefix` and `hashed_key`; `user`; `tenant`, `name`, `scopes`, `roles`, `acts_for`, `is_test`,
    `plan`, `created`, `expires_at` or `expiry_date`, `revoked`, and, with a digest, `id` and `hint`. Raises Invalid.
    """
    given = _with_defaults(row, defaults)
    user, name = _user(given), _name(given, "name", 200)
    digest, prefix = _text(given, "digest"), _text(given, "prefix")
    stored = _text(given, "hashed_key", "hashed")
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise Invalid("the digest must have 64 hexadecimal digits")
    if digest is None:
        if prefix is None or stored is None:
            raise Invalid("the row has neither a digest nor a prefix and a hashed_key")
        problem = drf_api_keys.why_unusable(prefix, stored)
        if problem is not None:
            raise Invalid(problem)
    key_id = _text(given, "id") if digest is not None else None
    if key_id is not None and not _ID.fullmatch(key_id):
        raise Invalid(f"invalid key id {key_id!r}")
    return ImportedKey(
        place,
        user,
        tenant=_tenant(given),
        digest=digest,
        prefix=prefix,
        hashed=stored,
        id=key_id,
        name=name,
        hint=_name(given, "hint", 40),
        scopes=_scopes(given.get("scopes")),
        is_test=_bool(given, "is_test", "test"),
        plan=_name(given, "plan", 128) or None,
        created_at=_time(given, "created_at", "created"),
        expires_at=_time(given, "expires_at", "expiry_date"),
        is_revoked=_bool(given, "revoked", "revoked_at"),
        roles=_roles(given.get("roles")),
        acts_for=_acts_for(given),
    )


def read_wish(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[str, KeyWish]:
    """Read the user and the properties of a new key from a row. Raises Invalid.

    Columns: `user`, `name`, `scopes`, `roles`, `acts_for`, `test`, `plan`.
    """
    given = _with_defaults(row, defaults)
    is_test = _bool(given, "is_test", "test")
    return _user(given), KeyWish(
        _name(given, "name", 200),
        _scopes(given.get("scopes")),
        is_test,
        plan=_text(given, "plan"),
        roles=_roles(given.get("roles")),
        acts_for=_acts_for(given),
    )


def _with_defaults(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **{name: value for name, value in row.items() if value not in (None, "")}}


def _user(given: Mapping[str, Any]) -> str:
    user = _text(given, "user", "user_id")
    if user is None or not _ID.fullmatch(user):
        raise Invalid("the row has no user" if user is None else f"invalid user id {user!r}")
    return user


def _tenant(given: Mapping[str, Any]) -> str | None:
    tenant = _text(given, "tenant", "tenant_id")
    if tenant is not None and not _ID.fullmatch(tenant):
        raise Invalid(f"invalid tenant id {tenant!r}")
    return tenant


def _name(given: Mapping[str, Any], column: str, length_max: int) -> str:
    name = _text(given, column) or ""
    if len(name) > length_max or _UNPRINTABLE.search(name):
        raise Invalid(f"the {column} has more than {length_max} characters, or an unprintable one")
    return name


def _text(row: Mapping[str, Any], *names: str) -> str | None:
    return next((str(row[name]).strip() for name in names if row.get(name) not in (None, "")), None)


def _words(value: object) -> tuple[str, ...]:
    words = value if isinstance(value, list | tuple) else str(value or "").strip("{}").replace(",", " ").split()
    return tuple(dict.fromkeys(str(word) for word in words))


def _roles(value: object) -> tuple[str, ...]:
    found = _words(value)
    if len(found) > 16 or not all(is_role(word) for word in found):
        raise Invalid("roles must be single words such as reader, in lower case, at most 16 of them")
    return found


def _acts_for(given: Mapping[str, Any]) -> str:
    found = _text(given, "acts_for") or ACTS_FOR_NONE
    if found not in ACTS_FOR:
        raise Invalid(f"acts_for is {' or '.join(ACTS_FOR)}, not {found!r}")
    return found


def _scopes(value: object) -> tuple[str, ...]:
    found = _words(value)
    if len(found) > 64 or not all(is_scope(word) for word in found):
        raise Invalid("scopes must be single words such as jobs:write, at most 64 of them")
    return found


def _bool(row: Mapping[str, Any], name: str, other: str) -> bool:
    value = row.get(name, row.get(other, False))
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    # A column with a time counts as true.
    return _BOOLS[text] if text in _BOOLS else _time(row, name, other) is not None


def _time(row: Mapping[str, Any], *names: str) -> datetime | None:
    text = _text(row, *names)
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise Invalid(f"invalid ISO 8601 time {text!r}") from error
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)

"""The context that all parts of a directory share: transactions that name their actor, the tenant binding, entities.

A directory may be bound to one tenant. Then nothing outside that tenant can be read or changed; it is reported as not
found. The rule is implemented once, here, so that callers cannot forget it.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keyproxy.auth.api_key import ENTROPY_BYTES, KeyFormat, SecretKey
from keyproxy.store.directory.access import authority
from keyproxy.store.directory.entities import CHANGEABLE, ENTITIES, Actor, Entity, etag, with_warnings
from keyproxy.store.directory.errors import Conflict, DirectoryError, Invalid, NotFound, Outdated
from keyproxy.store.postgres.database import Row, StatementRunner, StoreConflict, Transaction

_ID_RULE: Final = (
    "an id starts with a letter or digit, contains only those and . _ : @ | + -, and has at most 128 characters"
)
_RULES: Final = (
    (re.compile(r"tenants_id_check|users_id_check|api_keys_id_check"), _ID_RULE),
    (re.compile(r"plans_id_check"), _ID_RULE.replace(" | +", "")),
    (re.compile(r"\w+_name_check"), "a name has at most 200 characters"),
    (re.compile(r"(api_keys|agent_tokens)_(revoke|suspend)_reason_check"), "a reason has at most 500 characters"),
    (
        re.compile(r"roles_id_check|api_keys_roles|users_roles|tenants_roles|agents_roles_check"),
        "a role has at most 64 lower-case letters, digits, _ and -; a key, user, tenant or agent has at most 16 roles",
    ),
    (re.compile(r"owned_kind_check"), "a kind has the form of a role: lower-case letters, digits, _ and -, at most 64"),
    (
        re.compile(r"owned_id_check"),
        "an owned id has 1 to 256 letters, digits and . _ : @ | + ~ / = , ! $ -, without empty, . or .. segments",
    ),
    (
        re.compile(r"prompt_templates_category_check"),
        "a category starts with a lower-case letter, contains only those, digits, _ and -, and has at most 64 characters",
    ),
    (re.compile(r"api_keys_acts_for"), "acts_for is none or tenant"),
    (re.compile(r"window_credits_reason_check"), "a reason has 1 to 500 characters"),
    (re.compile(r"window_credits_bound"), "a limit and its credits together must stay from 0 to 10^15"),
    (re.compile(r"approvals_reason_check"), "a reason has at most 500 characters"),
    (re.compile(r"oauth_subjects_\w+_check"), "an issuer and a subject have 1 to 1000 bytes"),
    (
        re.compile(r"api_keys_scopes_check|roles_scopes_check"),
        "a scope is one word such as jobs:write, without wildcards, and a key or role has at most 64 of them",
    ),
)
_PLAN_REFERENCE = re.compile(r"\w+_plan_id_fkey")


@dataclass(frozen=True, slots=True)
class DirectoryContext:
    """All methods raise DirectoryError, StoreConflict or StoreUnavailable.

    `tenant_id`: the tenant that the directory is bound to; None: it is not bound.
    """

    database: StatementRunner
    key_format: KeyFormat
    actor: Actor
    tenant_id: str | None = None

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """Return the result of a statement."""
        return await self.database.fetch(name, *arguments)

    async def fetch_row(self, name: str, *arguments: object) -> Row | None:
        """Return the first row of a statement's result."""
        rows = await self.database.fetch(name, *arguments)
        return rows[0] if rows else None

    @contextlib.asynccontextmanager
    async def transaction(self, plan: str | None = None) -> AsyncIterator[Transaction]:
        """Open a transaction with the actor set for the audit log. `plan`: the assigned plan, for the error text."""
        try:
            async with self.database.transaction() as transaction:
                await transaction.fetch("say_who_acts", self.actor.name, self.actor.origin)
                yield transaction
        except StoreConflict as error:
            refusal = _refusal(error, plan)
            if refusal is None:
                raise
            raise refusal from error

    async def lock(self, transaction: Transaction, kind: str, entity_id: str, if_match: str | None = None) -> Entity:
        """Lock an entity until the transaction ends, and read it. Raises NotFound, or Outdated if `if_match` differs."""
        # Not read without the lock: another transaction could change a row that was created between the two statements.
        is_held = await transaction.fetch(f"hold_{kind}", entity_id)
        row = await transaction.fetch_row(kind, entity_id) if is_held else None
        entity = self._visible(kind, entity_id, row)
        if if_match is not None and if_match != etag(entity):
            raise Outdated(f"{kind} {entity_id!r} has changed since it was read")
        return entity

    async def get(self, kind: str, entity_id: str) -> Entity:
        """Read an entity. Raises NotFound."""
        return self._visible(kind, entity_id, await self.fetch_row(kind, entity_id))

    async def list_entities(self, kind: str, statement: str, *arguments: object) -> list[Entity]:
        """Return the result of a statement as entities."""
        return [ENTITIES[kind](row) for row in await self.database.fetch(statement, *arguments)]

    async def change(self, kind: str, entity_id: str, changes: Mapping[str, Any], if_match: str | None) -> Entity:
        """Apply changes with `change_<kind>`, and return the changed entity."""
        unknown = set(changes) - CHANGEABLE[kind]
        if unknown:
            raise Invalid(f"{min(unknown)} of a {kind} cannot be changed; {', '.join(sorted(CHANGEABLE[kind]))} can")
        plan = changes.get("plan") or changes.get("test_plan")
        async with self.transaction(plan) as transaction:
            await self.lock(transaction, kind, entity_id, if_match)
            await authority.hold_roles(transaction, changes.get("roles") or ())
            await transaction.fetch(f"change_{kind}", entity_id, json.dumps(dict(changes)))
            warnings = await self._check_authority(transaction, kind, entity_id, changes)
            row = await transaction.fetch_row(kind, entity_id)
            if row is None:
                raise NotFound(f"there is no {kind.replace('_', ' ')} {entity_id!r}")
            return with_warnings(ENTITIES[kind](row), warnings)

    async def _check_authority(
        self, transaction: Transaction, kind: str, entity_id: str, changes: Mapping[str, Any]
    ) -> list[str]:
        """Check what keys may do after these changes. Returns warnings of a changed key."""
        if kind == "key":
            warnings: list[str] = []
            if "scopes" in changes or "roles" in changes:
                await authority.check_scopes(transaction, keys=[entity_id])
                warnings += await authority.ceiling_warnings(transaction, [entity_id])
            if "acts_for" in changes or "plan" in changes:
                warnings += await authority.acting_warnings(transaction, [entity_id])
            return warnings
        if "roles" in changes:
            user, tenant = (entity_id, None) if kind == "user" else (None, entity_id)
            await authority.check_scopes(transaction, user=user, tenant=tenant)
        return []

    async def delete(self, kind: str, entity_id: str, if_match: str | None) -> Entity:
        """Delete an entity with `delete_<kind>`."""
        async with self.transaction() as transaction:
            await self.lock(transaction, kind, entity_id, if_match)
            await transaction.fetch(f"delete_{kind}", entity_id)
        return {"id": entity_id, "deleted": True}

    def includes_tenant(self, tenant_id: str | None) -> bool:
        """Whether the directory covers this tenant."""
        return self.tenant_id in (None, tenant_id)

    def tenant_filter(self, wanted: str | None) -> tuple[bool, str | None]:
        """Return whether a list for this tenant can have rows, and the tenant to filter by."""
        if self.tenant_id is None or wanted == self.tenant_id:
            return True, wanted
        return wanted is None, self.tenant_id

    def require_unbound(self, act: str) -> None:
        """Raise Conflict if the directory is bound to a tenant."""
        if self.tenant_id is not None:
            raise Conflict(f"an actor bound to tenant {self.tenant_id!r} cannot {act}")

    def new_secret(self, *, is_test: bool) -> SecretKey:
        """Make the secret of a new key."""
        return self.key_format.make(secrets.token_bytes(ENTROPY_BYTES), is_test=is_test)

    def _visible(self, kind: str, entity_id: str, row: Row | None) -> Entity:
        entity = None if row is None else ENTITIES[kind](row)
        # Plans, roles and clients are shared by all tenants.
        is_visible = kind in ("plan", "role", "client") or (
            entity is not None and self.includes_tenant(entity["id" if kind == "tenant" else "tenant"])
        )
        if entity is None or not is_visible:
            raise NotFound(f"there is no {kind.replace('_', ' ')} {entity_id!r}")
        return entity


def _refusal(error: StoreConflict, plan: str | None) -> DirectoryError | None:
    if _PLAN_REFERENCE.fullmatch(error.constraint) and plan is not None:
        return NotFound(f"there is no plan {plan!r}")
    if error.constraint == "consents_bound":
        return Conflict("the user has 64 live consents already: revoke one first")
    for pattern, sentence in _RULES:
        if pattern.fullmatch(error.constraint):
            return Invalid(sentence)
    return None

"""Keys that other programs issued, taken over: the models and the endpoint.

A row is read as the command line reads one of a file, so that both say the same of what cannot be used.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field, StringConstraints

from keyproxy.admin.endpoints import Answer, Call, Endpoint, needs
from keyproxy.admin.schemas.request_models import PRINTABLE, Accepted, Id, Instant, KeyScope, Name, Text
from keyproxy.admin.schemas.response_models import Answered
from keyproxy.admin.scopes import Scope, allows
from keyproxy.auth.api_key import masked
from keyproxy.store.directory.directory import Invalid
from keyproxy.store.directory.import_keys import read_key


class KeyImport(Accepted):
    """A key that another program issued: its digest, or the prefix and hash of djangorestframework-api-key."""

    untold: ClassVar[frozenset[str]] = frozenset({"tenant", "digest", "prefix", "hashed_key", "id", "created_at"})

    user: Id
    tenant: Annotated[Id | None, Field(description="A user who is not there is made in it.")] = None
    digest: Annotated[str | None, Field(max_length=64, description="Its SHA-256, hexadecimal.")] = None
    prefix: Annotated[Text | None, Field(description="With `hashed_key`, in place of a digest.")] = None
    hashed_key: Annotated[str | None, StringConstraints(pattern=PRINTABLE, max_length=500)] = None
    id: Annotated[Text | None, Field(description="With a digest only. Not given: a new one.")] = None
    name: Name = ""
    hint: Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=40)] = ""
    scopes: Annotated[list[KeyScope], Field(max_length=64, default_factory=list)]
    is_test: bool = False
    plan: Text | None = None
    created_at: Annotated[Instant | None, Field(description="Not given: now.")] = None
    expires_at: Annotated[Instant | None, Field(description="null: never.")] = None
    revoked: bool = False


class KeysImport(Accepted):
    """Keys of other programs. Those that can be used are imported."""

    keys: Annotated[list[KeyImport], Field(min_length=1, max_length=1000)]
    dry_run: Annotated[bool, Field(description="Do it all, tell what came of it, and undo it.")] = False


class ImportProblem(Answered):
    """Why a key was not imported. `index`: which of those that were sent, from 0."""

    index: int
    problem: str


class KeysImported(Answered):
    """How many keys were imported, how many were there already, and how many users were made."""

    imported: int
    present: int
    users: int
    problems: list[ImportProblem]
    warnings: list[str]


async def _import(call: Call) -> Answer:
    body: KeysImport = call.body
    if any(key.tenant is not None for key in body.keys) and not allows(call.token["scopes"], Scope.USERS_WRITE):
        raise needs(Scope.USERS_WRITE)
    keys, problems = [], []
    for index, row in enumerate(body.keys):
        try:
            keys.append(read_key(str(index), row.said(), {}))
        except Invalid as error:
            problems.append((str(index), masked(str(error))))
    report = await call.directory.import_keys(keys, dry_run=body.dry_run)
    told = sorted((int(place), problem) for place, problem in problems + report.problems)
    return Answer({
        "imported": report.imported, "present": report.present, "users": report.users,
        "problems": [{"index": index, "problem": problem} for index, problem in told],
        "warnings": call.terms.warnings(*(key.scopes for key in keys if not key.is_revoked)),
    })  # fmt: skip


ENDPOINTS: Final = (
    Endpoint("POST", "/v1/keys/import", "import_keys",
             "Take over keys that another program issued. Those that can be used are imported, the others are told; keys "
             "that are there are passed over, so that the same can be sent again. Making users needs `users:write` too. "
             "A bound token imports keys by their digests alone.",
             Scope.KEYS_WRITE, _import, {200: KeysImported}, body=KeysImport),
)  # fmt: skip

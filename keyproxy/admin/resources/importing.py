"""Import of keys from other programs: the models and the endpoint.

Rows are parsed as on the command line, so that both report the same errors.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field, StringConstraints

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, needs
from keyproxy.admin.schemas.field_types import PRINTABLE, ActsFor, Id, Instant, KeyScope, Name, Role, Text
from keyproxy.admin.schemas.request_models import RequestModel
from keyproxy.admin.schemas.response_models import ResponseModel
from keyproxy.admin.scopes import Scope, allows
from keyproxy.auth.api_key import masked
from keyproxy.store.directory.directory import Invalid
from keyproxy.store.directory.import_keys import read_key


class KeyImport(RequestModel):
    """A key that another program issued: its digest, or the prefix and hash of djangorestframework-api-key."""

    without_default: ClassVar[frozenset[str]] = frozenset(
        {"tenant", "digest", "prefix", "hashed_key", "id", "created_at"}
    )

    user: Id
    tenant: Annotated[Id | None, Field(description="A missing user is created in it.")] = None
    digest: Annotated[str | None, Field(max_length=64, description="The key's SHA-256, hexadecimal.")] = None
    prefix: Annotated[Text | None, Field(description="With `hashed_key`, instead of a digest.")] = None
    hashed_key: Annotated[str | None, StringConstraints(pattern=PRINTABLE, max_length=500)] = None
    id: Annotated[Text | None, Field(description="With a digest only. Default: a new id.")] = None
    name: Name = ""
    hint: Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=40)] = ""
    scopes: Annotated[list[KeyScope], Field(max_length=64, default_factory=list)]
    is_test: bool = False
    plan: Text | None = None
    created_at: Annotated[Instant | None, Field(description="Default: now.")] = None
    expires_at: Annotated[Instant | None, Field(description="null: never.")] = None
    revoked: bool = False
    roles: Annotated[list[Role], Field(max_length=16, default_factory=list)]
    acts_for: ActsFor = "none"


class KeysImport(RequestModel):
    """Keys of other programs. Valid ones are imported."""

    keys: Annotated[list[KeyImport], Field(min_length=1, max_length=1000)]
    dry_run: Annotated[bool, Field(description="Run the import, report the result, and roll it back.")] = False


class ImportProblem(ResponseModel):
    """Why a key was not imported. `index`: its position in the request, from 0."""

    index: int
    problem: str


class KeysImported(ResponseModel):
    """The number of imported keys, of existing keys, and of created users."""

    imported: int
    present: int
    users: int
    problems: list[ImportProblem]
    warnings: list[str]


async def _import(request: ApiRequest) -> ApiResponse:
    body: KeysImport = request.body
    if any(key.tenant is not None for key in body.keys) and not allows(request.token["scopes"], Scope.USERS_WRITE):
        raise needs(Scope.USERS_WRITE)
    keys, problems = [], []
    for index, row in enumerate(body.keys):
        try:
            keys.append(read_key(str(index), row.given(), {}))
        except Invalid as error:
            problems.append((str(index), masked(str(error))))
    report = await request.directory.key_importer.run(keys, dry_run=body.dry_run)
    found = sorted((int(place), problem) for place, problem in problems + report.problems)
    return ApiResponse(
        {
            "imported": report.imported,
            "present": report.present,
            "users": report.users,
            "problems": [{"index": index, "problem": problem} for index, problem in found],
            "warnings": [
                *request.config.warnings(
                    *(key.scopes for key in keys if not key.is_revoked and (key.scopes or not key.roles))
                ),
                *report.warnings,
            ],
        }
    )


ENDPOINTS: Final = (
    Endpoint(
        "import_keys",
        "Import keys that another program issued. Valid keys are imported, invalid ones are reported, and existing "
        "keys are skipped, so the request can be repeated. Creating users also requires `users:write`. "
        "A token restricted to a tenant can import keys by digest only.",
        Scope.KEYS_WRITE,
        _import,
        {200: KeysImported},
        body=KeysImport,
    ),
)

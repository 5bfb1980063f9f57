"""OAuth subjects, the accounts at the identity provider: the models and the endpoints."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from keyproxy.admin.endpoints import ApiRequest, ApiResponse, Endpoint, cursor, position
from keyproxy.admin.problems import Problem
from keyproxy.admin.schemas.field_types import PRINTABLE, Id, Time
from keyproxy.admin.schemas.request_models import Paged, RequestModel
from keyproxy.admin.schemas.response_models import Page, ResponseModel
from keyproxy.admin.scopes import Scope

_NOT_THERE: Final = frozenset({Problem.NOT_FOUND})

_Account = Annotated[str, StringConstraints(pattern=PRINTABLE, min_length=1, max_length=255)]
_Issuer = Annotated[_Account | None, Field(description="null or omitted: `oauth.login.issuer`.")]


class OAuthSubjectLink(RequestModel):
    """An account at the identity provider, and the user that it signs in as."""

    subject: _Account
    user: Id
    issuer: _Issuer = None


class OAuthSubjectQuery(RequestModel):
    """Selects one subject."""

    subject: _Account
    issuer: _Issuer = None


class OAuthSubjectsQuery(Paged):
    """Selects subjects."""

    user: Id | None = None


class OAuthSubject(ResponseModel):
    """An account at the identity provider, linked to a user."""

    issuer: str
    subject: str
    user: str
    tenant: str
    created_at: Time


class OAuthSubjectLinked(OAuthSubject):
    """A linked subject; `created`: it was not linked before."""

    created: bool


class OAuthSubjectUnlinked(ResponseModel):
    """A subject that is not linked any more."""

    issuer: str
    subject: str
    deleted: Literal[True]


class OAuthSubjects(Page):
    """Subjects, sorted by issuer and subject."""

    items: list[OAuthSubject]


async def _subjects(request: ApiRequest) -> ApiResponse:
    query: OAuthSubjectsQuery = request.query
    found = await request.directory.oauth_subjects.list_page(position(query), query.limit, user_id=query.user)
    return ApiResponse({"items": found.items, "next": cursor(query, found.next)})


async def _link_subject(request: ApiRequest) -> ApiResponse:
    body: OAuthSubjectLink = request.body
    linked = await request.directory.oauth_subjects.link(body.subject, body.user, issuer=body.issuer)
    return ApiResponse(linked, 201 if linked["created"] else 200)


async def _unlink_subject(request: ApiRequest) -> ApiResponse:
    query: OAuthSubjectQuery = request.query
    return ApiResponse(await request.directory.oauth_subjects.unlink(query.subject, issuer=query.issuer))


ENDPOINTS: Final = (
    Endpoint("list_oauth_subjects", "List accounts at the identity provider that are linked to users.",
             Scope.OAUTH_READ, _subjects, {200: OAuthSubjects}, query=OAuthSubjectsQuery, refuses=_NOT_THERE),
    Endpoint("link_oauth_subject",
             "Link an account at the identity provider to a user. One that is linked to another user is refused.",
             Scope.OAUTH_WRITE, _link_subject, {201: OAuthSubjectLinked, 200: OAuthSubjectLinked}, body=OAuthSubjectLink,
             refuses=_NOT_THERE),
    Endpoint("unlink_oauth_subject",
             "Remove the link of an account. Its sessions end within a second, and it cannot sign in.",
             Scope.OAUTH_WRITE, _unlink_subject, {200: OAuthSubjectUnlinked}, query=OAuthSubjectQuery,
             refuses=_NOT_THERE),
)  # fmt: skip

"""Django REST framework: authentication, permissions and throttling by the identity that keyproxy verified.

The middleware is not needed: each class judges the request itself if nothing did before. Refusals are documents of
`application/problem+json`; for those of permissions that are combined by `|`, `&` or `~`, DRF makes its own.
"""

from __future__ import annotations

from typing import Any, Final, Self

from django.utils.module_loading import import_string

from keyproxy_client.missing_extra import missing_extra

try:
    from rest_framework.authentication import BaseAuthentication
    from rest_framework.exceptions import APIException, AuthenticationFailed, NotAuthenticated, PermissionDenied
    from rest_framework.permissions import BasePermission, OperationHolderMixin
    from rest_framework.renderers import JSONRenderer
    from rest_framework.throttling import UserRateThrottle
except ImportError as error:
    raise missing_extra("drf", error) from error

from keyproxy_client.django.guards import refusal, valid_scopes
from keyproxy_client.django.incoming.request_identity import resolve
from keyproxy_client.django.settings import settings
from keyproxy_client.django.users import user_of
from keyproxy_client.identity import Identity
from keyproxy_client.incoming.judge import Outcome
from keyproxy_client.incoming.problems import IDENTITY_MISSING, MEDIA_TYPE, Problem

_CHALLENGE: Final = dict(IDENTITY_MISSING.headers)["WWW-Authenticate"]

#: The identity is genuine, but the project has no such user, or an inactive one; the response does not reveal which.
_NO_USER: Final = Problem(
    "authentication_failed",
    401,
    "Authentication failed",
    "The user of the identity is unknown or inactive.",
    (("WWW-Authenticate", _CHALLENGE),),
)


class ProblemRenderer(JSONRenderer):
    """Renders a refusal as `application/problem+json`. Only this module selects it."""

    media_type = MEDIA_TYPE
    format = "problem"
    charset = None

    def __init__(self, refused: Refused) -> None:
        self._refused = refused

    def render(self, data: Any, accepted_media_type: str | None = None, renderer_context: Any = None) -> bytes:
        """The document; or the data as JSON, if the project's exception handler gave it another form."""
        if data is not self._refused.detail:
            return bytes(super().render(data, accepted_media_type, renderer_context))
        body = self._refused.problem.body()
        response = (renderer_context or {}).get("response")
        if response is not None:
            for name, value in self._refused.problem.all_headers(body):
                response[name] = value
        return body


class Refused(APIException):
    """A request is refused with a problem. `refused` makes one that is also DRF's exception of the kind."""

    def __init__(self, problem: Problem, request: Any) -> None:
        super().__init__(problem.content(), problem.code)
        self.problem = problem
        headers = dict(problem.headers)
        self.wait = int(headers["Retry-After"]) if "Retry-After" in headers else None
        # DRF takes the renderer from the request, and negotiated it before it authenticates.
        request.accepted_renderer, request.accepted_media_type = ProblemRenderer(self), MEDIA_TYPE

    @property
    def status_code(self) -> int:
        """The status of the problem. DRF sets 403 for authentication errors whose first class has no challenge."""
        return self.problem.status

    @status_code.setter
    def status_code(self, value: int) -> None:
        """Keep that of the problem."""

    @property
    def auth_header(self) -> str | None:
        """The challenge of the problem. DRF sets that of the first authentication class."""
        return dict(self.problem.headers).get("WWW-Authenticate")

    @auth_header.setter
    def auth_header(self, value: str) -> None:
        """Keep that of the problem."""


class _NotAuthenticated(Refused, NotAuthenticated):
    """There is no identity."""


class _AuthenticationFailed(Refused, AuthenticationFailed):
    """The identity proves no user."""


class _PermissionDenied(Refused, PermissionDenied):
    """The identity lacks a scope."""


def refused(problem: Problem, request: Any) -> Refused:
    """The exception for a problem: of DRF's classes too, for exception handlers and tests of the project."""
    if problem is IDENTITY_MISSING:
        return _NotAuthenticated(problem, request)
    kind = {401: _AuthenticationFailed, 403: _PermissionDenied}.get(problem.status, Refused)
    return kind(problem, request)


def _resolve(request: Any) -> Outcome:
    """The outcome of a request. Raises Refused where the middleware refuses too."""
    outcome = resolve(request)
    if outcome.is_rejected and outcome.problem is not None:
        raise refused(outcome.problem, request)
    return outcome


class KeyproxyAuthentication(BaseAuthentication):
    """`request.user` is the user of the identity, `request.auth` the identity. Without an identity, neither is set."""

    def authenticate(self, request: Any) -> tuple[Any, Identity] | None:
        """Raises Refused with 401 for an unknown or inactive user."""
        identity = _resolve(request).identity
        if identity is None:
            return None
        user = user_of(identity)
        if user is None or not user.is_active:
            raise refused(_NO_USER, request)
        return user, identity

    def authenticate_header(self, request: Any) -> str:
        """The challenge of 401."""
        return _CHALLENGE


class _IdentityPermission(BasePermission):
    """A permission that refuses with a problem, unless it is an operand of `|`, `&` or `~`.

    DRF reads `message` only from the permission that decided: an operand returns False, so that others may grant.
    """

    #: The request that was refused last, and why.
    _refused: tuple[Problem, Any] | None = None

    @property
    def message(self) -> None:
        """DRF's text of the refusal. Raises Refused instead."""
        if self._refused is not None:
            raise refused(*self._refused)

    def _grants(self, request: Any, problem: Problem | None) -> bool:
        self._refused = None if problem is None else (problem, request)
        return problem is None


class HasScope(OperationHolderMixin, _IdentityPermission):
    """`permission_classes = [HasScope("jobs:write")]`: the identity has all these scopes."""

    def __init__(self, *scopes: str) -> None:
        """Raises ValueError without a scope, and for an invalid one."""
        if not scopes:
            raise ValueError("HasScope needs at least one scope")
        self._scopes = valid_scopes(scopes)

    def __call__(self) -> Self:
        """An instance for one request: DRF calls the members of `permission_classes`, which are classes otherwise."""
        return type(self)(*self._scopes)

    def has_permission(self, request: Any, view: Any) -> bool:
        """Whether the identity has the scopes."""
        return self._grants(request, refusal(_resolve(request), self._scopes))

    def __repr__(self) -> str:
        return f"HasScope({', '.join(map(repr, self._scopes))})"


class HasAPIKey(_IdentityPermission):
    """The replacement of djangorestframework-api-key's permission: true exactly if the request has an identity.

    With `HAS_API_KEY_FALLBACK`, the old permission decides on requests without one.
    """

    def has_permission(self, request: Any, view: Any) -> bool:
        """Whether the request has an identity, or the fallback grants it."""
        outcome = _resolve(request)
        self._fallback = _fallback() if outcome.problem is IDENTITY_MISSING else None
        if self._fallback is not None and self._fallback.has_permission(request, view):
            return True
        return self._grants(request, refusal(outcome, ()))

    def has_object_permission(self, request: Any, view: Any, obj: Any) -> bool:
        """An identity suffices; the fallback decides on what it granted."""
        fallback = getattr(self, "_fallback", None)
        return fallback is None or bool(fallback.has_object_permission(request, view, obj))


def _fallback() -> Any:
    """The old permission, None if the settings have none."""
    permission = settings().has_api_key_fallback
    if isinstance(permission, str):
        permission = import_string(permission)
    return None if permission is None else permission()


class KeyproxyThrottle(UserRateThrottle):
    """Never throttles a request with an identity: keyproxy applied the limits of its plan.

    Other requests are throttled by user or address with the rate `user` of DEFAULT_THROTTLE_RATES.
    """

    def allow_request(self, request: Any, view: Any) -> bool:
        """Whether the request is within the rate."""
        return _resolve(request).identity is not None or bool(super().allow_request(request, view))

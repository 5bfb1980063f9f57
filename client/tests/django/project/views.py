"""The views of the test project: each shows what application code sees of a request's identity."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth.models import AnonymousUser
from django.db import transaction
from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from rest_framework.permissions import BasePermission, IsAuthenticated
from rest_framework.response import Response
from rest_framework.views import APIView

from keyproxy_client.acting import Acting, acting, acting_async
from keyproxy_client.django.drf import HasAPIKey, HasScope, KeyproxyAuthentication, KeyproxyThrottle
from keyproxy_client.django.guards import needs
from keyproxy_client.identity import Identity


def _identity(identity: Identity | None) -> dict[str, Any] | None:
    return None if identity is None else dataclasses.asdict(identity) | {"scopes": sorted(identity.scopes)}


def _acting(chosen: Acting | None) -> dict[str, Any] | None:
    return None if chosen is None else dataclasses.asdict(chosen)


def _seen(request: Any, chosen: Acting | None) -> dict[str, Any]:
    """Everything under the prefix, wherever an application may look."""
    scope = getattr(request, "scope", None)
    return {
        "identity": _identity(request.keyproxy),
        "acting": _acting(chosen),
        "peer": [request.META.get("REMOTE_ADDR"), str(request.META.get("REMOTE_PORT"))],
        "meta": sorted(name for name in request.META if "KEYPROXY" in name.upper()),
        "headers": sorted(name for name in request.headers if "keyproxy" in name.lower()),
        "scope": None if scope is None else sorted(n.decode() for n, _ in scope["headers"] if b"keyproxy" in n.lower()),
    }


def seen(request: HttpRequest) -> JsonResponse:
    """What a view sees."""
    return JsonResponse(_seen(request, acting()))


@transaction.non_atomic_requests
async def seen_async(request: HttpRequest) -> JsonResponse:
    """What a coroutine sees."""
    return JsonResponse(_seen(request, await acting_async()))


def streamed(request: HttpRequest) -> StreamingHttpResponse:
    """The acting user while the content is made."""

    def content() -> Iterator[str]:
        for _ in range(2):
            yield f"{getattr(acting(), 'user', None)} "

    return StreamingHttpResponse(content())


@transaction.non_atomic_requests
async def streamed_async(request: HttpRequest) -> StreamingHttpResponse:
    """Like `streamed`."""

    async def content() -> AsyncIterator[str]:
        for _ in range(2):
            yield f"{getattr(await acting_async(), 'user', None)} "
        yield f"{getattr(await sync_to_async(acting)(), 'user', None)} "

    return StreamingHttpResponse(content())


@needs("jobs:write")
def guarded(request: HttpRequest) -> JsonResponse:
    """A view for identities with a scope."""
    return JsonResponse({})


@transaction.non_atomic_requests
@needs("jobs:write")
async def guarded_async(request: HttpRequest) -> JsonResponse:
    """A coroutine for identities with a scope."""
    return JsonResponse({})


class Refusing(BasePermission):
    """A permission that refuses."""

    def has_permission(self, request: Any, view: Any) -> bool:
        """No."""
        return False


class Shown(APIView):
    """A view of DRF that any request reaches."""

    authentication_classes = (KeyproxyAuthentication,)
    permission_classes: Any = ()

    def get(self, request: Any) -> Response:
        """What the view sees."""
        user = request.user
        return Response(
            {
                "user": None if isinstance(user, AnonymousUser) else user.username,
                "auth": _identity(request.auth),
                **_seen(request, acting()),
            }
        )


class Authenticated(Shown):
    """For users."""

    permission_classes: Any = (IsAuthenticated,)


class Keyed(Shown):
    """For requests with a key."""

    permission_classes: Any = (HasAPIKey,)


class KeyedWithoutUser(Keyed):
    """For requests with a key, whose user does not matter."""

    authentication_classes: Any = ()


class Scoped(KeyedWithoutUser):
    """For keys with a scope."""

    permission_classes: Any = (HasScope("jobs:write"),)


class KeyedOrUser(Shown):
    """A combination, as the documentation of djangorestframework-api-key has it."""

    permission_classes: Any = (HasAPIKey | IsAuthenticated,)


class ScopedAndRefused(KeyedWithoutUser):
    """A combination of which one operand refuses."""

    permission_classes: Any = (HasScope("jobs:write") & Refusing,)


class Unkeyed(KeyedWithoutUser):
    """For requests without a key."""

    permission_classes: Any = (~HasAPIKey,)  # type: ignore[operator]


class OnePerMinute(KeyproxyThrottle):
    """A rate that two requests exceed."""

    rate = "1/min"


class Throttled(KeyedWithoutUser):
    """A view with a rate."""

    permission_classes: Any = ()
    throttle_classes = (OnePerMinute,)

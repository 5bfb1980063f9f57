"""The identity of a Django request: judged once, by the middleware or by the first DRF class that needs it."""

from __future__ import annotations

import functools
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.http import HttpRequest, HttpResponse

from keyproxy_client.django.settings import Settings, settings
from keyproxy_client.identity import Identity, Trust
from keyproxy_client.incoming.judge import Judge, Outcome
from keyproxy_client.incoming.problems import IDENTITY_MISSING, Problem

#: Where a request keeps its outcome, so that it is judged once.
_ATTRIBUTE: Final = "_keyproxy_outcome"
_LOOPBACK: Final = Trust.loopback()


def trust_of(found: Settings) -> Trust:
    """The trust rule of the settings. Raises ValueError for invalid values, ImportError without the extra `signed`."""
    if found.trust == "unix":
        return Trust.unix()
    if found.trust == "loopback":
        return Trust.loopback(found.trust_networks)
    if found.trust == "signed":
        return Trust.signed(found.jwks_url, issuer=found.issuer, audience=found.audience)
    raise ImproperlyConfigured("KEYPROXY['TRUST'] is missing: without it no request is trusted, and none is served")


@functools.lru_cache(maxsize=1)
def judge() -> Judge:
    """The judge of this process: it keeps keys, verified assertions and identities. Raises ImproperlyConfigured."""
    found = settings()
    try:
        return Judge(trust_of(found), header_prefix=found.header_prefix)
    except ValueError as error:
        raise ImproperlyConfigured(f"KEYPROXY: {error}") from error


def _reset(*, setting: str, **_kwargs: object) -> None:
    """Tests change settings."""
    if setting == "KEYPROXY":
        judge.cache_clear()


setting_changed.connect(_reset, dispatch_uid="keyproxy_client.django.incoming.request_identity")


def resolve(request: Any) -> Outcome:
    """Judge a request, or return what was judged. It may wait for the keys of keyproxy.

    Sets `request.keyproxy`, and removes all headers under the prefix from a request that is not trusted. DRF's requests
    are accepted too.
    """
    request = getattr(request, "_request", request)
    known: Outcome | None = getattr(request, _ATTRIBUTE, None)
    if known is not None:
        return known
    scope = getattr(request, "scope", None)
    return _settle(request, judge().wsgi(request.META) if scope is None else judge().asgi_blocking(scope))


async def resolve_async(request: Any) -> Outcome:
    """Like `resolve`, in an event loop, which nothing blocks."""
    known: Outcome | None = getattr(request, _ATTRIBUTE, None)
    if known is not None:
        return known
    scope = getattr(request, "scope", None)
    if scope is None:
        return await sync_to_async(resolve)(request)
    return _settle(request, await judge().asgi(scope))


def _settle(request: Any, outcome: Outcome) -> Outcome:
    if not outcome.is_trusted:
        _remove_headers(request)
    outcome = _development(request, outcome)
    setattr(request, _ATTRIBUTE, outcome)
    request.keyproxy = outcome.identity
    return outcome


def _remove_headers(request: Any) -> None:
    """From everything that application code reads: META, which is WSGI's environ, ASGI's scope, `request.headers`."""
    headers = judge().headers
    count = headers.remove_from(request.META)
    scope = getattr(request, "scope", None)
    if scope is not None:
        before = list(scope["headers"])
        scope["headers"] = headers.without(before)
        # Django drops names with `_`, so that META had fewer.
        count = len(before) - len(scope["headers"])
    # A middleware before ours may have read it.
    request.__dict__.pop("headers", None)
    if count:
        judge().warn_of_removal(request.META.get("REMOTE_PORT"))


def _development(request: Any, outcome: Outcome) -> Outcome:
    """The fixed identity of `DEV_IDENTITY` for requests without one, with DEBUG and from this machine only."""
    members = settings().dev_identity
    if members is None or outcome.problem is not IDENTITY_MISSING or not django_settings.DEBUG:
        return outcome
    if not _is_from_this_machine(request):
        return outcome
    known = {"tenant": settings().fixed_tenant, "is_test": False, "key_id": "key_development", **members}
    identity = Identity(**{**known, "scopes": frozenset(members.get("scopes", ()))})
    return Outcome(identity, None, is_trusted=outcome.is_trusted)


def _is_from_this_machine(request: Any) -> bool:
    headers = judge().headers
    scope = getattr(request, "scope", None)
    if scope is None:
        return _LOOPBACK.peer_is_trusted_wsgi(request.META, headers.present_environ(request.META).forwarding)
    return _LOOPBACK.peer_is_trusted_asgi(scope, headers.present_pairs(scope["headers"]).forwarding)


def identity_of(request: HttpRequest) -> Identity | None:
    """The verified identity of a request."""
    return resolve(request).identity


def response_of(problem: Problem) -> HttpResponse:
    """The response to a request with this problem."""
    body = problem.body()
    return HttpResponse(body, status=problem.status, headers=dict(problem.all_headers(body)))

"""Authenticated requests of requests."""

from __future__ import annotations

import time
import traceback
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.exceptions import UnrewindableBodyError
from requests.utils import rewind_body

from keyproxy_client.acting import Acting
from keyproxy_client.outgoing.authorizer import AUTHORIZATION, Authorizer, Credential
from keyproxy_client.outgoing.origin import Origin
from keyproxy_client.outgoing.repetition import is_refusal


class _HiddenValue(str):
    """The value of a header that neither `repr` shows, as of all headers of a request, nor a pickle contains."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'[secure]'"

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("[secure]",)


def authenticate(authorizer: Authorizer, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the credential to a request, and the hook that repeats it."""
    _check_origin(authorizer.origin, request)
    user = authorizer.acting()
    credential = authorizer.credential(user)
    _remove(authorizer, request)
    _add(authorizer, request, credential)
    request.register_hook("response", _Repeater(authorizer, user, credential))
    return request


def _check_origin(origin: Origin, request: requests.PreparedRequest) -> None:
    parts = urlsplit(request.url or "")
    origin.check(parts.scheme, parts.hostname or "", parts.port)


class _Repeater:
    """The hook of one request. Copies of the request for redirects have it too, but not its credential."""

    def __init__(self, authorizer: Authorizer, user: Acting | None, credential: Credential) -> None:
        self._authorizer = authorizer
        self._user = user
        self._credential = credential

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()

    def __call__(self, response: requests.Response, **options: Any) -> requests.Response:
        """The response, or the one to its repetition."""
        request = response.request
        if request.headers.get(AUTHORIZATION) != self._credential.authorization:
            return response
        repetitions = self._authorizer.repetitions()
        while self._is_to_be_repeated(response, repetitions) and _rewind(request):
            response = _repeat(response, options)
        if response.is_redirect:
            # The next request is a copy of this one. requests removes Authorization for some origins only.
            _remove(self._authorizer, request)
        return response

    def _is_to_be_repeated(self, response: requests.Response, repetitions: Any) -> bool:
        """Prepare the repetition, if there is to be one."""
        request = response.request
        status, header_of = response.status_code, response.headers.get
        if not _is_replayable(request):
            return False
        if repetitions.may_renew(status, header_of):
            renewed = self._authorizer.renewed(self._credential, self._user)
            if renewed is None:
                return False
            self._credential = renewed
            _add(self._authorizer, request, renewed)
            return True
        wait = repetitions.wait_seconds(status, header_of)
        if wait is None or not is_refusal(response.content):
            return False
        time.sleep(wait)
        return True


class _Inert:
    """The hook of a request that was pickled."""

    def __call__(self, response: requests.Response, **_options: Any) -> requests.Response:
        return response


def _add(authorizer: Authorizer, request: requests.PreparedRequest, credential: Credential) -> None:
    request.headers[AUTHORIZATION] = _HiddenValue(credential.authorization)
    if credential.act_for is not None:
        request.headers[authorizer.act_for_header] = credential.act_for


def _remove(authorizer: Authorizer, request: requests.PreparedRequest) -> None:
    for name in [name for name in request.headers if authorizer.is_replaced(name)]:
        del request.headers[name]


def _is_replayable(request: requests.PreparedRequest) -> bool:
    """Whether the body is in memory, or a file of which requests knows the start."""
    return request.body is None or isinstance(request.body, str | bytes) or _has_start(request)


def _has_start(request: requests.PreparedRequest) -> bool:
    return isinstance(request._body_position, int)  # noqa: SLF001 - has no public name


def _rewind(request: requests.PreparedRequest) -> bool:
    if not _has_start(request):
        return True
    try:
        rewind_body(request)
    except UnrewindableBodyError:
        return False
    return True


def _repeat(response: requests.Response, options: dict[str, Any]) -> requests.Response:
    _ = response.content  # returns the connection to the pool
    response.close()
    started = time.perf_counter()
    repeated: requests.Response = response.connection.send(response.request, **options)
    repeated.elapsed = timedelta(seconds=time.perf_counter() - started)
    repeated.history = [*response.history, response]
    return repeated


def _clear_frames(error: BaseException) -> None:
    """Clear the local variables of the frames that an exception and its causes keep.

    If no connection can be made, those of `http.client` hold the bytes of the request, and what collects local variables
    for reports of errors would collect the secret.
    """
    found, seen = [error], set[int]()
    while found:
        one = found.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        related = (one.__cause__, one.__context__, getattr(one, "reason", None), *one.args)
        found += [other for other in related if isinstance(other, BaseException)]


class OriginSession(requests.Session):
    """A session whose URLs may be paths of one origin."""

    def __init__(self, authorizer: Authorizer) -> None:
        super().__init__()
        self._origin = authorizer.origin
        self.auth = lambda request: authenticate(authorizer, request)

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """The request to send, with an absolute URL."""
        if isinstance(request.url, str) and (request.url.startswith("/") or "://" not in request.url):
            request.url = f"{self._origin}/{request.url.removeprefix('/')}"
        return super().prepare_request(request)

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request. Raises WrongOrigin if its URL was changed after it was authenticated."""
        if isinstance(request.headers.get(AUTHORIZATION), _HiddenValue):
            _check_origin(self._origin, request)
        try:
            return super().send(request, **options)
        except requests.RequestException as error:
            _clear_frames(error)
            raise

"""Authenticated requests of httpx, synchronous and asynchronous."""

from __future__ import annotations

import time
import weakref
from collections.abc import AsyncGenerator, Generator
from typing import Any

import anyio
import httpx

from keyproxy_client.outgoing.authorizer import AUTHORIZATION, Authorizer, Credential
from keyproxy_client.outgoing.repetition import is_refusal


class CredentialHeaders(httpx.Headers):
    """The headers of a request, and those of its credential, which only `raw` contains: what transports send.

    Copies do not contain them, so neither the requests that follow redirects do, nor `repr`, nor a pickle. `request`:
    the one request that they are for. Hooks and transports may change its URL after it was authenticated.
    """

    def __init__(self, authorizer: Authorizer, request: httpx.Request, added: list[tuple[bytes, bytes]]) -> None:
        super().__init__(_plain_headers(authorizer, request))
        self._authorizer = authorizer
        self._request = weakref.ref(request)
        self._added = added

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        """All header fields, as bytes. Raises WrongOrigin if the request does not go to the origin any more."""
        request = self._request()
        if request is None:
            return super().raw
        _check_origin(self._authorizer, request)
        return [*super().raw, *self._added]

    def copy(self) -> httpx.Headers:
        """The headers without the credential."""
        return httpx.Headers(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return httpx.Headers, (self.multi_items(),)


def flow(authorizer: Authorizer, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
    """The requests of a synchronous client for one request of the caller."""
    _check_origin(authorizer, request)
    user = authorizer.acting()
    credential = authorizer.credential(user)
    repetitions = authorizer.repetitions()
    while True:
        request.headers = _with_credential(authorizer, request, credential)
        response = yield request
        if response.request is not request or not _is_replayable(request):
            return
        status, header_of = response.status_code, response.headers.get
        if repetitions.may_renew(status, header_of):
            renewed = authorizer.renewed(credential, user)
            if renewed is None:
                return
            credential = renewed
            continue
        wait = repetitions.wait_seconds(status, header_of)
        if wait is None or not is_refusal(_unread(response, b"".join(response.iter_raw()))):
            return
        time.sleep(wait)


async def flow_async(authorizer: Authorizer, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
    """The requests of an asynchronous client for one request of the caller."""
    _check_origin(authorizer, request)
    user = await authorizer.acting_async()
    credential = await authorizer.credential_async(user)
    repetitions = authorizer.repetitions()
    while True:
        request.headers = _with_credential(authorizer, request, credential)
        response = yield request
        if response.request is not request or not _is_replayable(request):
            return
        status, header_of = response.status_code, response.headers.get
        if repetitions.may_renew(status, header_of):
            renewed = await authorizer.renewed_async(credential, user)
            if renewed is None:
                return
            credential = renewed
            continue
        wait = repetitions.wait_seconds(status, header_of)
        if wait is None or not is_refusal(_unread(response, b"".join([part async for part in response.aiter_raw()]))):
            return
        # Of anyio, which httpx uses: an application may run on trio.
        await anyio.sleep(wait)


def _check_origin(authorizer: Authorizer, request: httpx.Request) -> None:
    url = request.url
    authorizer.origin.check(url.scheme, url.raw_host.decode("ascii"), url.port)


def _plain_headers(authorizer: Authorizer, request: httpx.Request) -> httpx.Headers:
    """The headers of the caller. A second Authorization or Act-For would make the request ambiguous."""
    plain = httpx.Headers(request.headers)  # a copy without an earlier credential
    for name in {name.decode("latin-1") for name, _ in plain.raw}:
        if authorizer.is_replaced(name):
            del plain[name]
    return plain


def _with_credential(authorizer: Authorizer, request: httpx.Request, credential: Credential) -> CredentialHeaders:
    added = [(AUTHORIZATION.encode("ascii"), credential.authorization.encode("ascii"))]
    if credential.act_for is not None:
        added.append((authorizer.act_for_header.encode("ascii"), credential.act_for.encode("ascii")))
    return CredentialHeaders(authorizer, request, added)


def _is_replayable(request: httpx.Request) -> bool:
    """Whether the body is in memory, or a form whose files can be read from their start again."""
    stream = request.stream
    if isinstance(stream, httpx.ByteStream):
        return True
    files = [field.file for field in getattr(stream, "fields", ()) if hasattr(field, "file")]
    return bool(files) and all(_is_rereadable(file) for file in files)


def _is_rereadable(file: Any) -> bool:
    return isinstance(file, str | bytes) or (hasattr(file, "seekable") and file.seekable())


def _unread(response: httpx.Response, body: bytes) -> bytes:
    """Give a response back the raw body that was read from it, so that the caller finds it untouched."""
    response.stream = httpx.ByteStream(body)
    response.is_stream_consumed = False
    response.is_closed = False
    return body

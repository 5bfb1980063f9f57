"""The acting user: on whose behalf the current code makes outgoing requests.

`acting()` resolves, first match first:

1. `acting_as(...)` and the task that runs (`task_scope`), the innermost of the two: a task hides what surrounds it, also
   if it runs eagerly within a request, and a task without a user hides it with nothing;
2. the identity of the current request (`request_identity`), which hides what surrounds the request;
3. the authenticated user of the current request, looked up only now, because frameworks such as DRF authenticate late.

Context variables hold both, so that threads and event loops keep requests apart. A new thread starts without an acting
user; `asyncio.to_thread` and asgiref copy the context on purpose.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from keyproxy_client import names
from keyproxy_client.identity import Identity


class NoActingUser(RuntimeError):
    """An outgoing request needs an acting user, and there is none. Raised before anything is sent."""

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "no acting user: call within a request, acting_as(user), or a task whose publisher and worker both ran "
            "keyproxy_client.celery.install(app); or pass act_for=None to send the identity of the key itself"
        )


@dataclass(frozen=True, slots=True)
class Acting:
    """A user of keyproxy to act for. `tenant` is None if only the user is known."""

    user: str
    tenant: str | None = None
    is_test: bool = False

    @property
    def test(self) -> bool:
        """`is_test`, by its name in `acting_as`."""
        return self.is_test

    def __post_init__(self) -> None:
        # The values become headers and a part of a file name.
        if not (isinstance(self.user, str) and names.is_id(self.user)):
            raise ValueError("the acting user is not a valid id of a keyproxy user")
        if self.tenant is not None and not (isinstance(self.tenant, str) and names.is_id(self.tenant)):
            raise ValueError("the tenant of the acting user is not a valid id of a keyproxy tenant")
        if not isinstance(self.is_test, bool):
            raise TypeError("the mode of the acting user is neither True nor False")


#: Looks up the authenticated user of a request; None if it is anonymous.
Lookup = Callable[[], Acting | None]
LookupAsync = Callable[[], Awaitable[Acting | None]]


@dataclass(eq=False, slots=True)
class _Scope:
    """What `acting_as` or a task set. Distinguishes "no user" from "not set"."""

    acting: Acting | None
    outer: _Scope | None = None
    #: The block ended while a later one was current. It never applies again, not even when the later one ends.
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class _Request:
    acting: Acting | None
    lookup: Lookup | None
    lookup_async: LookupAsync | None


_scope: Final[ContextVar[_Scope | None]] = ContextVar("keyproxy_client_scope", default=None)
_request: Final[ContextVar[_Request | None]] = ContextVar("keyproxy_client_request", default=None)

#: Converts a framework's user object, such as Django's, for `acting_as`. One per process.
_conversions: Final[list[Callable[[object], Acting]]] = []


def acting() -> Acting | None:
    """The acting user of the current context; None if there is none."""
    scope = _current_scope()
    if scope is not None:
        return scope.acting
    request = _request.get()
    if request is None:
        return None
    if request.acting is not None or request.lookup is None:
        return request.acting
    return request.lookup()


async def acting_async() -> Acting | None:
    """Like `acting()`, for coroutines: a request's user that is still to be looked up does not block the event loop."""
    request = _request.get()
    if _current_scope() is None and request is not None and request.acting is None and request.lookup_async is not None:
        return await request.lookup_async()
    return acting()


def _current_scope() -> _Scope | None:
    scope = _scope.get()
    while scope is not None and scope.has_ended:
        scope = scope.outer
    return scope


@contextmanager
def acting_as(user: object, tenant: str | None = None, test: bool = False) -> Iterator[Acting]:
    """Act for a user within the block, in synchronous and asynchronous code.

    `user` is the id of a keyproxy user; or an Identity or what `acting()` returned, whose tenant and mode are kept,
    such as in a thread that a request starts; or, with the Django integration, a Django user, whose tenant is then the
    default of `tenant`.
    """
    chosen = _converted(user, tenant, test)
    scope = _Scope(chosen, _current_scope())
    _scope.set(scope)
    try:
        yield chosen
    finally:
        if _scope.get() is scope:
            _scope.set(scope.outer)
        else:
            # A generator that was suspended within the block ends when it is collected, perhaps within a later task.
            # Restoring what surrounded the block would make that task act for the user of an earlier one.
            scope.has_ended = True


def convert_users_by(conversion: Callable[[object], Acting]) -> None:
    """Set how `acting_as` converts user objects of a framework. For integrations."""
    _conversions[:] = [conversion]


def _converted(user: object, tenant: str | None, test: bool) -> Acting:
    if isinstance(user, str):
        return Acting(user, tenant, test)
    if isinstance(user, Acting | Identity):
        return Acting(user.user, user.tenant if tenant is None else tenant, test or user.is_test)
    if not _conversions:
        raise TypeError(f"acting_as expects the id of a keyproxy user, not {type(user).__name__}")
    converted = _conversions[0](user)
    return Acting(converted.user, converted.tenant if tenant is None else tenant, test)


def enter_task(chosen: Acting | None) -> Token[_Scope | None]:
    """Begin a task of a user, or of none, which hides the context around it. For integrations that have two hooks."""
    return _scope.set(_Scope(chosen))


def leave_task(token: Token[_Scope | None]) -> None:
    """End a task: restore the context that `enter_task` replaced."""
    _scope.reset(token)


def enter_inherited() -> Token[_Scope | None]:
    """Like `enter_task`, for a task that shares the acting user of its caller."""
    return _scope.set(_scope.get())


@contextmanager
def task_scope(chosen: Acting | None) -> Iterator[None]:
    """A task of a user, or of none, which hides the context around it. For integrations."""
    token = enter_task(chosen)
    try:
        yield
    finally:
        leave_task(token)


class request_identity:  # noqa: N801 - used like a function, in a with statement
    """The context of one request, for middlewares; sets an empty one if there is no identity.

    `lookup` finds the authenticated user of a request without identity, lazily; `lookup_async` does it for coroutines.
    It hides the blocks of `acting_as` around it, which an earlier request of the thread may have left, and keeps those
    that begin within it: a request may be entered for each part of its body, which is made within one block.
    """

    __slots__ = ("_kept", "_request", "_scope_token", "_token")

    def __init__(
        self, identity: Identity | None, lookup: Lookup | None = None, lookup_async: LookupAsync | None = None
    ) -> None:
        chosen = None if identity is None else Acting(identity.user, identity.tenant, identity.is_test)
        self._request = _Request(chosen, lookup, lookup_async)
        self._kept: _Scope | None = None
        self._token: Token[_Request | None] | None = None
        self._scope_token: Token[_Scope | None] | None = None

    def __enter__(self) -> Self:
        self._token = _request.set(self._request)
        self._scope_token = _scope.set(self._kept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        token, scope_token = self._token, self._scope_token
        self._token = self._scope_token = None
        if token is not None and scope_token is not None:
            self._kept = _scope.get()
            _scope.reset(scope_token)
            _request.reset(token)

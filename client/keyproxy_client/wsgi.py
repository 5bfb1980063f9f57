"""Identity for WSGI applications: `IdentityMiddleware(app, trust=Trust.unix())`.

The identity is `environ["keyproxy.identity"]`; None if there is none.
"""

from __future__ import annotations

import http
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from keyproxy_client.acting import request_identity
from keyproxy_client.incoming.identity_headers import DEFAULT_PREFIX
from keyproxy_client.incoming.judge import Judge
from keyproxy_client.incoming.problems import Problem
from keyproxy_client.incoming.trust import Trust
from keyproxy_client.incoming.verified_identity import ENVIRON_KEY

__all__ = ["PROBLEM_KEY", "IdentityMiddleware"]

#: The variable with the response to a request without identity, for applications that require one: a Problem.
PROBLEM_KEY: Final = "keyproxy.problem"

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


class IdentityMiddleware:
    """Sets the identity of each request, and removes identity headers that are not trusted.

    It must see the connection as the server does: put it outside every middleware that changes REMOTE_ADDR, such as
    Werkzeug's ProxyFix. `header_prefix`: as `identity.header_prefix` of the proxy.
    """

    def __init__(self, app: Application, *, trust: Trust, header_prefix: str = DEFAULT_PREFIX) -> None:
        self._app: Final = app
        self._judge: Final = Judge(trust, header_prefix=header_prefix)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request of WSGI."""
        outcome = self._judge.wsgi(environ)
        if outcome.is_rejected and outcome.problem is not None:
            return respond(outcome.problem, start_response)
        if not outcome.is_trusted and self._judge.headers.remove_from(environ):
            self._judge.warn_of_removal(environ.get("REMOTE_PORT"))
        environ[ENVIRON_KEY] = outcome.identity
        environ[PROBLEM_KEY] = outcome.problem
        context = request_identity(outcome.identity)
        with context:
            body = self._app(environ, start_response)
        return body if _runs_no_code(body, environ) else _Body(body, context)


def respond(problem: Problem, start_response: StartResponse) -> list[bytes]:
    """Respond to a request of WSGI with a problem."""
    body = problem.body()
    status = http.HTTPStatus(problem.status)
    start_response(f"{status.value} {status.phrase}", problem.all_headers(body))
    return [body]


def _runs_no_code(body: Iterable[bytes], environ: Environ) -> bool:
    """Whether a body may go to the server as it is: servers send files and lists in faster ways."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(body, list | tuple) or (isinstance(wrapper, type) and isinstance(body, wrapper))


class _Body:
    """A body whose iteration runs code of the application: each step has the context of its request.

    Between steps the server does other things, and not every server closes every body.
    """

    __slots__ = ("_body", "_context", "_parts")

    def __init__(self, body: Iterable[bytes], context: request_identity) -> None:
        self._body: Final = body
        self._context: Final = context
        with context:
            self._parts: Final[Iterator[bytes]] = iter(body)

    def __iter__(self) -> _Body:
        return self

    def __next__(self) -> bytes:
        with self._context:
            return next(self._parts)

    def close(self) -> None:
        """Close the body of the application."""
        close = getattr(self._body, "close", None)
        if close is not None:
            with self._context:
                close()

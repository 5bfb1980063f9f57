"""The errors of the protocol: RFC 6749 sections 4.1.2.1 and 5.2, RFC 7591 section 3.2.2, RFC 8707 section 2."""

from __future__ import annotations

from collections.abc import Mapping


class OAuthError(Exception):
    """A request that is refused with one of the registered error codes.

    `code`: for the client, such as `invalid_grant`. `description`: for its developer; it holds nothing of the request
    that was not checked for secrets. `detail`: for the operator's log. `headers`: further header fields of the response.
    """

    def __init__(
        self,
        code: str,
        description: str,
        *,
        status: int = 400,
        detail: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, description)
        self.code = code
        self.description = description
        self.status = status
        self.detail = detail
        self.headers = headers

"""Why a client is refused before anything is issued to it. None of these errors may lead to a redirect."""

from __future__ import annotations


class ClientRefused(Exception):
    """A client that cannot be served. `detail`: for the operator's log."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class UnknownClient(ClientRefused):
    """A client id that is neither registered, listed, a document nor a value, or that the policy excludes."""


class ClientDisabled(ClientRefused):
    """A client that an operator has disabled. `row_id`: its row."""

    def __init__(self, row_id: str) -> None:
        super().__init__(f"client {row_id} is disabled")
        self.row_id = row_id


class DocumentRefused(ClientRefused):
    """A metadata document, or a document with keys, that cannot be fetched or is not acceptable."""


class DocumentUnavailable(DocumentRefused):
    """A document whose server cannot be reached now, or does not respond in time."""


class TooManyDocuments(ClientRefused):
    """Too many documents are being fetched at once. `retry_seconds`: when to try again."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__("too many documents are being fetched at once")
        self.retry_seconds = retry_seconds


class RedirectRefused(ClientRefused):
    """A redirect URI that is missing, or is not one of the client's."""

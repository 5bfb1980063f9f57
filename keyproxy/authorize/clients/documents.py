"""The metadata documents of clients and their key sets, fetched from the URLs that clients name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from keyproxy.authorize.clients.document_cache import DocumentCache
from keyproxy.authorize.clients.document_fetcher import DocumentFetcher
from keyproxy.model import Moment
from keyproxy.oauth import client_document
from keyproxy.oauth.client import Client, ClientKind
from keyproxy.oauth.client_document import DocumentUrl
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.client_refusals import DocumentRefused, UnknownClient
from keyproxy.oauth.known_clients import KnownClient
from keyproxy.signing.compact_jwt import JwtFault
from keyproxy.signing.key_sets import KeySet

#: A key set is fetched again for a key that it does not have, but not more often than this.
_KEYS_AGE_SECONDS: Final = 30.0


class Documents:
    """Metadata documents and key sets. The policy decides which are fetched at all."""

    def __init__(
        self,
        policy: ClientPolicy,
        fetcher: DocumentFetcher,
        *,
        now: Callable[[], Moment],
        count: Callable[[str], None],
    ) -> None:
        """`count`: counts fetches by their outcome: `ok`, `refused` or `unavailable`."""
        self._policy = policy
        self._clients = DocumentCache(
            fetcher,
            lambda url, content: client_document.client_of(url, content, policy.known.schemes),
            now=now,
            count=count,
        )
        self._keys = DocumentCache(fetcher, _key_set, now=now, count=count)

    def url(self, client_id: str, known: KnownClient | None = None) -> DocumentUrl:
        """The URL of a document that the policy allows, or that of a known client. Raises UnknownClient."""
        url = client_document.document_url(client_id)
        if url is None:
            raise UnknownClient("the client id is not the URL of a document")
        if not self._allows(url, known):
            raise UnknownClient("documents of this host are not accepted here")
        return url

    def cached(self, client_id: str) -> Client | None:
        """The client as its document in memory describes it, however old that is."""
        return self._clients.cached(client_id)

    async def client(self, client_id: str, *, before_fetch: Callable[[], None]) -> Client:
        """The client that the document at this URL describes. Raises ClientRefused."""
        return await self._clients.get(self.url(client_id), before_fetch=before_fetch)

    async def keys_of(self, client: Client, *, before_fetch: Callable[[], None], is_renewed: bool = False) -> KeySet:
        """The keys of a client, none if it has none. Raises ClientRefused.

        Those of a listed client are in the document that its id may be the URL of. Its vendor's hosts are known, so that
        the policy for the documents of strangers does not apply. `is_renewed`: fetch the keys again, unless that was done
        a moment ago.
        """
        known = self._policy.known.by_row(client.client_id) if client.kind is ClientKind.LISTED else None
        if client.kind is not ClientKind.REGISTERED:
            client = await self._clients.get(self.url(client.presented_as, known), before_fetch=before_fetch)
        if client.jwks is not None:
            return _key_set("", client.jwks.encode("utf-8"))
        if not client.jwks_uri:
            return KeySet({"keys": []})
        url = client_document.document_url(client.jwks_uri)
        if url is None or not self._allows(url, known):
            raise DocumentRefused("jwks_uri is not an acceptable URL")
        age = _KEYS_AGE_SECONDS if is_renewed else None
        return await self._keys.get(url, before_fetch=before_fetch, age_seconds_max=age)

    def _allows(self, url: DocumentUrl, known: KnownClient | None) -> bool:
        return self._policy.allows_document(url) or (known is not None and url.host in known.hosts)


def _key_set(_url: str, content: bytes) -> KeySet:
    try:
        return KeySet.parse(content)
    except JwtFault as fault:
        raise DocumentRefused(f"the keys are unusable: {fault}") from fault

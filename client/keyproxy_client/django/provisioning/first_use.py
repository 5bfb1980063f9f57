"""With `PROVISION` "first_use", the first outgoing call for a user creates that user in keyproxy."""

from __future__ import annotations

from asgiref.sync import sync_to_async

from keyproxy_client.acting import Acting
from keyproxy_client.django.provisioning.lifecycle import ensure_acting, is_ensured
from keyproxy_client.outgoing.key_sources import KeySource


class FirstUseKeys:
    """The keys of a service, looked up before each request; the first request for a user creates the user."""

    delegates = True
    chooses_mode = False

    def __init__(self, source: KeySource) -> None:
        self._source = source

    def secret(self, acting: Acting | None) -> str:
        """See KeySource."""
        if acting is not None:
            ensure_acting(acting.user)
        return self._source.secret(acting)

    async def secret_async(self, acting: Acting | None) -> str:
        """See KeySource. Django's database connections belong to its own thread."""
        if acting is not None and not is_ensured(acting.user):
            await sync_to_async(ensure_acting, thread_sensitive=True)(acting.user)
        return await self._source.secret_async(acting)

    def forget(self) -> None:
        """See KeySource."""
        self._source.forget()

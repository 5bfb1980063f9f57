"""What the store has about a tenant for judging its requests."""

from __future__ import annotations

from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class TenantRecords:
    """The owned ids and the registered templates of the caller's tenant. Never waits."""

    def owns(self, kind: str, object_id: str) -> bool:
        """Whether the tenant owns an id; also True if that is not in memory: then `require` raises.

        Raises a Refusal (STORE_UNAVAILABLE).
        """
        raise NotImplementedError

    def lacks(self) -> bool:
        """Whether the owner of an id is not in memory."""
        raise NotImplementedError

    def require(self) -> None:
        """Raise Missing for all ids whose owners are not in memory, so that they are fetched together."""
        raise NotImplementedError

    def category(self, digest: bytes) -> str | None:
        """The category of registered instructions; None if they are not. Raises a Refusal (STORE_UNAVAILABLE)."""
        raise NotImplementedError

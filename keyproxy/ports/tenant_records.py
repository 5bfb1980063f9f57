"""The ports to what the store knows of a tenant: the ids it owns, the templates of its prompts."""

from __future__ import annotations

from keyproxy.model import Moment
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class OwnedIds:
    """Which ids of the upstream's objects belong to which tenant."""

    def is_owned(
        self,
        kind: str,
        id: str,  # noqa: A002 - the name of the column
        tenant_id: str,
        now: Moment,
        *,
        is_first_lookup: bool = True,
    ) -> bool:
        """Whether the tenant owns the id, from memory. Never waits.

        `is_first_lookup`: see `Identities.known`.

        Raises Missing if the store has to be queried, a Refusal (STORE_UNAVAILABLE) if it cannot be queried now.
        """
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class PromptTemplates:
    """The registered templates of instructions."""

    def category(self, digest: bytes, tenant_id: str, now: Moment) -> str | None:
        """The category registered for the digest and visible to the tenant; None: unregistered. Never waits.

        Raises a Refusal (STORE_UNAVAILABLE) before the first load, and once the templates are older than stale_seconds.
        """
        raise NotImplementedError

"""The port through which the gateway resolves credentials."""

from __future__ import annotations

from keyproxy.auth.api_key import SecretKey
from keyproxy.model import Identity, KeyDigest, Missing, Moment
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class Identities:
    """Resolves keys to identities."""

    def known(self, digest: KeyDigest, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The identity behind a digest, from memory. Never waits.

        `is_first_lookup` False: the request has looked it up before, and has waited for the missing value.

        Raises Missing if a store lookup is needed, a Refusal (KEY_INVALID) if the key is cached as unknown, a Refusal
        (STORE_UNAVAILABLE) if it cannot be looked up now.
        """
        raise NotImplementedError

    def acting(self, digest: KeyDigest, user_id: str, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The identity of a key that acts for a user of its tenant, from memory. Never waits.

        Raises what `known` raises. If the credential may not act for this user, or `user_id` is no id, the identity is
        that of the credential itself, with a `standing`: DELEGATION_REFUSED, unless it is refused on its own account.
        """
        raise NotImplementedError

    def reviewed(self, digest: KeyDigest, before: Identity, now: Moment) -> Identity:
        """The identity behind a credential as it is now. Never waits. `before`: what it was resolved to earlier.

        Raises what `known` raises.
        """
        raise NotImplementedError

    def fetching(self, key: SecretKey, missing: Missing) -> Missing:
        """What to fetch after `known` raised `missing`: the same, or also a lookup of a key from another program.

        Raises a Refusal for an agent token whose signature or claims are invalid, or that has expired.
        """
        raise NotImplementedError

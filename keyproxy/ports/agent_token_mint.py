"""The port that mints agent tokens."""

from __future__ import annotations

from keyproxy.auth.minting import MintedToken, MintParent, MintRequest
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class AgentTokenMint:
    """Mints agent tokens."""

    async def mint(self, parent: MintParent, request: MintRequest, *, actor: str) -> MintedToken:
        """Mint a token from its parent, if every bound holds at that moment. A token that is returned exists.

        `actor`: for the audit log, such as `key:<id>`.

        Raises a Refusal: DELEGATION_REFUSED if a bound does not hold, REQUEST_MALFORMED if the signed token would be
        too long, QUOTA_EXHAUSTED if the root key has as many live tokens as it may have, STORE_UNAVAILABLE if the store
        cannot be reached or no key can sign, OVERLOADED if too many tokens are being minted. Then the caller has no
        token, and there is no row unless the store was lost during the statement.
        """
        raise NotImplementedError

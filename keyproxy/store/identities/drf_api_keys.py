"""Keys issued by djangorestframework-api-key, verified by their original hash until their first use here.

Such a key is `<prefix>.<secret>`. Its row is imported with a digest that matches no key, next to the parameters of its
hash. Only a key of this form that is not cached is tried here: its hash is computed as the other program did, and sent to
the database, which compares it and, if it matches, stores the SHA-256 digest. From then on the key is like any other. So
requests with a cached key never run this code, and a request needs the whole key to be accepted.

Keys are verified one at a time, since the older of the two hashes is deliberately slow, and the queue is bounded.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from typing import Final

from keyproxy.auth.api_key import SecretKey
from keyproxy.model import KeyDigest
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable

_FORM = re.compile(rb"([A-Za-z0-9_-]{1,32})\.[^.]{8,}", re.DOTALL)
_SHA512 = re.compile(r"sha512\$\$[0-9a-f]{128}")
_PBKDF2 = re.compile(r"pbkdf2_sha256\$([0-9]{1,7})\$[!-#%-~]{1,64}\$[A-Za-z0-9+/]{43}=")
_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,32}")

#: A hash with this many rounds takes about a second; Django's newest default is a third of it.
_ROUNDS_MAX: Final = 3_000_000
_WAITING_MAX: Final = 100


class DrfApiKeys:
    """Verifies imported keys at their first use: see the module."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = asyncio.Lock()
        self._under_way: dict[KeyDigest, asyncio.Future[None]] = {}

    async def adopt(self, key: SecretKey) -> None:
        """Store the digest of the key, if it is an imported one without a digest. Raises a Refusal if this fails."""
        digest = key.digest()
        others = self._under_way.get(digest)
        if others is not None:
            # Requests with the same key share one attempt; the lookup that follows shows its outcome.
            await asyncio.shield(others)
            return
        if len(self._under_way) >= _WAITING_MAX:
            raise Refusal(Reason.OVERLOADED, "too many imported keys are waiting to be verified")
        done = self._under_way[digest] = asyncio.get_running_loop().create_future()
        try:
            async with self._turn:
                await self._adopt(key, digest)
        except (StoreUnavailable, StoreConflict) as error:
            raise Refusal(Reason.STORE_UNAVAILABLE, str(error)) from error
        finally:
            del self._under_way[digest]
            done.set_result(None)

    async def _adopt(self, key: SecretKey, digest: KeyDigest) -> None:
        # In a transaction, so that a missing privilege does not mark the store as down.
        async with self._database.transaction() as transaction:
            row = await transaction.fetch_row("foreign_recipe", prefix_of(key))
        if row is None:
            return
        shown = await asyncio.to_thread(hashed, key, row["recipe"])
        if shown is not None:
            async with self._database.transaction() as transaction:
                await transaction.fetch("adopt_foreign", prefix_of(key), shown, digest)


def prefix_of(key: SecretKey) -> str | None:
    """The prefix by which a key of this form is found; None for a key of another form."""
    match = _FORM.fullmatch(key.reveal())
    return None if match is None else match[1].decode("ascii")


def hashed(key: SecretKey, recipe: str) -> str | None:
    """The hash of a key by `recipe`, a stored hash without its last part. None for an unknown recipe."""
    if recipe == "sha512$$":
        return recipe + hashlib.sha512(key.reveal()).hexdigest()
    algorithm, _, rest = recipe.partition("$")
    rounds, _, salt = rest.partition("$")
    if algorithm != "pbkdf2_sha256" or not rounds.isdecimal() or not 1 <= int(rounds) <= _ROUNDS_MAX:
        return None
    made = hashlib.pbkdf2_hmac("sha256", key.reveal(), salt.removesuffix("$").encode(), int(rounds))
    return recipe + base64.b64encode(made).decode("ascii")


def why_unusable(prefix: str, stored: str) -> str | None:
    """The reason a prefix and a stored hash cannot be imported; None if they can."""
    if not _PREFIX.fullmatch(prefix):
        return "the prefix must be 1 to 32 letters, digits, _ and -"
    match = _PBKDF2.fullmatch(stored)
    if match is not None and 1 <= int(match[1]) <= _ROUNDS_MAX:
        return None
    if _SHA512.fullmatch(stored):
        return None
    return "hashed_key is neither sha512$$… nor pbkdf2_sha256$…$…$…"

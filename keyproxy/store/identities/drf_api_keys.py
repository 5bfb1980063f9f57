"""Keys that djangorestframework-api-key issued, known by its hash until they are first used here.

Such a key is `<prefix>.<secret>`. Its row is imported with a digest that no key has; how it was hashed is kept beside
it. Only a key of that form, which memory does not know, is tried here: its hash is made as the other program made it, and
shown to the database, which compares it and fills in the SHA-256 digest if it is the one. From then on the key is like
any other. So nothing on the path of a known key knows of this, and nobody is let in who did not show the whole key.

One at a time, since the older of the two hashes is made to be slow; and no more wait than can be dealt with.
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

#: A hash takes a second with so many; Django's newest default is a third of it.
_ROUNDS_MAX: Final = 3_000_000
_WAITING_MAX: Final = 100


class DrfApiKeys:
    """See the module."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = asyncio.Lock()
        self._under_way: dict[KeyDigest, asyncio.Future[None]] = {}

    async def adopt(self, key: SecretKey) -> None:
        """Give the key its digest, if it is one of these and has none yet. Raises a Refusal if that cannot be known."""
        digest = key.digest()
        others = self._under_way.get(digest)
        if others is not None:
            # Whoever presents the same key waits for the one attempt; whatever came of it, the look-up will tell.
            await asyncio.shield(others)
            return
        if len(self._under_way) >= _WAITING_MAX:
            raise Refusal(Reason.OVERLOADED, "too many imported keys wait to be verified")
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
        # In a transaction, so that a right that is missing for this does not count as a store that is down.
        async with self._database.transaction() as transaction:
            row = await transaction.fetch_row("foreign_recipe", prefix_of(key))
        if row is None:
            return
        shown = await asyncio.to_thread(hashed, key, row["recipe"])
        if shown is not None:
            async with self._database.transaction() as transaction:
                await transaction.fetch("adopt_foreign", prefix_of(key), shown, digest)


def prefix_of(key: SecretKey) -> str | None:
    """What a key of this form is found by; None for a key of another form."""
    match = _FORM.fullmatch(key.reveal())
    return None if match is None else match[1].decode("ascii")


def hashed(key: SecretKey, recipe: str) -> str | None:
    """The hash of a key, made as `recipe` says: a stored hash without its last part. None for a recipe nobody knows."""
    if recipe == "sha512$$":
        return recipe + hashlib.sha512(key.reveal()).hexdigest()
    algorithm, _, rest = recipe.partition("$")
    rounds, _, salt = rest.partition("$")
    if algorithm != "pbkdf2_sha256" or not rounds.isdecimal() or not 1 <= int(rounds) <= _ROUNDS_MAX:
        return None
    made = hashlib.pbkdf2_hmac("sha256", key.reveal(), salt.removesuffix("$").encode(), int(rounds))
    return recipe + base64.b64encode(made).decode("ascii")


def why_unusable(prefix: str, stored: str) -> str | None:
    """Why a prefix and a stored hash cannot be imported; None if they can."""
    if not _PREFIX.fullmatch(prefix):
        return "the prefix has other characters than letters, digits, _ and -, or more than 32"
    match = _PBKDF2.fullmatch(stored)
    if match is not None and 1 <= int(match[1]) <= _ROUNDS_MAX:
        return None
    if _SHA512.fullmatch(stored):
        return None
    return "hashed_key is neither sha512$$… nor pbkdf2_sha256$…$…$…"

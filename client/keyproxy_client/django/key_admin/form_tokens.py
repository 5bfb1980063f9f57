"""The one-use tokens of forms that show a secret: submitted twice, a form issues one key.

A token is signed for one staff member, one user and one action, and identifies the request to the directory. That
recognises a repetition: by SQL the key's id derives from the token, in the admin API it is the Idempotency-Key. So there
is no state here that processes would have to share.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

from django.core import signing

_SALT: Final = "keyproxy_client.django.key_admin"

#: The admin API forgets requests after 24 hours.
_AGE_SECONDS_MAX: Final = 3600


class TokenInvalid(Exception):
    """The token of a form is missing, too old, or belongs to another form."""


def new_token(staff_pk: object, user_pk: object, action: str) -> str:
    """A token for one submission of the form."""
    return signing.dumps([secrets.token_urlsafe(18), str(staff_pk), str(user_pk), action], salt=_SALT)


def request_of(token: str, staff_pk: object, user_pk: object, action: str) -> str:
    """The identification of the request. Raises TokenInvalid."""
    try:
        content: Any = signing.loads(token, salt=_SALT, max_age=_AGE_SECONDS_MAX)
    except signing.BadSignature as error:
        raise TokenInvalid("the form is too old: open it again") from error
    nonce, *owner = content
    if owner != [str(staff_pk), str(user_pk), action]:
        raise TokenInvalid("the form belongs to another page: open it again")
    return f"admin.{nonce}"

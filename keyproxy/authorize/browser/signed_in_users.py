"""A user who has signed in, as a part of tickets and of statements."""

from __future__ import annotations

from keyproxy.authorize.browser.tickets import Content
from keyproxy.authorize.endpoint import SignedIn
from keyproxy.store.oauth.authorizations import ConsentingUser


def content_of(user: SignedIn) -> Content:
    """The user for a ticket."""
    return {
        "user_id": user.user_id,
        "tenant_id": user.tenant_id,
        "scopes": None if user.scopes is None else sorted(user.scopes),
        "is_test": user.is_test,
        "via_key": user.via_key,
        "via_issuer": user.via_issuer,
        "via_subject": user.via_subject,
    }


def signed_in_of(content: Content) -> SignedIn:
    """The user of a ticket."""
    scopes = content["scopes"]
    return SignedIn(
        content["user_id"],
        content["tenant_id"],
        scopes=None if scopes is None else frozenset(scopes),
        is_test=content["is_test"],
        via_key=content["via_key"],
        via_issuer=content["via_issuer"],
        via_subject=content["via_subject"],
    )


def consenting(user: SignedIn) -> ConsentingUser:
    """The user for the store."""
    return ConsentingUser(user.user_id, user.via_key, user.via_issuer, user.via_subject)

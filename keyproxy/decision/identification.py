"""Identify a request: find the identity behind its credential, and the user that it acts for. Never waits."""

from __future__ import annotations

from keyproxy.auth import authorization, credentials
from keyproxy.auth.api_key import KeyFormat
from keyproxy.http_messages import RequestHead
from keyproxy.model import Identity, Missing, Moment
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.identities import Identities
from keyproxy.reasons import Reason, Refusal


def identify(
    exchange: Exchange,
    head: RequestHead,
    identities: Identities,
    key_format: KeyFormat,
    *,
    now: Moment,
    is_first_lookup: bool,
) -> Identity:
    """The identity of a request, also one that is then refused. Raises Missing with what to fetch, or a Refusal."""
    digest = exchange.digest = credentials.digest(head, key_format)
    try:
        if head.act_for is None:
            identity = identities.known(digest, now, is_first_lookup=is_first_lookup)
        elif credentials.has_access_token(head, key_format):
            # Its user has consented for itself only; so it is looked up by its digest alone.
            identity = identities.known(digest, now, is_first_lookup=is_first_lookup)
            identity = authorization.refused_delegation(identity)
        else:
            user_id = head.act_for.decode("latin-1")
            identity = identities.acting(digest, user_id, now, is_first_lookup=is_first_lookup)
    except Refusal as refusal:
        # A malformed key is refused as such, without a lookup, whatever the state of the store. A key that the cache
        # refuses by itself was checked before its lookup.
        if refusal.reason is Reason.STORE_UNAVAILABLE:
            credentials.checked(head, key_format)
        raise
    except Missing as missing:
        raise identities.fetching(credentials.checked(head, key_format), missing) from None
    exchange.identity = identity
    session = identity.oauth
    if session is not None and session.bound_to is not None:
        _check_certificate(exchange, session.bound_to)
    return identity


def _check_certificate(exchange: Exchange, bound_to: bytes) -> None:
    """Raise a Refusal unless the connection has the certificate that the access token is bound to. RFC 8705 section 3."""
    peer = exchange.peer
    if peer is None or peer.certificate_digest != bound_to:
        raise Refusal(Reason.KEY_INVALID, "the access token is bound to another certificate than the connection has")


def reviewed(exchange: Exchange, identities: Identities, now: Moment) -> Identity | None:
    """The identity of an exchange in flight as it is now; None if it has none. Raises Missing or a Refusal.

    A credential that has come to stand for another tenant or user is good for new requests only: the upstream serves this
    one to those that it began with.
    """
    before = exchange.identity
    if exchange.digest is None or before is None or exchange.is_over:
        return None
    identity = identities.reviewed(exchange.digest, before, now)
    is_same = identity.owner == before.owner and identity.actor_user_id == before.actor_user_id
    # One that may not act any more, or does not work at all, is refused for that.
    if not is_same and identity.standing is None:
        raise Refusal(Reason.KEY_INVALID, "the credential stands for another user or tenant than at the beginning")
    session = identity.oauth
    if session is not None and session.bound_to is not None:
        _check_certificate(exchange, session.bound_to)
    return identity

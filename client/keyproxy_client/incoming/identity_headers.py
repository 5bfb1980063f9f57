"""Reads the identity headers of a request, whatever the interface: ASGI, WSGI or a mapping.

keyproxy removes every header under its prefix from what clients send, in any spelling, and adds each of its own once. So
a repeated header, or one with `_` or `.` for `-`, shows that something other than keyproxy changed the request.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Final

from keyproxy_client import names
from keyproxy_client.incoming.verified_identity import Identity, IdentityInvalid

DEFAULT_PREFIX: Final = "X-Keyproxy-"

#: The headers that state an identity, without the prefix; the first five are always there together.
_NAMES: Final = ("User", "Tenant", "Scope", "Test", "Key-Id", "Actor", "Agent", "Assertion")
_USER, _TENANT, _SCOPE, _TEST, _KEY_ID, _ACTOR, _AGENT, _ASSERTION = range(len(_NAMES))
_REQUIRED_COUNT: Final = 5
#: Kinds of other headers: of no interest; under the prefix in another spelling; naming the client before a proxy.
_OTHER: Final = -1
_MISSPELLED: Final = -2
_FORWARDING: Final = -3

_FORWARDING_NAMES: Final = ("x-forwarded-for", "x-forwarded-port", "forwarded")
_FORWARDING_VARIABLES: Final = ("HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_PORT", "HTTP_FORWARDED")
_PREFIX: Final = re.compile(r"X-[A-Za-z0-9-]{1,40}-")
_ENVIRON_PREFIX: Final = "HTTP_"
_TEST_VALUES: Final = {"true": True, "false": False}
_SCOPES: Final = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}(?: [A-Za-z0-9][A-Za-z0-9._:/-]{0,63}){0,127})?")

#: Bounds of what is kept between requests. At the bound the table is cleared.
_NAMES_KEPT_MAX: Final = 2048
_NAME_CHARACTERS_KEPT_MAX: Final = 48
_IDENTITIES_KEPT_MAX: Final = 1024

_Value = str | bytes


class PresentedHeaders:
    """The headers of one request that concern its identity, as they came; nothing about them is verified.

    `values`: by position in `_NAMES`. `fault`: why they cannot be keyproxy's, empty if nothing shows that. `forwarding`:
    the values of Forwarded, X-Forwarded-For and -Port, by which a server may have rewritten the peer's address.
    """

    __slots__ = ("fault", "forwarding", "values")

    def __init__(self) -> None:
        self.values: list[Any] = [None] * len(_NAMES)
        self.fault = ""
        self.forwarding: list[_Value] | None = None

    @property
    def assertion(self) -> str | None:
        """The signed assertion, None if there is none."""
        value = self.values[_ASSERTION]
        return value.decode("latin-1") if isinstance(value, bytes) else value

    def __repr__(self) -> str:
        present = ", ".join(name for name, value in zip(_NAMES, self.values, strict=True) if value is not None)
        return f"PresentedHeaders({present or 'none'}{', ' if self.fault else ''}{self.fault})"


class IdentityHeaders:
    """The identity headers under one prefix, as `identity.header_prefix` of the proxy. Safe in threads."""

    __slots__ = ("_canonical_prefix", "_environ_names", "_identities", "_kinds", "prefix")

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        """Raises ValueError for a prefix that keyproxy refuses too."""
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ValueError("the prefix of the identity headers must look like 'X-Name-'")
        self.prefix: Final = prefix
        self._canonical_prefix: Final = prefix.lower()
        self._environ_names: Final = tuple(_environ_name(prefix + name) for name in _NAMES)
        self._kinds: dict[_Value, int] = {}
        self._identities: dict[tuple[Any, ...], Identity] = {}

    def present(self, headers: Any) -> PresentedHeaders:
        """Collect from ASGI's pairs, a WSGI environ, or a mapping of names to values."""
        if not isinstance(headers, list) and isinstance(headers, Mapping) and _is_environ(headers):
            return self.present_environ(headers)
        return self.present_pairs(headers.items() if hasattr(headers, "items") else headers)

    def present_pairs(self, pairs: Iterable[tuple[_Value, _Value]]) -> PresentedHeaders:
        """Collect from pairs of name and value, in which a name may occur several times."""
        found = PresentedHeaders()
        values, kinds = found.values, self._kinds
        for name, value in pairs:
            kind = kinds.get(name)
            if kind is None:
                kind = self._kind(name)
            if kind == _OTHER:
                continue
            if kind >= 0:
                if values[kind] is not None:
                    found.fault = "a header occurs twice"
                values[kind] = value
            elif kind == _MISSPELLED:
                found.fault = "a header is spelled with _ or . for -"
            elif found.forwarding is None:
                found.forwarding = [value]
            else:
                found.forwarding.append(value)
        return found

    def present_environ(self, environ: Mapping[str, Any]) -> PresentedHeaders:
        """Collect from a WSGI environ, in which servers join repeated headers by commas: no valid value has one."""
        found = PresentedHeaders()
        found.values = [environ.get(name) for name in self._environ_names]
        forwarding = [environ[name] for name in _FORWARDING_VARIABLES if name in environ]
        found.forwarding = forwarding or None
        return found

    def identity(self, presented: PresentedHeaders) -> Identity | None:
        """The identity that the headers state, None if there is none. Raises IdentityInvalid."""
        if presented.fault:
            raise IdentityInvalid(presented.fault)
        key = tuple(presented.values[:_ASSERTION])
        try:
            known = self._identities.get(key)
        except TypeError:
            raise IdentityInvalid("a value is neither text nor bytes") from None
        if known is not None:
            return known
        if key.count(None) == len(key):
            return None
        if None in key[:_REQUIRED_COUNT]:
            raise IdentityInvalid("a header is missing")
        identity = _parsed(key)
        if len(self._identities) >= _IDENTITIES_KEPT_MAX:
            self._identities.clear()
        self._identities[key] = identity
        return identity

    def agrees(self, presented: PresentedHeaders, identity: Identity) -> bool:
        """Whether the plain headers, as far as they are there, state this identity."""
        present = presented.values[:_ASSERTION]
        if present.count(None) == len(present):
            return True
        try:
            if None not in present[:_REQUIRED_COUNT]:
                return self.identity(presented) == identity
            stated = list(map(_text, present))
        except IdentityInvalid:
            return False
        if stated[_SCOPE] is not None:
            stated[_SCOPE] = frozenset(stated[_SCOPE].split())
        is_test = "true" if identity.is_test else "false"
        own = (
            identity.user,
            identity.tenant,
            identity.scopes,
            is_test,
            identity.key_id,
            identity.actor,
            identity.agent,
        )
        return all(one is None or one == other for one, other in zip(stated, own, strict=True))

    def without(self, pairs: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers of an ASGI scope without all those under the prefix."""
        return [pair for pair in pairs if not _canonical(pair[0]).startswith(self._canonical_prefix)]

    def remove_from(self, environ: MutableMapping[str, Any]) -> int:
        """Remove all headers under the prefix from a WSGI environ, or from Django's `request.META`: how many."""
        start = _canonical(_ENVIRON_PREFIX) + self._canonical_prefix
        found = [name for name in environ if name.startswith(_ENVIRON_PREFIX) and _canonical(name).startswith(start)]
        for name in found:
            del environ[name]
        return len(found)

    def _kind(self, name: _Value) -> int:
        kind = self._judged_kind(name)
        if len(name) <= _NAME_CHARACTERS_KEPT_MAX:
            if len(self._kinds) >= _NAMES_KEPT_MAX:
                self._kinds.clear()
            self._kinds[name] = kind
        return kind

    def _judged_kind(self, name: _Value) -> int:
        canonical = _canonical(name)
        if canonical in _FORWARDING_NAMES:
            return _FORWARDING
        if not canonical.startswith(self._canonical_prefix):
            return _OTHER
        plain = name.decode("latin-1") if isinstance(name, bytes) else name
        if plain.lower() != canonical:
            return _MISSPELLED
        for kind, own in enumerate(_NAMES):
            if canonical == (self.prefix + own).lower():
                return kind
        return _OTHER

    def __repr__(self) -> str:
        return f"IdentityHeaders({self.prefix!r})"


@functools.lru_cache(maxsize=8)
def headers_under(prefix: str) -> IdentityHeaders:
    """The identity headers under this prefix: one object per process, which caches how names are spelled."""
    return IdentityHeaders(prefix)


def read(headers: Any, *, prefix: str = DEFAULT_PREFIX) -> Identity | None:
    """The identity that the headers of a request state; None if they state none.

    `headers`: the pairs of an ASGI scope, a WSGI environ, or a mapping of names to values. `prefix`: as
    `identity.header_prefix` of the proxy. Raises IdentityInvalid for a repeated header, an incomplete set, or a value
    outside keyproxy's patterns.
    """
    known = headers_under(prefix)
    return known.identity(known.present(headers))


def _parsed(values: tuple[Any, ...]) -> Identity:
    user, tenant, scope, test, key_id, actor, agent = map(_text, values)
    is_test = _TEST_VALUES.get(test)
    are_ids = (
        names.is_id(user) and names.is_id(tenant) and names.is_id(key_id) and (actor is None or names.is_id(actor))
    )
    is_valid = are_ids and _SCOPES.fullmatch(scope) is not None and (agent is None or names.is_agent(agent))
    if is_test is None or not is_valid:
        raise IdentityInvalid("a value is outside keyproxy's patterns")
    return Identity(user, tenant, frozenset(scope.split()), is_test, key_id, actor, agent)


def _text(value: Any) -> Any:
    """None stays None."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if value is None or isinstance(value, str):
        return value
    raise IdentityInvalid("a value is neither text nor bytes")


def _canonical(name: _Value) -> str:
    """A name as servers compare it that turn headers into variables: in lower case, with `-` for `_` and `.`."""
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    return text.lower().replace("_", "-").replace(".", "-")


def _is_environ(mapping: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a WSGI environ and not one of headers.

    The difference matters: a client may send a header called HTTP_X_KEYPROXY_USER, or REQUEST_METHOD, which keyproxy
    forwards. No header has a tuple as its value, and no environ has a `-` in a name; keyproxy's own headers all do.
    """
    if isinstance(mapping.get("wsgi.version"), tuple):
        return True
    return all(isinstance(name, str) and "-" not in name for name in mapping)


def _environ_name(header: str) -> str:
    return _ENVIRON_PREFIX + header.upper().replace("-", "_")

"""What credentials of upstreams, `[[providers]]`, contradict. Each function yields one sentence per fault."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from keyproxy.config import addresses
from keyproxy.config.tools.provider_settings import ProviderRow
from keyproxy.http.headers import FieldNames, Kind

_PLACE: Final = "{secret}"

#: What a provider's header may be. Every other kind has a meaning to this proxy, or frames the message.
_ALLOWED: Final = frozenset({Kind.PLAIN, Kind.CREDENTIAL})

#: Plain fields of a request that describe its body, which goes upstream as the client has sent it.
_OF_THE_BODY: Final = frozenset({b"content-encoding", b"content-range", b"content-digest", b"content-md5", b"digest"})

#: Visible ASCII and single spaces between: what a header value can contain.
_FORMAT: Final = re.compile(r"[!-~]+(?: [!-~]+)*")


def provider_faults(
    providers: Sequence[ProviderRow], *, header_prefix: str, has_key_file: bool, upstreams: Mapping[str, str]
) -> Iterator[str]:
    """The faults of `[[providers]]`. `upstreams`: the URL of each, by its configuration key."""
    names = [row.name for row in providers]
    fields = FieldNames(header_prefix)
    plaintext = [key for key, url in upstreams.items() if is_plaintext(url)]
    for number, row in enumerate(providers, start=1):
        place = f"providers[{number}]"
        if row.name in names[: number - 1]:
            yield f"{place}.name: {row.name!r} is configured twice"
        header = row.header.encode("utf-8")
        if fields.kind(header) not in _ALLOWED or header.lower() in _OF_THE_BODY:
            yield f"{place}.header: {row.header!r} is not a header that can hold a credential"
        if row.format.count(_PLACE) != 1:
            yield f"{place}.format: must have exactly one {_PLACE}"
        elif _FORMAT.fullmatch(row.format) is None:
            yield f"{place}.format: must have only visible ASCII characters and single spaces between them"
        if not (row.secret_file or row.test_secret_file or row.sealed):
            yield f"{place}: has no secret: set secret_file, or sealed = true"
        if row.sealed and not has_key_file:
            yield f"{place}.sealed: needs secrets.key_file, whose keys open sealed secrets"
        if plaintext and not row.allow_plaintext:
            yield (
                f"{place}.allow_plaintext: must be true, because {plaintext[0]} has no TLS and is not on this machine:"
                " the secret can be read on the network"
            )


def route_faults(rows: Sequence[Any], providers: Sequence[ProviderRow]) -> Iterator[str]:
    """The faults of `provider` of the `RouteRow`s."""
    names = {row.name for row in providers}
    for number, row in enumerate(rows, start=1):
        if row.provider and row.provider not in names:
            yield f"routes[{number}].provider: there is no provider {row.provider!r} in [[providers]]"


def is_plaintext(url: str) -> bool:
    """Whether requests to this upstream can be read on the network: it has no TLS, and is not on this machine."""
    if url.startswith("unix:"):
        return False
    parts = urlsplit(url)
    hosts = addresses.literal(parts.hostname or "")
    return parts.scheme == "http" and not all(not isinstance(host, str) and host.is_loopback for host in hosts)

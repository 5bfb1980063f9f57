"""The one origin that receives the credential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

#: A WebSocket handshake is a request to the same server.
_SCHEMES: Final = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
_PORTS: Final = {"http": 80, "https": 443}


class WrongOrigin(ValueError):
    """A request to another origin than the configured one. Raised before anything is sent; shows no path or query."""

    def __init__(self, wanted: object, expected: Origin) -> None:
        super().__init__(f"the request goes to {wanted}, but the credential is only for {expected}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port. `host` is in lower case and in ASCII, an IPv6 address without brackets."""

    scheme: str
    host: str
    port: int

    @classmethod
    def configured(cls, text: str) -> Self:
        """The origin of a setting, which has no path, query or user. Raises ValueError."""
        parts = urlsplit(text)
        port = parts.port  # raises ValueError for a port out of range
        is_bare = parts.path in ("", "/") and not parts.query and not parts.fragment and "@" not in parts.netloc
        if parts.scheme not in _PORTS or not parts.hostname or not is_bare:
            raise ValueError("an origin is scheme, host and port only, such as 'https://api.example.com'")
        return cls(parts.scheme, _ascii(parts.hostname), port or _PORTS[parts.scheme])

    @property
    def is_encrypted(self) -> bool:
        """Whether its connections are encrypted up to the server, also through a proxy."""
        return self.scheme == "https"

    def check(self, scheme: str, host: str, port: int | None) -> None:
        """Check that a request goes here. Raises WrongOrigin."""
        if not self.is_of(scheme, host, port):
            raise WrongOrigin(f"{scheme}://{host}" + ("" if port is None else f":{port}"), self)

    def is_of(self, scheme: str, host: str, port: int | None) -> bool:
        """Whether a request to this scheme, host and port (None: the scheme's) goes here."""
        plain = _SCHEMES.get(scheme.lower(), scheme)
        return plain == self.scheme and (port or _PORTS[plain]) == self.port and host.strip("[]").lower() == self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == _PORTS[self.scheme] else f":{self.port}")


def _ascii(host: str) -> str:
    return host.lower() if host.isascii() else host.lower().encode("idna").decode("ascii")

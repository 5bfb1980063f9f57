"""The checks of `keyproxy config check` beyond the configuration itself: files, patterns, routes and the database.

Each check returns sentences; all of them run, so that one call reports every problem.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvloop

from keyproxy.authorize.browser.tickets import SecretFileError, secrets_of
from keyproxy.cli.options import OLD_SCHEMA, NoDatabase, store
from keyproxy.config import loader
from keyproxy.config.oauth.oauth_settings import LOGIN_BY_OIDC
from keyproxy.config.route_review import shadowed
from keyproxy.config.schema import Settings
from keyproxy.platform.sockets import conflicts
from keyproxy.process.patterns.re2_matcher import PatternError, compile_patterns
from keyproxy.process.providers.proxy_providers import file_problems
from keyproxy.store.embedded.embedded_postgres import EmbeddedError
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import StoreUnavailable
from keyproxy.wire import tls
from keyproxy.wire.tls import TlsError

_ROUNDS_MAX: Final = 10

#: OpenSSL's reasons for a certificate that is not valid at this time.
_TIMES: Final = {9: "is not valid yet", 10: "has expired"}


def problems(loaded: loader.Config, *, offline: bool) -> list[str]:
    """Return a sentence for each problem."""
    settings = loaded.settings
    found = [*conflicts(settings), *_certificates(settings), *_patterns(settings), *shadowed(settings.routes)]
    found += [*file_problems(settings), *_oauth_files(settings)]
    return found if offline else [*found, *_database(loaded)]


def _certificates(settings: Settings) -> Iterator[str]:
    listen, admin, oauth = settings.listen, settings.admin, settings.oauth
    pairs = [
        ("listen", listen.tls_certificate_file, listen.tls_key_file),
        ("admin", admin.tls_certificate_file, admin.tls_key_file),
    ]
    if oauth.is_configured:
        pairs.append(("oauth", oauth.tls_certificate_file, oauth.tls_key_file))
    for table, certificate_file, key_file in pairs:
        if certificate_file:
            wrong = _certificate_problem(certificate_file, key_file)
            if wrong is not None:
                yield f"{table}.tls_certificate_file: {wrong}"
    authorities = [
        ("listen.tls_client_ca_file", settings.listen.tls_client_ca_file),
        ("upstream.tls_ca_file", settings.upstream.tls_ca_file),
    ]
    if settings.oauth.is_configured:
        authorities += [
            ("oauth.mtls_client_ca_file", settings.oauth.mtls_client_ca_file),
            ("oauth.document_ca_file", settings.oauth.document_ca_file),
            ("oauth.login.ca_file", settings.oauth_login.ca_file),
        ]
    for key, file in authorities:
        wrong = _authorities_problem(file) if file else None
        if wrong is not None:
            yield f"{key}: {wrong}"


def _oauth_files(settings: Settings) -> Iterator[str]:
    """The files that `keyproxy authorize` opens, and `serve` does not."""
    oauth, login = settings.oauth, settings.oauth_login
    if not oauth.is_configured:
        return
    if not oauth.secret_file:
        yield "oauth.secret_file: is required with oauth.resource: it seals logins in progress"
    else:
        try:
            secrets_of(oauth)
        except SecretFileError as error:
            yield str(error)
    if login.kind == LOGIN_BY_OIDC and login.client_secret_file:
        try:
            if not Path(login.client_secret_file).read_bytes().strip():
                yield f"oauth.login.client_secret_file: {login.client_secret_file} is empty"
        except OSError as error:
            yield f"oauth.login.client_secret_file: cannot be read: {error}"


def _patterns(settings: Settings) -> list[str]:
    try:
        compile_patterns(settings.categories)
    except PatternError as error:
        return error.problems
    return []


def _certificate_problem(certificate_file: str, key_file: str) -> str | None:
    try:
        server = tls.server_context(certificate_file, key_file)
    except TlsError as error:
        return str(error)
    # A client that trusts exactly this certificate performs a handshake, so that OpenSSL checks it as clients would.
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    try:
        client.load_verify_locations(certificate_file)
        _shake_hands(server, client)
    except ssl.SSLCertVerificationError as error:
        return f"{certificate_file}: {_TIMES.get(error.verify_code, f'clients refuse it: {error.verify_message}')}"
    except (OSError, ssl.SSLError) as error:
        return f"{certificate_file}: clients cannot use it: {error}"
    return None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(_ROUNDS_MAX):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
        if not ends:
            return
    raise ssl.SSLError("the handshake does not complete")


def _authorities_problem(file: str) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(file)
    except (OSError, ssl.SSLError) as error:
        return f"{file}: {getattr(error, 'strerror', None) or getattr(error, 'reason', None) or error}"
    ends = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs()]
    if not ends:
        return f"{file}: contains no CA certificate"
    # Bundles keep expired CAs; a file is unusable only once all of them have expired.
    return f"{file}: every certificate in it has expired" if max(ends) < time.time() else None


def _database(loaded: loader.Config) -> list[str]:
    is_embedded = loaded.settings.store.dsn == "embedded"
    try:
        with store(loaded) as dsn:
            state = uvloop.run(migrations.state(dsn))
    except NoDatabase:
        return []  # `serve` and `migrate` create it
    except (StoreUnavailable, EmbeddedError, migrations.MigrationError) as error:
        return [f"store.dsn: {' '.join(str(error).split())}"]
    # `serve` migrates an embedded database.
    return [f"store.dsn: {OLD_SCHEMA}"] if state.pending and not is_embedded else []

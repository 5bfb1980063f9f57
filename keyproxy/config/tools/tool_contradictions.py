"""The contradictions between keys of tools, providers and anomalies that are valid individually."""

from __future__ import annotations

from typing import Any

from keyproxy.config.tools import anomaly_settings, provider_checks, tool_checks


def contradictions(settings: Any) -> list[str]:
    """Return a sentence for each fault of the `Settings`."""
    routes, tools, providers = settings.routes, settings.tools, settings.providers
    return [
        *tool_checks.tool_faults(
            tools,
            verifies_certificates=bool(settings.listen.tls_client_ca_file),
            accepts_oauth=settings.oauth.is_configured,
        ),
        *tool_checks.route_faults(routes, tools),
        *tool_checks.body_faults(
            routes,
            tools,
            bytes_max=settings.mcp.body_bytes_max,
            memory_bytes_max=settings.tokens.body_memory_max,
        ),
        *provider_checks.provider_faults(
            providers,
            header_prefix=settings.identity.header_prefix,
            has_key_file=bool(settings.secrets.key_file),
            upstreams=settings.upstream_urls(),
        ),
        *provider_checks.route_faults(routes, providers),
        *anomaly_settings.conflicts(settings.anomalies),
    ]

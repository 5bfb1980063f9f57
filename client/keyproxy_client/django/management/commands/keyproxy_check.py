"""manage.py keyproxy_check"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from django.core.management.base import CommandError

from keyproxy_client.django.checking.installation import findings
from keyproxy_client.django.management.reporting import ReportingCommand

_WORDS: Final = {True: "ok", False: "FAILED", None: "note"}


class Command(ReportingCommand):
    """Check the settings, keyproxy's schema or admin API, rights, the tenant, the JWKS and the outbox."""

    help = (
        "Check the settings, keyproxy's schema or admin API, the rights there, the tenant, the JWKS, and the age of the "
        "oldest event of the outbox. Nothing is changed."
    )

    def perform(self, options: Mapping[str, Any]) -> None:
        """Print every finding, and fail if one failed."""
        found = list(findings())
        failed = [finding for finding in found if finding.is_ok is False]
        listed = [{"check": one.name, "ok": one.is_ok, "detail": one.detail} for one in found]
        lines = [f"{_WORDS[one.is_ok]:6}  {one.name}{': ' if one.detail else ''}{one.detail}" for one in found]
        self.report({"ok": not failed, "checks": listed}, lines, as_json=options["as_json"])
        if failed:
            raise CommandError("1 check failed" if len(failed) == 1 else f"{len(failed)} checks failed")

"""Import of old keys by the admin API: `POST /v1/keys/import`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from keyproxy_client.django.directory.admin_api import AdminApi, segment
from keyproxy_client.django.directory.api_users import ApiUsers
from keyproxy_client.django.directory.errors import DirectoryRefused, ProvisionConflict
from keyproxy_client.django.importing.by_sql import ACTOR_IMPORT
from keyproxy_client.django.importing.old_keys import OldKey, Problem
from keyproxy_client.django.importing.report import ImportReport
from keyproxy_client.django.settings import settings

_REASON: Final = "revoked in Django"


@dataclass(frozen=True, slots=True)
class ApiImport:
    """The import at the admin API of the settings. A dry run changes nothing."""

    is_dry_run: bool

    def put(self, keys: Sequence[OldKey]) -> ImportReport:
        """Import keys. Those that are there already stay; they are revoked if they are in Django."""
        api = _api()
        report = ImportReport()
        kept = list(keys) if self.is_dry_run else self._without_conflicts(api, keys, report)
        if not kept:
            return report
        body = {"keys": [_row(key) for key in kept], "dry_run": self.is_dry_run}
        content = api.call("POST", "/v1/keys/import", body).content
        problems = [Problem(kept[one["index"]].place, one["problem"]) for one in content["problems"]]
        report.add(ImportReport(content["imported"], content["present"], 0, content["users"], 0, problems))
        if content["present"] and not self.is_dry_run:
            report.revoked = _revoke(api, [key for key in kept if key.is_revoked])
        return report

    def _without_conflicts(self, api: AdminApi, keys: Sequence[OldKey], report: ImportReport) -> list[OldKey]:
        """The keys, once missing owners that are inactive are created, disabled: the import would enable them."""
        users = ApiUsers(api)
        refused: dict[str, str] = {}
        for user, tenant in sorted({(key.user, key.tenant) for key in keys if not key.is_owner_active}):
            try:
                if users.create(user, tenant, actor=ACTOR_IMPORT).is_new:
                    users.disable(user, tenant, actor=ACTOR_IMPORT)
                    report.users += 1
            except ProvisionConflict as error:
                refused[user] = str(error)
        report.problems += [Problem(key.place, refused[key.user]) for key in keys if key.user in refused]
        return [key for key in keys if key.user not in refused]


def _api() -> AdminApi:
    found = settings()
    return AdminApi(found.admin_url, found.admin_token_file, found.timeout_seconds)


def _row(key: OldKey) -> dict[str, Any]:
    return {
        "user": key.user,
        "tenant": key.tenant,
        "prefix": key.prefix,
        "hashed_key": key.hashed_key,
        "name": key.name,
        "scopes": list(key.scopes),
        "is_test": key.is_test,
        "created_at": key.created.isoformat(),
        "expires_at": None if key.expires_at is None else key.expires_at.isoformat(),
        "revoked": key.is_revoked,
    }


def _revoke(api: AdminApi, keys: Sequence[OldKey]) -> int:
    """Revoke keys that were revoked in Django after an earlier import: their hint has the prefix."""
    revoked = 0
    for old in keys:
        try:
            found = api.call("POST", "/v1/keys/whose", {"text": f"{old.prefix}.…"}).content["keys"]
        except DirectoryRefused as error:
            if error.code == "insufficient_scope":
                # A token without keys:read imports, but finds no key.
                return revoked
            raise
        for key in found:
            if key["user"] == old.user and key["state"] != "revoked" and key["hint"] == f"{old.prefix}.…":
                api.call("POST", f"/v1/keys/{segment(key['id'])}/revoke", {"reason": _REASON})
                revoked += 1
    return revoked

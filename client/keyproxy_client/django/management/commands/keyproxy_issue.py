"""manage.py keyproxy_issue"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from django.core.management.base import CommandParser
from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.checking.setting_checks import Fault, scopes
from keyproxy_client.django.management.reporting import Misuse, ReportingCommand, find_user, life
from keyproxy_client.django.provisioning.issuing import issue_for
from keyproxy_client.django.settings import settings

ACTOR_ISSUE: Final = "django:issue"

_DEFAULT = object()


class Command(ReportingCommand):
    """Issue a key and print its secret once."""

    help = "Issue an API key for a user, and print its secret. The secret is not stored: it cannot be printed again."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument("user", metavar="USER", help="A user name, a primary key, or an id in keyproxy.")
        parser.add_argument("--test", action="store_true", help="Issue a key for test mode.")
        parser.add_argument(
            "--scope", action="append", default=[], metavar="SCOPE", dest="scopes",
            help="A scope of the key; repeatable. Default: SCOPES of the settings.",
        )  # fmt: skip
        parser.add_argument("--name", default="", help="A descriptive name.")
        parser.add_argument(
            "--expires-in", type=life, default=_DEFAULT, metavar="90d",
            help="The life of the key: 90d, 24h, or never. Default: KEY_DAYS of the settings.",
        )  # fmt: skip
        super().add_arguments(parser)

    @sensitive_variables("issued", "result")
    def perform(self, options: Mapping[str, Any]) -> None:
        """Issue the key."""
        try:
            wanted = scopes(options["scopes"]) or settings().scopes
        except Fault as error:
            raise Misuse(f"--scope: {error}") from error
        user = find_user(options["user"])
        given = {} if options["expires_in"] is _DEFAULT else {"life": options["expires_in"]}
        issued = issue_for(
            user, actor=ACTOR_ISSUE, name=options["name"], scopes=wanted, is_test=options["test"], **given
        )
        expires_at = None if issued.expires_at is None else issued.expires_at.isoformat()
        result = {
            "id": issued.key_id,
            "user": issued.user,
            "secret": issued.secret,
            "is_test": issued.is_test,
            "scopes": list(issued.scopes),
            "expires_at": expires_at,
        }
        self.report(result, [issued.secret], as_json=options["as_json"])
        if not options["as_json"]:
            end = f"expires at {expires_at}" if expires_at else "never expires"
            self.stderr.write(f"key {issued.key_id} of user {issued.user} {end}; the secret is not shown again")

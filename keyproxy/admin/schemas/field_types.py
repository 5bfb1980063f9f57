"""The types of fields in requests and responses of the admin API, with their patterns and bounds."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BeforeValidator, Field, StringConstraints

from keyproxy.admin.endpoint_table import PAGE_MAX
from keyproxy.auth.key_scanner import TEXT_BYTES_MAX
from keyproxy.limits.plan import LIMIT_MAX

_LIFE_SECONDS_MAX = 36_525 * 86_400
_SPAN_SECONDS_MAX = 36_525 * 86_400
_QUERY_DIGITS_MAX = 18

#: The same pattern as in the tables.
ID = r"^[A-Za-z0-9][A-Za-z0-9._:@|+\-]{0,127}$"
PLAN_ID = r"^[A-Za-z0-9][A-Za-z0-9._:@\-]{0,127}$"
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
SCOPE = r"^[A-Za-z0-9][A-Za-z0-9._:/\-]{0,63}$"
ROLE = r"^[a-z][a-z0-9_\-]{0,63}$"
AGENT = r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,63}$"
AGENT_TOKEN = r"^agt_[0-9A-Za-z]{22}$"  # noqa: S105 - the form of an id
CLIENT_ID = r"^[ -~]{1,2000}$"
OBJECT_ID = r"^[A-Za-z0-9._:@|+~/=,!$\-]{1,256}$"

NAMESPACE = r"^(path|query|header|json):[^=\x00-\x1f\x7f]{1,256}=[^\x00-\x1f\x7f]{0,512}$"

Id = Annotated[str, StringConstraints(pattern=ID)]
PlanId = Annotated[str, StringConstraints(pattern=PLAN_ID)]
Name = Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=200)]
Reason = Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=500)]
CategoryName = Annotated[str, StringConstraints(pattern=ROLE)]
BoundValue = Annotated[str, StringConstraints(pattern=NAMESPACE)]
KeyScope = Annotated[str, StringConstraints(pattern=SCOPE)]
ClientId = Annotated[str, StringConstraints(pattern=CLIENT_ID)]
AgentId = Annotated[str, StringConstraints(pattern=AGENT)]
Role = Annotated[str, StringConstraints(pattern=ROLE)]
AuditedId = Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=400)]
Text = Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=200)]
Life = Annotated[int, Field(ge=1, le=_LIFE_SECONDS_MAX)]
Whole = Annotated[int, Field(ge=0, le=LIMIT_MAX)]

MoneyUnit = Annotated[str, Field(description="The label of money, whose amounts are in micro-units of it.")]

#: Parts of a limit.
Measure = Literal["requests", "tokens", "spend", "concurrency", "request-rate", "token-rate"]
Per = Literal["second", "minute", "hour", "day", "week", "month", "request", ""]
Amount = Annotated[float, Field(ge=0, le=LIMIT_MAX, allow_inf_nan=False)]
Burst = Annotated[int, Field(ge=1, le=LIMIT_MAX)]
Selector = Annotated[str, StringConstraints(pattern=PRINTABLE, max_length=128)]

_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")


def _whole_number(value: object) -> object:
    """Parse a number in a query; only digits are accepted."""
    if not isinstance(value, str) or not re.fullmatch(r"-?[0-9]+", value):
        return value
    if len(value) > _QUERY_DIGITS_MAX:
        raise ValueError("the number is too large")
    return int(value)


def _true_or_false(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _instant(value: object) -> object:
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError("must be a time such as 2026-01-31T12:00:00Z")
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is not a valid date or time") from error


QuerySeconds = Annotated[int, Field(ge=1, le=_SPAN_SECONDS_MAX), BeforeValidator(_whole_number)]
QueryLimit = Annotated[int, Field(ge=1, le=PAGE_MAX), BeforeValidator(_whole_number)]
QuerySum = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_whole_number)]
QueryTokens = Annotated[int, Field(ge=0, le=LIMIT_MAX), BeforeValidator(_whole_number)]
QueryRow = Annotated[int, Field(ge=0, le=2**53), BeforeValidator(_whole_number)]
QueryBoolean = Annotated[bool, BeforeValidator(_true_or_false)]
Instant = Annotated[AwareDatetime, BeforeValidator(_instant)]

#: Text that may contain keys.
Pasted = Annotated[str, Field(max_length=TEXT_BYTES_MAX, description="Headers, logs, scripts, JSON, URLs: unchanged.")]

ActsFor = Annotated[
    Literal["none", "tenant"], Field(description="The users that the key may act for besides its owner.")
]

#: The two forms of a plan's limits, in the locations of validation errors.
BY_NAME, AS_LIST = "<by name>", "<list>"


def limits_form(value: object) -> str:
    """The form of a plan's limits, so that errors are about that form only."""
    return AS_LIST if isinstance(value, list) else BY_NAME


#: A time in a response.
Time = Annotated[
    str,
    Field(
        pattern=r"^(-?infinity|[0-9]{4,6}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{3})?Z)$",
        description="ISO 8601 in UTC; `infinity` if another SQL client wrote that.",
    ),
]

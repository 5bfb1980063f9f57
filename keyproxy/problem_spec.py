"""The fixed part of a problem: what programs and people learn of every refusal of one kind."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Blame(enum.Enum):
    """The party that has to act before the next request can succeed."""

    CALLER = "caller"
    US = "us"
    UPSTREAM = "upstream"


class ProblemSpec(NamedTuple):
    """The fixed part of a problem, of the proxy or of the admin API.

    `retry_after_seconds`: the default wait; None: an unchanged retry cannot succeed.
    """

    code: str
    status: int
    blame: Blame
    title: str
    sentence: str
    retry_after_seconds: int | None = None

"""Build `application/problem+json` documents (RFC 9457): the only place that does, for the proxy and the admin API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from keyproxy.problem_spec import ProblemSpec

MEDIA_TYPE: Final = "application/problem+json"


def problem_content(
    spec: ProblemSpec, request_id: str, *, status: int, detail: str, members: Mapping[str, object]
) -> dict[str, object]:
    """The content for one occurrence of a problem. `status` may be configured; `members` are further members."""
    return {
        "type": f"urn:keyproxy:problem:{spec.code}",
        "title": spec.title,
        "status": status,
        "detail": detail,
        "code": spec.code,
        "request_id": request_id,
        **members,
    }


def problem_json(
    spec: ProblemSpec, request_id: str, *, status: int, detail: str, members: Mapping[str, object]
) -> bytes:
    """The document for one occurrence of a problem, as in `problem_content`."""
    return json.dumps(problem_content(spec, request_id, status=status, detail=detail, members=members)).encode("utf-8")

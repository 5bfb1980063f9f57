"""Parsing of admin API requests: path, query, body and conditions, validated by the endpoint's models."""

from __future__ import annotations

import asyncio
import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, Final, TypeVar, get_origin

from aiohttp import web
from pydantic import ValidationError

from keyproxy.admin.endpoints import Endpoint
from keyproxy.admin.problems import FieldError, Problem, Refused
from keyproxy.admin.schemas.field_types import (
    AGENT,
    AS_LIST,
    BY_NAME,
    CLIENT_ID,
    ID,
    NAMESPACE,
    OBJECT_ID,
    PLAN_ID,
    PRINTABLE,
    ROLE,
    SCOPE,
)
from keyproxy.admin.schemas.request_models import RequestModel

BODY_BYTES_MAX: Final = 1 << 20
_BODY_SECONDS: Final = 10.0
_IDENTITY: Final = "identity"
_ERRORS_MAX: Final = 20
_INTEGER_CHARACTERS_MAX: Final = 300

_ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e]*)"')
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
_PATH_ID = re.compile(ID)
_PATH_AGENT = re.compile(AGENT)
_PATH_OBJECT_ID = re.compile(OBJECT_ID)
_PATH_CLIENT_ID = re.compile(CLIENT_ID)

_Model = TypeVar("_Model", bound=RequestModel)

#: Descriptions of the patterns for error messages.
_MEANINGS = {
    ID: "an id has up to 128 letters, digits and . _ : @ | + -, and starts with a letter or digit",
    PLAN_ID: "a plan's name has up to 128 letters, digits and . _ : @ -, and starts with a letter or digit",
    PRINTABLE: "control characters are not allowed",
    AGENT: "an agent has up to 64 letters, digits and . _ -, and starts with a letter or digit",
    ROLE: "a role or a category has up to 64 lower-case letters, digits, _ and -, and starts with a letter",
    NAMESPACE: "a namespace is SOURCE=VALUE, such as query:collection=acme/docs",
    SCOPE: "a scope is one word such as jobs:write, without wildcards, of up to 64 characters",
}


def path_of(request: web.Request) -> dict[str, str]:
    """Parse the path parameters. A value that cannot be an id is a 404. Raises Refused."""
    for name, value in request.match_info.items():
        if name == "agent":
            pattern = _PATH_AGENT
        elif name == "client":
            pattern = _PATH_CLIENT_ID
        else:
            # Beside its kind the id is an owned one, which may contain slashes.
            pattern = _PATH_OBJECT_ID if name == "id" and "kind" in request.match_info else _PATH_ID
        if not pattern.fullmatch(value):
            raise Refused(Problem.NOT_FOUND)
    return dict(request.match_info)


def query_of(request: web.Request, model: type[_Model]) -> _Model:
    """Parse the query. Raises Refused."""
    lists = {name for name, field in model.model_fields.items() if get_origin(field.annotation) is list}
    twice = [name for name in request.query if len(request.query.getall(name)) > 1 and name not in lists]
    if twice:
        raise Refused(Problem.INVALID, errors=[FieldError(f"query.{twice[0]}", "is given more than once")])
    content = {name: request.query.getall(name) if name in lists else request.query[name] for name in request.query}
    return _checked(model, content, "query")


async def body_of(request: web.Request, endpoint: Endpoint) -> tuple[bytes, RequestModel | None]:
    """Read the body: its bytes and the validated model. Raises Refused."""
    if endpoint.body is None:
        return b"", None
    if request.headers.get("Content-Encoding", _IDENTITY).strip().lower() != _IDENTITY:
        raise Refused(Problem.MEDIA_TYPE, "Send the body without a content encoding.")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            raw = await request.read()
    except TimeoutError as error:
        raise Refused(Problem.REQUEST_TIMEOUT) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise Refused(Problem.BODY_TOO_LARGE, f"The maximum is {BODY_BYTES_MAX} bytes.") from error
    if not raw and endpoint.may_be_empty:
        return raw, _checked(endpoint.body, {}, "body")
    if request.content_type != "application/json":
        raise Refused(Problem.MEDIA_TYPE)
    return raw, _checked(endpoint.body, _json(raw), "body")


def if_match(request: web.Request) -> str | None:
    """Parse If-Match: None for any version, `*` if the object must exist. Raises Refused."""
    fields = request.headers.getall("If-Match", [])
    if not fields:
        return None
    if fields == ["*"]:
        return "*"
    match = _ENTITY_TAG.fullmatch(fields[0].strip()) if len(fields) == 1 else None
    if match is None:
        raise Refused(Problem.REQUEST_MALFORMED, 'If-Match must be one quoted ETag or "*".')
    if match[1]:
        # RFC 9110, 13.1.1: a weak tag never matches.
        raise Refused(Problem.OUTDATED, "A weak ETag never matches.")
    return match[2]


def must_be_new(request: web.Request, endpoint: Endpoint) -> bool:
    """Parse If-None-Match: whether the object must not exist. Raises Refused."""
    fields = request.headers.getall("If-None-Match", [])
    if not endpoint.may_be_new_only or not fields:
        return False
    if fields != ["*"]:
        raise Refused(Problem.REQUEST_MALFORMED, "If-None-Match supports only *.")
    return True


def idempotency_key(request: web.Request, endpoint: Endpoint) -> str | None:
    """Parse the Idempotency-Key, quoted or not; None without one. Raises Refused."""
    fields = request.headers.getall("Idempotency-Key", [])
    if not endpoint.accepts_idempotency_key or not fields:
        return None
    key = fields[0].strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if len(fields) > 1 or not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Refused(
            Problem.REQUEST_MALFORMED, "Idempotency-Key must be one word of up to 255 visible ASCII characters."
        )
    return key


def _json(raw: bytes) -> object:
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer
        )
    except RecursionError as error:
        raise Refused(Problem.REQUEST_MALFORMED, "The body is nested too deeply.") from error
    except ValueError as error:
        raise Refused(Problem.REQUEST_MALFORMED, f"The body is not valid JSON: {_one_line(error)}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # Parsers disagree on which one wins.
        raise ValueError("an object contains a member twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _INTEGER_CHARACTERS_MAX:
        raise ValueError("a number is too large")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _one_line(error: Exception) -> str:
    # The decoder's own errors quote the input; the response must not repeat any of the body.
    return error.msg.lower() if isinstance(error, json.JSONDecodeError) else str(error).split(":")[0]


def _checked(model: type[_Model], content: object, where: str) -> _Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        errors = [_field_error(one, model, where) for one in error.errors(include_url=False, include_input=False)]
        first = errors[0]
        raise Refused(Problem.INVALID, f"{first.field}: {first.detail}", errors=errors[:_ERRORS_MAX]) from None


def _field_error(error: Any, model: type[RequestModel], where: str) -> FieldError:
    steps = [str(step) for step in error["loc"] if step not in (BY_NAME, AS_LIST)]
    location = ".".join([where, *steps])
    if error["type"] == "extra_forbidden":
        known = list(_fields_at(model, error["loc"][:-1]))
        name = str(error["loc"][-1])
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        # An unknown name may be a secret: suggest the closest known name and truncate the unknown one.
        hint = f"; did you mean {close[0]}?" if close else ""
        return FieldError(".".join([where, *steps[:-1], name[:40]]), f"unknown field{hint}")
    meaning = _MEANINGS.get(error["ctx"]["pattern"]) if error["type"] == "string_pattern_mismatch" else None
    message: str = meaning or error["msg"].removeprefix("Value error, ")
    return FieldError(location[:200], message[:1].lower() + message[1:])


def _fields_at(model: type[RequestModel], location: Iterable[str | int]) -> Iterable[str]:
    """The fields of the model at this location."""
    here: type[RequestModel] | None = model
    models: list[type[RequestModel]] = []
    for step in location:
        field = here.model_fields.get(str(step)) if here is not None else None
        if field is not None:
            models = [*_models(field.annotation)]
            here = models[0] if models else None
        elif step == AS_LIST:
            here = models[-1]
    return here.model_fields if here is not None else ()


def _models(annotation: Any) -> Iterable[type[RequestModel]]:
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)

"""Each request finds its row in the table of dialects.

Member names were compared with openai 3.57.0, anthropic 2.14.0, google-genai 3.6.1, ollama 0.6.3 and botocore 1.44.8.
"""

from __future__ import annotations

import botocore.session
import pytest

from keyproxy.ai.dialects.endpoint import Dialect, EndpointClass, StreamFormat, StreamSwitch
from keyproxy.ai.dialects.table import DIALECTS, endpoint_of, model_in_path
from keyproxy.http.error_shapes import SHAPES, ErrorFacts, bedrock_stream_exception, error_content, error_type_field

G, M, R, N, U = (
    EndpointClass.GENERATES, EndpointClass.MEDIA, EndpointClass.READS, EndpointClass.NONE, EndpointClass.UNKNOWN,
)  # fmt: skip


@pytest.mark.parametrize(
    ("dialect", "path", "kind", "maximums", "multipliers"),
    [
        ("openai", "/v1/chat/completions", G, ["max_completion_tokens", "max_tokens"], ["n"]),
        ("openai", "/openai/deployments/x/chat/completions", G, ["max_completion_tokens", "max_tokens"], ["n"]),
        ("openai", "/v1/completions", G, ["max_tokens"], ["n", "best_of"]),
        ("openai", "/v1/responses", G, ["max_output_tokens"], []),
        ("openai", "/v1/embeddings", R, [], []),
        ("openai", "/v1/moderations", R, [], []),
        ("openai", "/v1/audio/speech", M, ["max_completion_tokens", "max_tokens", "max_output_tokens"], []),
        ("openai", "/v1/audio/transcriptions", M, ["max_completion_tokens", "max_tokens", "max_output_tokens"], []),
        ("openai", "/v1/images/generations", M, ["max_completion_tokens", "max_tokens", "max_output_tokens"], []),
        ("openai", "/v1/images/edits", M, ["max_completion_tokens", "max_tokens", "max_output_tokens"], []),
        ("openai", "/v1/files", N, [], []),
        ("openai", "/v1/uploads", N, [], []),
        ("openai", "/v1/uploads/upload_1/parts", N, [], []),
        ("openai", "/v1/batches", N, [], []),
        ("openai", "/v1/batches/b_1/cancel", N, [], []),
        ("openai", "/v1/realtime/sessions", U, ["max_completion_tokens", "max_tokens", "max_output_tokens"],
         ["n", "best_of"]),
        ("anthropic", "/v1/messages", G, ["max_tokens"], []),
        ("anthropic", "/v1/messages/count_tokens", R, [], []),
        ("anthropic", "/v1/messages/batches", N, [], []),
        ("anthropic", "/v1/complete", U, ["max_tokens"], []),
        ("gemini", "/v1beta/models/g:generateContent", G, ["generationConfig.maxOutputTokens"],
         ["generationConfig.candidateCount"]),
        ("gemini", "/v1/projects/p/locations/l/publishers/google/models/g:streamGenerateContent", G,
         ["generationConfig.maxOutputTokens"], ["generationConfig.candidateCount"]),
        ("gemini", "/v1beta/models/g:countTokens", R, [], []),
        ("gemini", "/v1beta/models/g:embedContent", R, [], []),
        ("gemini", "/v1beta/models/g:batchEmbedContents", R, [], []),
        ("gemini", "/v1beta/models/g:predict", U, ["generationConfig.maxOutputTokens"],
         ["generationConfig.candidateCount"]),
        ("ollama", "/api/chat", G, ["options.num_predict"], []),
        ("ollama", "/api/generate", G, ["options.num_predict"], []),
        ("ollama", "/api/embed", R, [], []),
        ("ollama", "/api/embeddings", R, [], []),
        *[("ollama", f"/api/{name}", N, [], []) for name in ("tags", "ps", "show", "pull")],
        ("ollama", "/api/create", U, ["options.num_predict"], []),
        ("bedrock", "/model/m/converse", G, ["inferenceConfig.maxTokens"], []),
        ("bedrock", "/model/m/converse-stream", G, ["inferenceConfig.maxTokens"], []),
        ("bedrock", "/model/m/invoke", U, ["inferenceConfig.maxTokens"], []),
        ("header", "/v1/chat/completions", U, [], []),
        ("header", "/v1/files", N, [], []),
        ("header", "/anything", U, [], []),
    ],
)  # fmt: skip
def test_a_post_finds_the_row_of_its_endpoint(
    dialect: str, path: str, kind: EndpointClass, maximums: list[str], multipliers: list[str]
) -> None:
    row = endpoint_of(DIALECTS[dialect], b"POST", path.encode())
    assert row.kind is kind
    assert [".".join(member) for member in row.maximums] == maximums
    assert [".".join(member) for member in row.multipliers] == multipliers


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"OPTIONS"])
def test_requests_without_a_body_use_no_tokens(dialect: Dialect, method: bytes) -> None:
    assert endpoint_of(dialect, method, b"/v1/chat/completions").kind is N


@pytest.mark.parametrize("method", [b"PUT", b"PATCH", b"QUERY"])
def test_other_methods_are_unknown(method: bytes) -> None:
    assert endpoint_of(DIALECTS["openai"], method, b"/v1/chat/completions") is DIALECTS["openai"].usual


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/chat/completion%73", b"/v1/chat//completions", b"/v1/chat;x=1/completions", b"/v1/chat/completions/",
        b"/v1/Chat/Completions", b"/v1/chat%2fcompletions", b"/v1/chat/completions;/files/..;x",
    ],
)  # fmt: skip
def test_a_path_that_servers_may_normalise_to_an_endpoint_is_that_endpoint(path: bytes) -> None:
    expected = U if b".." in path else G
    assert endpoint_of(DIALECTS["openai"], b"POST", path).kind is expected


def test_a_path_with_two_readings_is_never_free_by_one_of_them() -> None:
    assert endpoint_of(DIALECTS["openai"], b"POST", b"/v1/chat/completions;/files").kind is N
    assert endpoint_of(DIALECTS["openai"], b"POST", b"/v1/file%73").kind is U
    assert endpoint_of(DIALECTS["openai"], b"POST", b"/v1/x;/files").kind is N
    assert endpoint_of(DIALECTS["openai"], b"POST", b"/v1/embeddings;/x%2fchat/completions").kind is G


@pytest.mark.parametrize(
    ("dialect", "path", "model"),
    [
        ("openai", b"/openai/deployments/my%20gpt/chat/completions", "my gpt"),
        ("openai", b"/v1/chat/completions", None),
        ("gemini", b"/v1beta/models/gemini-2.5-flash:generateContent", "gemini-2.5-flash"),
        ("gemini", b"/v1beta/models", None),
        ("bedrock", b"/model/anthropic.claude-v2%3A1/converse", "anthropic.claude-v2:1"),
        ("bedrock", b"/model/arn%3Aaws%3Abedrock%3Aeu%3A1%3Ainference-profile%2Fx/converse-stream",
         "arn:aws:bedrock:eu:1:inference-profile/x"),
        ("bedrock", b"/model/%ff/converse", None),
        ("anthropic", b"/v1/messages", None),
    ],
)  # fmt: skip
def test_a_path_names_its_model_decoded(dialect: str, path: bytes, model: str | None) -> None:
    assert model_in_path(DIALECTS[dialect], path) == model


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_the_usual_members_include_those_of_every_endpoint(dialect: Dialect) -> None:
    for row in dialect.endpoints:
        assert set(row.maximums) <= set(dialect.usual.maximums), row.name
        assert set(row.multipliers) <= set(dialect.usual.multipliers), row.name
        assert (row.kind is G) == bool(row.maximums) or row.kind is M
        if row.kind is G:
            assert row.usage
            assert row.finish is not None
            assert row.text_members


def test_each_stream_has_its_format() -> None:
    streams = {
        (dialect.name, row.name): (row.streams, row.formats)
        for dialect in DIALECTS.values()
        for row in dialect.endpoints
        if row.kind is G
    }
    sse = (StreamFormat.SSE,)
    assert streams == {
        ("openai", "/chat/completions"): (StreamSwitch.MEMBER, sse),
        ("openai", "/completions"): (StreamSwitch.MEMBER, sse),
        ("openai", "/responses"): (StreamSwitch.MEMBER, sse),
        ("anthropic", "/messages"): (StreamSwitch.MEMBER, sse),
        ("gemini", ":generateContent"): (StreamSwitch.NEVER, ()),
        ("gemini", ":streamGenerateContent"): (StreamSwitch.PATH, (StreamFormat.SSE, StreamFormat.JSON_ARRAY)),
        ("ollama", "/api/chat"): (StreamSwitch.MEMBER_UNLESS_FALSE, (StreamFormat.NDJSON,)),
        ("ollama", "/api/generate"): (StreamSwitch.MEMBER_UNLESS_FALSE, (StreamFormat.NDJSON,)),
        ("bedrock", "/converse"): (StreamSwitch.NEVER, ()),
        ("bedrock", "/converse-stream"): (StreamSwitch.PATH, (StreamFormat.AWS_EVENT_STREAM,)),
    }


# -- errors

ERROR = ErrorFacts(429, "token_budget_exhausted", "No tokens are left.", "req_1", None, {"limit": 5, "retryable": True})


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ("openai", {"error": {"message": "No tokens are left.", "type": "rate_limit_error", "param": None,
                              "code": "token_budget_exhausted", "limit": 5, "retryable": True}}),
        ("anthropic", {"type": "error", "error": {"type": "rate_limit_error", "message": "No tokens are left.",
                                                  "code": "token_budget_exhausted", "limit": 5, "retryable": True},
                       "request_id": "req_1"}),
        ("gemini", {"error": {"code": 429, "message": "No tokens are left.", "status": "RESOURCE_EXHAUSTED",
                              "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo",
                                           "reason": "token_budget_exhausted", "domain": "keyproxy",
                                           "metadata": {"limit": "5", "retryable": "true"}}]}}),
        ("ollama", {"error": "No tokens are left.", "code": "token_budget_exhausted", "limit": 5, "retryable": True}),
        ("bedrock", {"message": "No tokens are left.", "code": "token_budget_exhausted", "limit": 5,
                     "retryable": True}),
    ],
)  # fmt: skip
def test_a_refusal_has_the_json_of_its_api(shape: str, content: dict[str, object]) -> None:
    assert error_content(shape, ERROR) == content


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 408, 413, 417, 429, 431, 500, 501, 502, 503, 504])
def test_every_status_has_a_type_in_every_format(shape: str, status: int) -> None:
    content = str(error_content(shape, ERROR._replace(status=status, limit={})))
    assert "token_budget_exhausted" in content
    assert (error_type_field(shape, status) is None) == (shape != "bedrock")


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 408, 413, 417, 429, 431, 500, 501, 502, 503, 504])
def test_the_exceptions_of_bedrock_are_those_that_boto3_knows(status: int) -> None:
    service = botocore.session.get_session().get_service_model("bedrock-runtime")
    name, _, kind = (error_type_field("bedrock", status) or "").partition(": ")
    assert name == "x-amzn-ErrorType"
    assert kind in service.shape_names
    stream = service.operation_model("ConverseStream").get_event_stream_output()
    assert bedrock_stream_exception(status) in stream.members

"""What a body may cost the event loop, and how long the answer to it may be."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from services.rollout.openai_types import ChatRequest, CompletionRequest
from services.tokens import PromptEncoder
from shared.errors import InvalidRequest
from shared.schemas import (
    GenerateRequest,
    ReplicaRegistration,
    ScoreRequest,
    TrainRequest,
)
from tests.rollout.service import Service, request

pytestmark = pytest.mark.anyio
MEGABYTE = 1 << 20
SIZE = 8 * MEGABYTE
MAX_ANSWER_BYTES = 4096


@pytest.fixture
async def service(serve: Callable[..., Service]) -> Service:
    service = serve()
    await service.started()
    return service


def many(item: bytes) -> bytes:
    return item * (SIZE // len(item))


def prompts(inner: bytes) -> bytes:
    return b'{"prompts":[' + inner + b"]}"


LARGEST = prompts(b"[" + b"1," * (2 * MEGABYTE) + b"1]")  # Valid, and refused for its length.
HOSTILE = {
    "texts where numbers belong": prompts(b"[" + many(b'"x",') + b"1]"),
    "fractions": prompts(b"[" + many(b"1.5e3,") + b"1]"),
    "a long number": prompts(b"[" + many(b"9") + b"]"),
    "many numbers": prompts(b"[" + many(b"1,") + b"1]"),
    "many prompts": prompts(many(b'"a",') + b'"a"'),
    "broken messages": prompts(b"[" + many(b'{"role":1},') + b"1]"),
    "empty messages": prompts(b"[" + many(b'{"role":"user","content":""},') + b"1]"),
    "unknown fields": b"{" + b",".join(b'"%d":1' % i for i in range(SIZE // 10)) + b"}",
    "a long unknown field": b'{"' + many(b"a") + b'":1}',
    "nested lists": many(b"["),
    "a long text": prompts(b'"' + many(b"a") + b'"'),
    "many short texts": prompts(b'["' + many(b"1 ") + b'"]'),
    "escapes": prompts(b'"' + many(b"\\u0001") + b'"'),
    "arguments of a call": prompts(
        b'[{"role":"assistant","content":"","tool_calls":[{"function":{"name":"a","arguments":{"b":['
        + b"[],".join([b""] * (MEGABYTE))
        + b"1]}}}]}]"
    ),
    "arguments of a call as text": prompts(
        b'[{"role":"assistant","content":"","tool_calls":[{"function":{"name":"a","arguments":"'
        + many(b"[")
        + b'"}}]}]'
    ),
}


async def post(service: Service, path: str, body: bytes) -> tuple[float, int, bytes]:
    """The longest pause of the event loop meanwhile in seconds, the status and the answer."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0.01)
    answer = await service.post(path, body)
    ticking.cancel()
    return longest, answer.status_code, answer.content


@pytest.mark.parametrize("name", HOSTILE)
async def test_no_body_holds_the_event_loop_longer_than_a_valid_one(
    name: str, service: Service
) -> None:
    """Fault S3: /healthz hung for 18 s while a text of 2 MB was tokenized."""
    ratios = []
    for _ in range(3):  # Another process can hold up each of them.
        valid, status, _ = await post(service, "/generate", LARGEST)
        assert status == 422
        hostile, status, answer = await post(service, "/generate", HOSTILE[name])
        assert status in (413, 422)
        assert len(answer) <= MAX_ANSWER_BYTES
        ratios.append(hostile / valid)
        if ratios[-1] < 3:
            break
    assert min(ratios) < 3


async def test_health_is_answered_while_a_text_is_tokenized(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault S3: the text is admitted first, and tokenized in a thread."""
    encoder = service.replica.serving.encoder
    has_begun, may_end = threading.Event(), threading.Event()

    def encode(*_: Any, **__: Any) -> tuple[int, ...]:
        has_begun.set()
        assert may_end.wait(60)
        return (1, 3)

    monkeypatch.setattr(encoder, "encode", encode)
    body = request().model_copy(update={"prompts": ("1 " * MEGABYTE,)})
    generating = asyncio.ensure_future(service.client.generate(body))
    assert await asyncio.to_thread(has_begun.wait, 60)
    assert (await service.get("/healthz")).status_code == 200
    assert service.replica.status().num_outstanding_completions == 1
    assert not generating.done()
    may_end.set()
    assert len((await generating).groups) == 1
    assert service.replica.status().num_outstanding_completions == 0


class CountingTokenizer:
    """One token per character."""

    def __init__(self) -> None:
        self.num_characters = 0

    def encode(self, text: str, **_: Any) -> list[int]:
        self.num_characters += len(text)
        return [0] * len(text)


def test_the_cost_of_a_long_text_is_bounded_by_the_context() -> None:
    """Fault S3: a text was tokenized to its end, however long it was."""
    tokenizer = CountingTokenizer()
    for num_characters in (100_000, 8 * MEGABYTE):
        with pytest.raises(
            InvalidRequest, match=rf"{num_characters} characters has more than 1000 "
        ):
            PromptEncoder(tokenizer, 16).encode("a" * num_characters, max_tokens=1000)
    assert tokenizer.num_characters <= 16_000


def test_a_text_of_long_tokens_is_not_taken_for_a_long_one() -> None:
    class OfLines(CountingTokenizer):
        def encode(self, text: str, **_: Any) -> list[int]:
            self.num_characters += len(text)
            return [0] * text.count("\n")

    lines = ("-" * 99 + "\n") * 900
    tokenizer = OfLines()
    assert len(PromptEncoder(tokenizer, 16).encode(lines, max_tokens=1000)) == 900
    assert tokenizer.num_characters <= 2 * len(lines)


# --- bounds of the wire types -------------------------------------------------------------------


def unbounded(schema: Any, definitions: dict[str, Any], path: str = "") -> Iterator[str]:
    """The places of a JSON schema where a client may send as much as it likes."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if f"<{name}>" not in path:
            yield from unbounded(definitions[name], definitions, f"{path}<{name}>")
        return
    for kind in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(kind, ()):
            yield from unbounded(part, definitions, path)
    if "enum" in schema or "const" in schema:
        return
    match schema.get("type"):
        case "string" if not {"maxLength", "pattern"} & schema.keys():
            yield path
        case "integer" if not {"maximum", "exclusiveMaximum"} & schema.keys():
            yield path
        case "array":
            if "maxItems" not in schema:
                yield path
            yield from unbounded(schema["items"], definitions, f"{path}[]")
        case "object":
            for name, field in schema.get("properties", {}).items():
                yield from unbounded(field, definitions, f"{path}.{name}")
            if not schema.get("properties") and "maxProperties" not in schema:
                yield path


@pytest.mark.parametrize(
    "model",
    [
        GenerateRequest,
        ScoreRequest,
        CompletionRequest,
        ChatRequest,
        TrainRequest,
        ReplicaRegistration,
    ],
)
def test_every_number_list_and_text_of_a_request_has_a_limit(model: type[Any]) -> None:
    # The other mode shows the forms that fields of OpenAI's requests have before validation.
    schema = TypeAdapter(model).json_schema(mode="serialization")
    assert list(unbounded(schema, schema.get("$defs", {}))) == []


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/status?verbose=1", "/generate?stream=true", "/sync_weights?force=1", "/v1/models?limit=2"],
)
async def test_an_unknown_query_parameter_is_refused_by_name(path: str, service: Service) -> None:
    """Fault S13: it was ignored, and whoever sent it believed that it had an effect."""
    name = path.partition("?")[2].partition("=")[0]
    is_post = path.startswith(("/generate", "/sync_weights"))
    body = request().model_dump_json().encode()
    answer = await (service.post(path, body) if is_post else service.get(path))
    assert answer.status_code in (400, 422)
    assert f"has no query parameter '{name}'" in answer.text


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_no_page_loads_scripts_from_another_host(path: str, service: Service) -> None:
    """Fault S13: FastAPI's own pages do."""
    answer = await service.get(path)
    assert answer.status_code == 404
    assert "see docs/wire.md for the routes" in answer.text


@pytest.mark.parametrize("character", ["a", '"', "\x00", "€", "\ud800", "\n"])
async def test_a_refusal_does_not_echo_what_was_sent(character: str, service: Service) -> None:
    """Fault S13: refusals had the megabytes of the request."""
    body = json.dumps({"prompts": [[1]], character * MEGABYTE: 1}).encode()
    for path in ("/generate", "/v1/completions"):
        answer = await service.post(path, body)
        assert answer.status_code in (400, 422)
        assert len(answer.content) <= MAX_ANSWER_BYTES

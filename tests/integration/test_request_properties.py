"""Whatever a request holds, it is answered, and the engine serves the next one as before.

Requests are valid ones in which a few fields have values that their wire types allow or almost
allow, on the real engine over real HTTP (faults S1, S2, S13).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from services.rollout.openai_types import ChatRequest, CompletionRequest
from shared.schemas import GenerateRequest, ScoreRequest
from tests.replica_process import ReplicaProcess

TIMEOUT_S = 120.0
MAX_REFUSAL_BYTES = 4096
INTEGERS = [-(2**63), -1, 0, 1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 2**31 - 1, 2**31]
INTEGERS += [
    2**32,
    2**53 + 1,
    2**62,
    2**63,
    2**64,
    10**400,
    10**4299,
]  # Python reads no longer ones.
NUMBERS = [-1.0, -0.0, 0.0, 5e-324, 1e-300, 1e-9, 0.01, 0.5, 1.0, 1.0 + 1e-12, 2.0, 2.1, 10.0]
NUMBERS += [100.0, 1e9, 1e300, float("nan"), float("inf")]
TEXTS = ["", "a", "1", "s53812=", "\x00", "é", "\ud800", "\U0001f600", " ", "\n", "1" * 600]
TEXTS += ["a" * 256, "a" * 257, "base", "policy", "policy@99999999999999999999", "../..", "%s"]
LENGTHS = [0, 1, 2, 17, 65, 257, 513, 5000]


def values(
    schema: dict[str, Any], definitions: dict[str, Any], depth: int = 0
) -> st.SearchStrategy:
    """Values that fit a JSON schema, almost fit it, or are far off."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return values(definitions[name], definitions, depth + 1)
    parts = [part for kind in ("anyOf", "oneOf", "allOf") for part in schema.get(kind, ())]
    if parts:
        return st.one_of([values(part, definitions, depth) for part in parts])
    if "enum" in schema or "const" in schema:
        return st.sampled_from([*schema.get("enum", [schema.get("const")]), "other", None, 1])
    match schema.get("type"):
        case "integer":
            return st.sampled_from(INTEGERS) | st.integers(-2, 20)
        case "number":
            return st.sampled_from(NUMBERS) | st.sampled_from(INTEGERS)
        case "boolean":
            return st.sampled_from([True, False, 0, "true"])
        case "string":
            return st.sampled_from(TEXTS) | st.text(max_size=8)
        case "array" if depth < 6:
            item = values(schema["items"], definitions, depth + 1)
            repeated = st.tuples(item, st.sampled_from(LENGTHS)).map(
                lambda pair: [pair[0]] * pair[1]
            )
            return st.lists(item, max_size=3) | repeated
        case "object" if depth < 6 and schema.get("properties"):
            fields = {
                name: values(field, definitions, depth + 1)
                for name, field in schema["properties"].items()
            }
            return st.fixed_dictionaries({}, optional=fields)
        case "null":
            return st.none()
    return st.sampled_from([None, {}, [], {"a": [1, {"b": None}]}, "a", 1, 1e300])


@dataclass(frozen=True, slots=True)
class Route:
    path: str
    model: type[Any]
    valid: dict[str, Any]

    def bodies(self) -> st.SearchStrategy:
        schema = TypeAdapter(self.model).json_schema()
        definitions = schema.get("$defs", {})
        fields = {name: values(part, definitions) for name, part in schema["properties"].items()}
        if "sampling" in fields:  # Fields of sampling one by one, too: most would be refused.
            inner = definitions["SamplingParams"]["properties"]
            one = st.sampled_from(sorted(inner)).flatmap(
                lambda name: values(inner[name], definitions).map(lambda value: {name: value})
            )
            fields["sampling"] |= one.map(lambda field: self.valid["sampling"] | field)
        changes = st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True)
        changed = changes.flatmap(
            lambda names: st.fixed_dictionaries({n: fields[n] for n in names})
        )
        return changed.map(lambda change: self.valid | change)


SAMPLING = {"max_tokens": 4, "seed": 7}
ROUTES = [
    Route("/generate", GenerateRequest, {"prompts": [[1, 3, 4]], "sampling": SAMPLING}),
    Route("/score", ScoreRequest, {"sequences": [[1, 3, 4]]}),
    Route("/v1/completions", CompletionRequest, {"model": "base", "prompt": [1, 3], **SAMPLING}),
    Route(
        "/v1/chat/completions",
        ChatRequest,
        {"model": "base", "messages": [{"role": "user", "content": "1"}], **SAMPLING},
    ),
]
CONTROL = {"prompts": [[1, 3, 4, 5]], "sampling": {"max_tokens": 8, "seed": 1, "ignore_eos": True}}


@pytest.fixture(scope="module")
def http(replica: ReplicaProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=replica.url, timeout=TIMEOUT_S, trust_env=False) as http:
        yield http


def post(http: httpx.Client, path: str, body: object) -> httpx.Response:
    content = json.dumps(body).encode()
    return http.post(path, content=content, headers={"Content-Type": "application/json"})


def control(http: httpx.Client) -> dict[str, Any]:
    answer = post(http, "/generate", CONTROL)
    assert answer.status_code == 200, answer.text
    completion: dict[str, Any] = answer.json()["groups"][0]["completions"][0]
    return completion


def check(http: httpx.Client, route: Route, body: object, expected: dict[str, Any]) -> None:
    answer = post(http, route.path, body)
    assert answer.status_code in (200, 400, 404, 413, 422), answer.text
    if answer.status_code != 200:
        assert len(answer.content) <= MAX_REFUSAL_BYTES
        assert answer.json()
    after = control(http)
    assert after["token_ids"] == expected["token_ids"]
    assert after["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-6)


def properties(num_requests: int) -> Callable[..., None]:
    """The test of one route with so many requests, the same ones in every run."""

    @pytest.mark.timeout(1200)
    @pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
    def test(route: Route, http: httpx.Client) -> None:
        expected = control(http)

        @settings(
            max_examples=num_requests,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(body=route.bodies())
        def every_request_is_answered(body: object) -> None:
            check(http, route, body, expected)

        every_request_is_answered()
        assert http.get("/readyz").status_code == 200

    return test


test_hundreds_of_requests_of_each_route = properties(200)
test_thousands_of_requests_of_each_route = pytest.mark.faults(properties(1000))

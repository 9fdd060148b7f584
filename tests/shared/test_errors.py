"""An error is the same class on both sides of HTTP."""

from __future__ import annotations

import json

import pytest

from shared import errors
from shared.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InvalidRequest,
    NoFreeSlot,
    Overloaded,
    ServiceError,
    Unavailable,
    UnknownPolicy,
    from_problem,
    shown,
)

ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, ServiceError)
]


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_survives_the_wire(cls: type[ServiceError]) -> None:
    sent = cls("what happened", retry_after_s=2.0, extra={"resident": ["a"]})
    received = from_problem(json.loads(json.dumps(sent.to_problem())), sent.status)
    assert type(received) is cls
    assert (received.detail, received.retry_after_s) == ("what happened", 2.0)
    assert received.extra == {"resident": ["a"]}


def test_a_problem_is_the_object_of_rfc_9457() -> None:
    assert UnknownPolicy("gone", extra={"resident": []}).to_problem() == {
        "type": "urn:tandem:error:UnknownPolicy",
        "title": "UnknownPolicy",
        "status": 404,
        "detail": "gone",
        "resident": [],
    }


@pytest.mark.parametrize("character", ["x", "\x00", "é", "😀", "\ud800", '"'])
@pytest.mark.parametrize("num_characters", [500, 3000, 10**6])
def test_no_answer_is_longer_than_4_kib(character: str, num_characters: int) -> None:
    """Faults S8 and S13: what was sent came back, megabytes of it; a lone surrogate was a 500."""
    problem = InvalidRequest(character * num_characters).to_problem()
    assert 0 < len(json.dumps(problem, ensure_ascii=False).encode()) <= 4096


def test_a_sentence_quotes_the_begin_of_a_value_whatever_its_type_and_size() -> None:
    assert shown("as it is") == "'as it is'"
    assert shown([1, None, 0.5]) == "[1, None, 0.5]"
    assert shown(10**5000) == "<integer of 16610 bits>"
    nested: object = "x"
    for _ in range(10_000):
        nested = [nested] * 9
    for value in ("x" * 10**6, b"x" * 10**6, ["x" * 10**6] * 100, {"x" * 500: 10**5000}, nested):
        assert 8 < len(shown(value)) <= 120


def test_extra_cannot_shadow_the_fields_of_a_problem() -> None:
    problem = ServiceError("real", extra={"status": 200, "type": "x"}).to_problem()
    assert (problem["status"], problem["type"]) == (500, "urn:tandem:error:ServiceError")


@pytest.mark.parametrize(
    "problem", [{}, {"type": "about:blank"}, {"type": 5}, {"type": "urn:tandem:error:Exception"}]
)
def test_an_unknown_type_is_a_plain_service_error(problem: dict[str, object]) -> None:
    error = from_problem(problem, 418)
    assert type(error) is ServiceError
    assert error.detail == "HTTP 418"


@pytest.mark.parametrize(
    ("cls", "status"),
    [(InvalidRequest, 422), (BodyTooLarge, 413), (Unavailable, 503), (Overloaded, 429)],
)
def test_a_class_carries_its_status(cls: type[ServiceError], status: int) -> None:
    assert cls("x").to_problem()["status"] == status


@pytest.mark.parametrize("cls", [Overloaded, NoFreeSlot, DeadlineExceeded])
def test_every_error_worth_a_retry_is_unavailable(cls: type[ServiceError]) -> None:
    assert issubclass(cls, Unavailable)

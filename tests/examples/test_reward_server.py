"""The reward service of examples/http_reward, with requests like the trainer's."""

from __future__ import annotations

import httpx
import pytest

from examples.http_reward.server import create_app, score

pytestmark = pytest.mark.anyio
BODY = {
    "prompts": ["s21=", "s43="],
    "completions": ["12", "43"],
    "columns": {"answer": ["12", "34"]},
}


async def ask(body: object, *, key: str | None = "secret", given: str = "secret") -> httpx.Response:
    transport = httpx.ASGITransport(create_app(key))
    headers = {"Authorization": f"Bearer {given}"} if given else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://rewards") as client:
        return await client.post("/rewards", json=body, headers=headers)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("12358", 1.0), ("12385", 0.6), ("123", 0.6), ("", 0.0), ("123580", 0.0)],
)
def test_a_score_is_the_share_of_digits_in_place(completion: str, expected: float) -> None:
    assert score(completion, "12358") == expected


async def test_a_batch_has_a_reward_for_each_completion() -> None:
    assert (await ask(BODY)).json() == {"rewards": [1.0, 0.0]}


@pytest.mark.parametrize("given", ["", "wrong"])
async def test_without_its_key_it_refuses(given: str) -> None:
    assert (await ask(BODY, given=given)).status_code == 401
    assert (await ask(BODY, key=None, given=given)).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**BODY, "completions": ["12"]}, "must have the same length"),
        (
            {**BODY, "columns": {"gold": ["12", "34"]}},
            "needs a column 'answer'; the request has gold",
        ),
        ([], "valid dictionary"),
    ],
)
async def test_a_request_that_cannot_be_scored_is_refused_with_the_reason(
    body: object, message: str
) -> None:
    response = await ask(body)
    assert response.status_code == 422
    assert message in response.text

"""A reward service: POST /rewards {prompts, completions, columns} ─▶ {"rewards": [number, ...]}.

    REWARD_KEY=secret REWARD_PORT=8090 python -m examples.http_reward.server

It shares only this request with Tandem, so it may be written in any language and run on any
machine. Replace `score` with your model or your sandbox.
"""

from __future__ import annotations

import hmac
import os
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, model_validator

_BEARER = HTTPBearer(auto_error=False)


class RewardRequest(BaseModel):
    """Parallel lists: completion i answers prompt i, whose dataset row has columns[...][i]."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]] = {}

    @model_validator(mode="after")
    def _has_parallel_lists(self) -> RewardRequest:
        if {len(self.completions)} != {len(self.prompts), *map(len, self.columns.values())}:
            raise ValueError("prompts, completions and each column must have the same length")
        return self


class RewardResponse(BaseModel):
    rewards: list[float]


def score(completion: str, answer: str) -> float:
    """The share of the answer's characters that are in their places; 0 for a longer completion."""
    if len(completion) > len(answer):
        return 0.0
    return sum(a == b for a, b in zip(completion, answer, strict=False)) / len(answer)


def create_app(key: str | None) -> FastAPI:
    app = FastAPI(title="Rewards")

    def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        token = given.credentials if given else ""
        if key and not hmac.compare_digest(token.encode(), key.encode()):
            raise HTTPException(401, "send 'Authorization: Bearer <REWARD_KEY>'")

    @app.post("/rewards", dependencies=[Depends(check_key)])
    def rewards(body: RewardRequest) -> RewardResponse:
        """Score a whole batch; a reward model would do so in one forward pass."""
        if "answer" not in body.columns:
            raise HTTPException(
                422,
                "the dataset needs a column 'answer'; the request has "
                f"{', '.join(body.columns) or 'no columns'}",
            )
        pairs = zip(body.completions, body.columns["answer"], strict=True)
        return RewardResponse(
            rewards=[score(completion, str(answer)) for completion, answer in pairs]
        )

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


if __name__ == "__main__":
    uvicorn.run(
        create_app(os.environ.get("REWARD_KEY")),
        host="127.0.0.1",
        port=int(os.environ.get("REWARD_PORT", "8090")),
    )

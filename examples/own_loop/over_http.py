"""Your own training loop over HTTP: sample, score and train with two clients.

`python -m examples.own_loop.over_http` needs both services (docs/first_run.md), and TANDEM_API_KEY
if they have a key. The trainer holds policy and optimizer; your code holds prompts, rewards and
control flow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
from itertools import islice

from services.trainer.data.sort_digits import training_problems
from shared.errors import ServiceError
from shared.rollout_client import RolloutClient
from shared.schemas import (
    CompletionGroup,
    GenerateRequest,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    TrainRequest,
)
from shared.trainer_client import TrainerClient

RUN = {
    "managed": False,  # this loop brings its own prompts and rewards
    "lora": {"rank": 16, "alpha": 32},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    "replace_run": True,
}


def score(group: CompletionGroup, answer: str) -> ScoredGroup:
    """1 for the right answer, else 0."""
    return ScoredGroup(
        prompt_token_ids=group.prompt_token_ids,
        sampling=group.sampling,
        completions=tuple(
            ScoredCompletion(completion=completion, reward=float(completion.text == answer))
            for completion in group.completions
        ),
    )


async def train(rollout: RolloutClient, trainer: TrainerClient, num_steps: int) -> None:
    problems = training_problems(random.Random(0))
    policy = (await trainer.start_run(RUN)).policy
    try:
        for step in range(num_steps):
            prompts, answers = zip(*islice(problems, 16), strict=True)
            response = await rollout.generate(
                GenerateRequest(
                    prompts=prompts,
                    policy=policy,  # pins the version; the response names it for every token
                    purpose="train",
                    sampling=SamplingParams(n=8, max_tokens=8, seed=1000 * step),
                )
            )
            trained = await trainer.train(
                TrainRequest(
                    groups=tuple(map(score, response.groups, answers)),
                    expected_policy=policy,
                    idempotency_key=f"step-{step}",  # a retried request does not update twice
                )
            )
            policy = trained.policy  # every replica already has this version
            print(f"{policy}: reward {trained.step.reward_mean:.2f}")
    finally:
        await trainer.stop_run()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollout-url", default="http://127.0.0.1:8000")
    parser.add_argument("--trainer-url", default="http://127.0.0.1:8080")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    api_key = os.environ.get("TANDEM_API_KEY")
    async with (
        RolloutClient(arguments.rollout_url, api_key=api_key) as rollout,
        TrainerClient(arguments.trainer_url, api_key=api_key) as trainer,
    ):
        try:
            await train(rollout, trainer, arguments.steps)
        except ServiceError as error:
            raise SystemExit(error.detail) from error


if __name__ == "__main__":
    asyncio.run(main())

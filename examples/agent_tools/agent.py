"""An agent that speaks OpenAI to the policy, and learns from exactly the tokens that it sampled.

    chat ─▶ ids of turn 1 ─▶ calculator ─▶ ids so far + ids of its result ─▶ turn 2 ─▶ …
                                                  every turn ─▶ ScoredGroup ─▶ POST /train

No text of the policy is tokenized again: "08" + "5s" and "085s" may be other tokens than what was
sampled. The first answer comes with the ids of the prompt that the chat template made and of what
was sampled. From then on the conversation is a list of ids, to which only the tool's text is added,
and goes to /v1/completions as it is: so every prompt is the one before, what was sampled, and the
tool's result.

A completion has no mask for tokens that the tool wrote. Each turn is therefore a sample of its own:
what came before is its prompt, which has no loss, and the reward is that of the episode. Turns of
one number have different prompts, so there is no group to compare them in: REINFORCE++ takes groups
of one, and compares with the mean of the batch.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI
from openai.types import CompletionChoice
from openai.types.chat.chat_completion import Choice as ChatChoice

from examples.agent_tools.task import (
    MAX_TURN_TOKENS,
    MAX_TURNS,
    Problem,
    calculator,
    problem,
    reward,
)
from examples.demo.model import CHARACTERS
from shared.schemas import (
    Completion,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    StepRecord,
    TrainRequest,
)
from shared.trainer_client import TrainerClient

RUN = {
    "managed": False,
    "algorithm": {"name": "reinforce_pp"},
    "lora": {"rank": 16, "alpha": 32},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    "replace_run": True,
}
_CALL = CHARACTERS.index("=")  # the token that ends a call
# What OpenAI's API lacks: the ids, no sampling that a gradient cannot use, and where a call ends.
_EXTRA = {"return_token_ids": True, "purpose": "train", "stop_token_ids": [_CALL]}

Encode = Callable[[str], list[int]]  # without special tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy said at once, as it was sampled."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    completion: Completion

    @property
    def calls(self) -> bool:
        return self.completion.token_ids[-1] == _CALL

    @property
    def conversation(self) -> tuple[int, ...]:
        return self.prompt_token_ids + self.completion.token_ids


@dataclass(frozen=True, slots=True)
class Episode:
    problem: Problem
    turns: tuple[Turn, ...]
    reward: float

    @property
    def num_calls(self) -> int:
        return sum(turn.calls for turn in self.turns)

    def groups(self) -> list[ScoredGroup]:
        return [
            ScoredGroup(
                prompt_token_ids=turn.prompt_token_ids,
                sampling=turn.sampling,
                completions=(ScoredCompletion(completion=turn.completion, reward=self.reward),),
            )
            for turn in self.turns
        ]


async def play(
    client: AsyncOpenAI, encode: Encode, problem: Problem, *, model: str, seed: int
) -> Episode:
    """One conversation, to its answer."""
    chat = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": problem.question}],
        max_tokens=MAX_TURN_TOKENS,
        logprobs=True,
        seed=seed,
        extra_body=_EXTRA,
    )
    turns = [_chat_turn(chat.choices[0])]
    while turns[-1].calls and len(turns) < MAX_TURNS:
        result = calculator(turns[-1].completion.text or "")
        if result is None:
            break
        answer = await client.completions.create(
            model=model,
            prompt=[*turns[-1].conversation, *encode(result)],
            max_tokens=MAX_TURN_TOKENS,
            logprobs=0,
            seed=seed + len(turns),
            extra_body=_EXTRA,
        )
        turns.append(_turn(answer.choices[0]))
    last = turns[-1]
    text = "" if last.calls else last.completion.text or ""
    return Episode(problem, tuple(turns), reward(problem, text))


def _chat_turn(choice: ChatChoice) -> Turn:
    assert choice.logprobs
    logprobs = [token.logprob for token in choice.logprobs.content or ()]
    return _as_turn(choice, choice.message.content, logprobs)


def _turn(choice: CompletionChoice) -> Turn:
    assert choice.logprobs
    return _as_turn(choice, choice.text, choice.logprobs.token_logprobs or ())


def _as_turn(
    choice: ChatChoice | CompletionChoice, text: str | None, logprobs: Sequence[float]
) -> Turn:
    """`model_extra` has the fields that are Tandem's own."""
    extra = choice.model_extra
    assert extra
    return Turn(
        prompt_token_ids=tuple(extra["prompt_token_ids"]),
        sampling=SamplingParams.model_validate(extra["sampling"]),
        completion=Completion.model_validate(
            {
                "token_ids": extra["token_ids"],
                "logprobs": logprobs,
                "segments": extra["segments"],
                "finish_reason": choice.finish_reason,
                "text": text,
            }
        ),
    )


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """What one update learned from, and what it says of itself."""

    episodes: tuple[Episode, ...]
    record: StepRecord

    @property
    def reward(self) -> float:
        return sum(episode.reward for episode in self.episodes) / len(self.episodes)

    @property
    def num_calls(self) -> float:
        """Mean of an episode."""
        return sum(episode.num_calls for episode in self.episodes) / len(self.episodes)


async def train(
    client: AsyncOpenAI,
    trainer: TrainerClient,
    encode: Encode,
    *,
    num_steps: int,
    num_episodes: int,
    seed: int = 0,
    on_step: Callable[[Step], object] = lambda _: None,
) -> list[Step]:
    """The whole run: play, score, train, again."""
    rng = random.Random(seed)
    policy = (await trainer.start_run(RUN)).policy
    steps = []
    try:
        for number in range(num_steps):
            # Pinned: the base at first, then the version that the last update made.
            model = f"policy@{policy.version}"
            episodes = await asyncio.gather(
                *(
                    play(client, encode, problem(rng), model=model, seed=rng.randrange(2**40))
                    for _ in range(num_episodes)
                )
            )
            policy, step = await _update(trainer, tuple(episodes), policy, number)
            steps.append(step)
            on_step(step)
    finally:
        await trainer.stop_run()
    return steps


async def _update(
    trainer: TrainerClient, episodes: tuple[Episode, ...], policy: PolicyId, number: int
) -> tuple[PolicyId, Step]:
    trained = await trainer.train(
        TrainRequest(
            groups=tuple(group for episode in episodes for group in episode.groups()),
            expected_policy=policy,
            idempotency_key=f"step-{number}",  # a retry takes no second step
        )
    )
    return trained.policy, Step(episodes, trained.step)

"""An agent that talks to the policy over OpenAI's API and trains on exactly the sampled tokens.

    chat ─▶ ids of turn 1 ─▶ calculator ─▶ ids so far + ids of its result ─▶ turn 2 ─▶ …
                                                  every turn ─▶ ScoredGroup ─▶ POST /train

The policy's text is never tokenized again, because "08" + "5s" and "085s" may tokenize differently
from what was sampled. The first response contains the ids of the prompt, as the chat template made
it, and the ids that were sampled. From then on the conversation is a list of ids: the agent appends
only the tool's text and sends the list to /v1/completions. Every prompt is therefore the previous
prompt, the sampled tokens and the tool's result.

A completion has no mask for tokens that the tool wrote, so each turn is a separate sample: all that
precedes it is its prompt, which has no loss, and its reward is the reward of the episode. The turns
of different episodes have different prompts, so there is no group in which to compare them:
REINFORCE++ accepts groups of one and compares with the mean of the batch.
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
# Extensions of OpenAI's API: return token ids, refuse sampling unfit for training, end at a call.
_EXTRA = {"return_token_ids": True, "purpose": "train", "stop_token_ids": [_CALL]}

Encode = Callable[[str], list[int]]  # adds no special tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One completion of the policy and the prompt that it continues, as sampled."""

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
    """Play one episode, until the policy answers or makes too many or invalid calls."""
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
    """Build a Turn from a choice; `model_extra` holds Tandem's additional fields."""
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
    """The episodes of one update and the record that the trainer returned."""

    episodes: tuple[Episode, ...]
    record: StepRecord

    @property
    def reward(self) -> float:
        return sum(episode.reward for episode in self.episodes) / len(self.episodes)

    @property
    def num_calls(self) -> float:
        """Mean number of calculator calls per episode."""
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
    """The whole run: play, score and train, `num_steps` times."""
    rng = random.Random(seed)
    policy = (await trainer.start_run(RUN)).policy
    steps = []
    try:
        for number in range(num_steps):
            # Pin the version: first the base, then the version that the last update produced.
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
            idempotency_key=f"step-{number}",  # a retried request does not update twice
        )
    )
    return trained.policy, Step(episodes, trained.step)

"""The newest groups, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.tokens import PromptEncoder
from services.trainer.run.recent import MAX_COMPLETIONS, RecentGroups, in_words
from shared.schemas import (
    Completion,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
)


def scored_group(
    prompt: tuple[int, ...], *answers: tuple[int, ...], text: str | None = None
) -> ScoredGroup:
    policy = PolicyId(run_id="ours", version=3)
    return ScoredGroup(
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        completions=tuple(
            ScoredCompletion(
                completion=Completion(
                    token_ids=answer,
                    logprobs=(-1.0,) * len(answer),
                    segments=(Segment(policy=policy, num_tokens=len(answer)),),
                    finish_reason="stop",
                    text=text,
                ),
                reward=1.5,
                rewards=(1.0, 0.5),
            )
            for answer in answers
        ),
    )


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> PromptEncoder:
    return PromptEncoder.load(tiny_checkpoint)


def test_the_newest_come_first_and_the_oldest_leave_when_there_are_too_many() -> None:
    recent = RecentGroups()
    for step in range(1, 12):
        recent.add(step, [scored_group((3,), *[(4,)] * 8), scored_group((5,), *[(6,)] * 8)])
    newest = recent.newest(100)
    assert [(item.step, item.index) for item in newest] == [
        (step, index) for step in (11, 10, 9, 8) for index in (1, 0)
    ]
    assert sum(len(item.group.completions) for item in newest) == MAX_COMPLETIONS
    assert [item.step for item in recent.newest(1)] == [11]


def test_a_group_of_more_completions_than_are_kept_is_kept_alone() -> None:
    recent = RecentGroups()
    recent.add(1, [scored_group((3,), (4,))])
    recent.add(2, [scored_group((3,), *[(4,)] * (MAX_COMPLETIONS + 1))])
    assert [item.step for item in recent.newest(9)] == [2]


def test_a_text_is_the_replicas_or_the_decoded_ids(encoder: PromptEncoder) -> None:
    recent = RecentGroups()
    prompt, answer = encoder.encode("12"), encoder.encode_answer("21")
    recent.add(1, [scored_group(prompt, answer), scored_group(prompt, answer, text="as it was")])
    theirs, decoded = in_words(recent.newest(2), encoder)
    assert theirs.completions[0].text == "as it was"
    assert decoded.completions[0].text == "21"
    assert decoded.prompt == encoder.decode(prompt)
    assert decoded.completions[0].num_tokens == len(answer)
    assert decoded.completions[0].rewards == (1.0, 0.5)

"""Drafts: a replica is asked for what another one did not finish."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.generation import Draft, Part
from shared.errors import ServiceError
from shared.schemas import (
    CompletionGroup,
    GenerateRequest,
    PolicyId,
    SamplingParams,
    StreamStart,
    StreamTokens,
)
from tests.fake_replica import check_groups, policy_at

MAX_TOKENS = 6


def request(num_prompts: int = 1, n: int = 2, **sampling: Any) -> GenerateRequest:
    fields = {"n": n, "max_tokens": MAX_TOKENS, "seed": 7, **sampling}
    return GenerateRequest(
        prompts=tuple((3, i) for i in range(num_prompts)),
        sampling=SamplingParams(**fields),
        purpose="train",
    )


def serve(draft: Draft, part: Part, num_tokens: int) -> None:
    """Stream `num_tokens` tokens of each completion that `part` requests, or fewer at its end."""
    asked = part.request
    assert asked.policy
    assert asked.sampling.max_tokens
    for group, prompt in enumerate(asked.prompts):
        assert isinstance(prompt, tuple)
        draft.add(
            part,
            StreamStart(
                group=group,
                prompt_token_ids=tuple(prompt),
                sampling=asked.sampling,
                policy=asked.policy,
                boot_id="boot",
            ),
        )
    for index in range(min(num_tokens, asked.sampling.max_tokens)):
        place = len(asked.completion_prefix) + index
        for group in range(len(asked.prompts)):
            for completion in range(asked.sampling.n):
                draft.add(part, tokens(asked.policy, place, group, completion, asked.sampling))


def tokens(
    policy: PolicyId, place: int, group: int, completion: int, sampling: SamplingParams
) -> StreamTokens:
    return StreamTokens(
        group=group,
        completion=completion,
        token_ids=(1000 * policy.version + place,),
        logprobs=(-1.0,),
        finish_reason="length" if place + 1 == MAX_TOKENS else None,
    )


def finish(draft: Draft, version: int) -> list[CompletionGroup]:
    for part in draft.parts(policy_at(version)):
        serve(draft, part, MAX_TOKENS)
    return draft.groups()


@given(
    attempts=st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), max_size=5),
    num_prompts=st.integers(1, 3),
    n=st.integers(1, 2),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_completions_are_complete_wherever_and_however_often_their_streams_are_cut(
    attempts: list[list[int]], num_prompts: int, n: int
) -> None:
    draft = Draft(request(num_prompts, n))
    for version, cuts in enumerate(attempts, start=1):
        for part, num_tokens in zip(draft.parts(policy_at(version)), cuts, strict=False):
            serve(draft, part, num_tokens)
    groups = finish(draft, version=9)
    assert [group.prompt_token_ids for group in groups] == [(3, i) for i in range(num_prompts)]
    check_groups(groups, n=n, max_tokens=MAX_TOKENS)


def test_a_request_without_any_token_is_repeated_unchanged() -> None:
    draft = Draft(request(num_prompts=2))
    (first,) = draft.parts(policy_at(1))
    serve(draft, first, 0)
    (second,) = draft.parts(policy_at(1))
    assert second == first
    finish(draft, version=1)
    assert draft.num_continued == 0


def test_the_rest_is_requested_with_the_tokens_so_far_and_new_noise() -> None:
    draft = Draft(request(min_tokens=4))
    (whole,) = draft.parts(policy_at(1))
    serve(draft, whole, 2)
    parts = draft.parts(policy_at(2))
    assert [part.completion for part in parts] == [0, 1]
    for part in parts:
        asked = part.request
        assert (asked.policy, asked.purpose) == (policy_at(2), "train")
        assert asked.completion_prefix == (1000, 1001)
        assert (asked.sampling.n, asked.sampling.max_tokens, asked.sampling.min_tokens) == (1, 4, 2)
    seeds = {part.request.sampling.seed for part in parts}
    assert len(seeds | {7, 8}) == 4
    assert seeds == {part.request.sampling.seed for part in draft.parts(policy_at(3))}
    (group,) = finish(draft, version=2)
    assert [[s.num_tokens for s in c.segments] for c in group.completions] == [[2, 4]] * 2
    assert draft.num_continued == 2


def test_a_completion_without_a_token_is_requested_with_its_original_seed() -> None:
    draft = Draft(request())
    (whole,) = draft.parts(policy_at(1))
    serve(draft, whole, 0)
    draft.add(whole, tokens(policy_at(1), 0, 0, 0, whole.request.sampling))
    _, second = draft.parts(policy_at(1))
    assert second.request.completion_prefix == ()
    assert second.request.sampling.seed == 8  # Completion k uses seed + k.


@pytest.mark.parametrize("sampling", [{"stop": ("x",)}, {"presence_penalty": 1.0}])
def test_a_completion_that_cannot_be_continued_starts_again(
    sampling: dict[str, Any],
) -> None:
    draft = Draft(request(**sampling))
    (whole,) = draft.parts(policy_at(1))
    serve(draft, whole, 2)
    assert [part.request.completion_prefix for part in draft.parts(policy_at(1))] == [(), ()]
    check_groups(finish(draft, version=1), n=2, max_tokens=MAX_TOKENS)


def test_an_interrupted_completion_is_not_complete() -> None:
    draft = Draft(request(n=1))
    (whole,) = draft.parts(policy_at(1))
    serve(draft, whole, 1)
    cut = StreamTokens(
        group=0, completion=0, token_ids=(1001,), logprobs=(-1.0,), finish_reason="interrupted"
    )
    draft.add(whole, cut)
    assert not draft.is_complete
    (part,) = draft.parts(policy_at(2))
    assert part.request.completion_prefix == (1000, 1001)


def test_unexpected_records_are_refused() -> None:
    draft = Draft(request(n=1))
    (whole,) = draft.parts(policy_at(1))
    early = tokens(policy_at(1), 0, 0, 0, whole.request.sampling)
    with pytest.raises(ServiceError, match="whose group has not started"):
        draft.add(whole, early)
    other = StreamStart(
        group=0,
        prompt_token_ids=(3,),
        sampling=whole.request.sampling,
        policy=policy_at(2),
        boot_id="boot",
    )
    with pytest.raises(ServiceError, match=r"@1 was requested, but a stream is served by .*@2"):
        draft.add(whole, other)
    serve(draft, whole, MAX_TOKENS)
    with pytest.raises(ServiceError, match="already complete"):
        draft.add(whole, early)

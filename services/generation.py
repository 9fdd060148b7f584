"""The state of a request's completions while they are sampled, possibly by several replicas.

The trainer's fleet asks another replica for missing tokens; the OpenAI endpoint asks its own.

    GenerateRequest ─▶ Draft.parts() ──▶ one stream each ──records──▶ Draft.add() ─▶ Draft.groups()
                           ▲                                              │
                           └────── a stream ended early: the rest ────────┘

A completion that a replica could not finish keeps its tokens, their logprobs and their versions,
and the next attempt asks for the rest. Only tokens that were never received are sampled again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.errors import ServiceError
from shared.schemas import (
    MAX_SEED,
    Completion,
    CompletionGroup,
    GenerateRequest,
    PolicyId,
    SamplingParams,
    Segment,
    StreamStart,
    StreamTokens,
)


@dataclass(frozen=True, slots=True)
class Part:
    """One request of an attempt.

    Completion c of its group g is completion `[group + g][completion + c]` of the draft.
    """

    request: GenerateRequest
    group: int
    completion: int
    num_completions: int
    num_tokens: int  # The most tokens that its completions may have.


@dataclass(slots=True)
class Partial:
    """The tokens of one completion so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None  # `stop` or `length`; None while it is incomplete.
    was_continued: bool = False

    def extend(self, policy: PolicyId, record: StreamTokens) -> None:
        if count := len(record.token_ids):
            self.token_ids += record.token_ids
            self.logprobs += record.logprobs
            if self.segments and self.segments[-1].policy == policy:
                count += self.segments.pop().num_tokens
            self.segments.append(Segment(policy=policy, num_tokens=count))
        if record.text is not None:
            self.texts.append(record.text)
        if record.finish_reason != "interrupted":
            self.finish_reason = record.finish_reason


class Draft:
    """The groups of one request, from empty to complete."""

    def __init__(self, request: GenerateRequest) -> None:
        assert not request.completion_prefix, "a draft sets the prefix of each attempt itself"
        self.request = request
        self._starts: list[StreamStart | None] = [None] * len(request.prompts)
        self._policies: dict[tuple[int, int], PolicyId] = {}
        self._partials = [[Partial() for _ in range(request.sampling.n)] for _ in request.prompts]

    @property
    def is_complete(self) -> bool:
        return not any(True for _ in self._unfinished())

    @property
    def num_continued(self) -> int:
        """Completions that kept the tokens of one stream and were continued by another."""
        return sum(partial.was_continued for partials in self._partials for partial in partials)

    @property
    def num_tokens(self) -> int:
        """Tokens received so far."""
        return sum(len(partial.token_ids) for group in self._partials for partial in group)

    def _unfinished(self) -> Iterator[tuple[int, int, Partial]]:
        for group, partials in enumerate(self._partials):
            for index, partial in enumerate(partials):
                if partial.finish_reason is None:
                    yield group, index, partial

    def partial(self, part: Part, record: StreamTokens) -> Partial:
        """The completion to which `record` was added."""
        return self._partials[part.group + record.group][part.completion + record.completion]

    @property
    def begins_again(self) -> bool:
        """Whether the next attempt discards tokens because it cannot continue after them."""
        return not _can_continue(self.request.sampling) and any(
            partial.token_ids for _, _, partial in self._unfinished()
        )

    # --- ask ------------------------------------------------------------------------------------

    def parts(self, policy: PolicyId) -> list[Part]:
        """The requests that complete the draft under `policy`.

        Before the first token this is the whole request, then one request per unfinished
        completion.
        """
        if not self.num_tokens:
            request = self.request.model_copy(update={"policy": policy, "stream": True})
            num_completions = len(request.prompts) * request.sampling.n
            limit = request.sampling.max_tokens or 1
            return [Part(request, 0, 0, num_completions, num_completions * limit)]
        return [
            self._rest(group, index, partial, policy)
            for group, index, partial in self._unfinished()
        ]

    def _rest(self, group: int, index: int, partial: Partial, policy: PolicyId) -> Part:
        start = self._starts[group]
        assert start, "tokens arrived before the start record of their group"
        limit = start.sampling.max_tokens
        assert limit, "a start record without max_tokens was added"
        if not _can_continue(start.sampling):
            self._partials[group][index] = partial = Partial()
        num_kept = len(partial.token_ids)
        partial.was_continued |= num_kept > 0
        num_left = limit - num_kept
        request = GenerateRequest(
            prompts=(start.prompt_token_ids,),
            sampling=start.sampling.model_copy(
                update={
                    "n": 1,
                    "max_tokens": num_left,
                    "min_tokens": max(0, start.sampling.min_tokens - num_kept),
                    "seed": _seed(start.sampling.seed, index, num_kept),
                }
            ),
            policy=policy,
            purpose=self.request.purpose,
            completion_prefix=tuple(partial.token_ids),
            stream=True,
        )
        return Part(request, group, index, 1, num_left)

    # --- receive --------------------------------------------------------------------------------

    def add(self, part: Part, record: StreamStart | StreamTokens) -> None:
        """Add one record of the stream of `part`. Raises ServiceError for an unexpected record."""
        group = part.group + record.group
        if not group < len(self._partials):
            raise ServiceError(f"a stream has group {record.group}, which was not requested")
        if isinstance(record, StreamStart):
            if record.policy != part.request.policy:
                raise ServiceError(
                    f"policy {part.request.policy} was requested, but a stream is served by "
                    f"{record.policy}"
                )
            if record.sampling.max_tokens is None:
                raise ServiceError("a stream starts a group without max_tokens")
            self._starts[group] = self._starts[group] or record
            return
        index, start = part.completion + record.completion, self._starts[group]
        if start is None or not index < len(self._partials[group]):
            raise ServiceError(
                f"a stream has tokens of completion {record.completion}, which was not requested "
                "or whose group has not started"
            )
        partial = self._partials[group][index]
        if partial.finish_reason is not None:
            raise ServiceError("a stream has tokens of a completion that is already complete")
        assert part.request.policy
        assert start.sampling.max_tokens
        num_left = start.sampling.max_tokens - len(partial.token_ids) - len(record.token_ids)
        if num_left < 0:
            raise ServiceError(f"a completion has {-num_left} more tokens than requested")
        partial.extend(part.request.policy, record)
        if num_left == 0:
            partial.finish_reason = partial.finish_reason or "length"

    def groups(self) -> list[CompletionGroup]:
        """The complete groups, in the order of the prompts."""
        assert self.is_complete
        return [
            CompletionGroup(
                prompt_token_ids=start.prompt_token_ids,
                completions=tuple(map(_completion, partials)),
                sampling=start.sampling,
            )
            for start, partials in zip(self._starts, self._partials, strict=True)
            if start
        ]


def _completion(partial: Partial) -> Completion:
    # Two streams may split a character, so a continued completion has exact tokens but no text.
    text = "".join(partial.texts) if partial.texts and not partial.was_continued else None
    return Completion.model_validate(
        {
            "token_ids": partial.token_ids,
            "logprobs": partial.logprobs,
            "segments": partial.segments,
            "finish_reason": partial.finish_reason,
            "text": text,
        }
    )


def _can_continue(sampling: SamplingParams) -> bool:
    """Whether a completion samples the same when its first tokens become context.

    False with stop strings, which may span the seam, and with penalties that count output tokens;
    such a completion starts again.
    """
    penalties = sampling.presence_penalty, sampling.frequency_penalty
    return not sampling.stop and not any(penalties)


def _seed(seed: int | None, index: int, num_kept: int) -> int | None:
    """The original seed for a completion without tokens, else one that gives new noise."""
    if seed is None:
        return None
    if num_kept == 0:
        return (seed + index) % MAX_SEED
    digest = hashlib.sha256(f"{seed}/{index}/{num_kept}".encode()).digest()
    return int.from_bytes(digest[:7]) % MAX_SEED

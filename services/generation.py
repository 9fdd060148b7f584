"""What is known of a request's completions while they are sampled, on whichever replica: the
trainer's fleet asks another one for what is missing, the OpenAI endpoint its own.

    GenerateRequest ─▶ Draft.parts() ──▶ one stream each ──records──▶ Draft.add() ─▶ Draft.groups()
                           ▲                                              │
                           └────── a stream ended early: the rest ────────┘

A completion that a replica could not finish keeps its tokens, their logprobs and their versions;
the next attempt asks for the rest of it. Only what nobody has received is sampled again.
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
    """One request of an attempt. Its group g, completion c is `[group + g][completion + c]` of the
    draft."""

    request: GenerateRequest
    group: int
    completion: int
    num_completions: int
    num_tokens: int  # at most to come


@dataclass(slots=True)
class Partial:
    """One completion so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None  # stop or length, once it is complete
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
    """The groups of one request, from nothing to complete."""

    def __init__(self, request: GenerateRequest) -> None:
        assert not request.completion_prefix, "a draft continues completions by itself"
        self.request = request
        self._starts: list[StreamStart | None] = [None] * len(request.prompts)
        self._policies: dict[tuple[int, int], PolicyId] = {}
        self._partials = [[Partial() for _ in range(request.sampling.n)] for _ in request.prompts]

    @property
    def is_complete(self) -> bool:
        return not any(True for _ in self._unfinished())

    @property
    def num_continued(self) -> int:
        """Completions that took more than one stream and kept tokens of an earlier one."""
        return sum(partial.was_continued for partials in self._partials for partial in partials)

    @property
    def num_tokens(self) -> int:
        """That have come so far."""
        return sum(len(partial.token_ids) for group in self._partials for partial in group)

    def _unfinished(self) -> Iterator[tuple[int, int, Partial]]:
        for group, partials in enumerate(self._partials):
            for index, partial in enumerate(partials):
                if partial.finish_reason is None:
                    yield group, index, partial

    def partial(self, part: Part, record: StreamTokens) -> Partial:
        """The completion that `record`, which was added, belongs to."""
        return self._partials[part.group + record.group][part.completion + record.completion]

    @property
    def begins_again(self) -> bool:
        """Whether the next attempt throws tokens away, because what follows them would differ."""
        return not _can_continue(self.request.sampling) and any(
            partial.token_ids for _, _, partial in self._unfinished()
        )

    # --- ask ------------------------------------------------------------------------------------

    def parts(self, policy: PolicyId) -> list[Part]:
        """The requests of the next attempt, which would complete the draft under `policy`.

        The whole one as long as no token has come, then one per unfinished completion.
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
        assert start, "tokens come after the start of their group"
        limit = start.sampling.max_tokens
        assert limit, "a replica says what limit it applies"
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
        """Take in one record of the stream of `part`. Raises ServiceError for one out of place."""
        group = part.group + record.group
        if not group < len(self._partials):
            raise ServiceError(f"a stream has group {record.group}, which nobody asked for")
        if isinstance(record, StreamStart):
            if record.policy != part.request.policy:
                raise ServiceError(f"asked for {part.request.policy}, served {record.policy}")
            if record.sampling.max_tokens is None:
                raise ServiceError("a stream does not say how many tokens a completion may have")
            self._starts[group] = self._starts[group] or record
            return
        index, start = part.completion + record.completion, self._starts[group]
        if start is None or not index < len(self._partials[group]):
            raise ServiceError(
                f"a stream has tokens of completion {record.completion} out of place"
            )
        partial = self._partials[group][index]
        if partial.finish_reason is not None:
            raise ServiceError("a stream has tokens of a completion that was complete")
        assert part.request.policy
        assert start.sampling.max_tokens
        num_left = start.sampling.max_tokens - len(partial.token_ids) - len(record.token_ids)
        if num_left < 0:
            raise ServiceError(f"a completion has {-num_left} tokens more than were asked for")
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
    # Texts of two streams may split a character: only the tokens of a continued one are exact.
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
    """False where a replica that sees the first tokens as context would sample differently: a stop
    string across the seam, penalties that count output tokens. Such a completion starts again."""
    penalties = sampling.presence_penalty, sampling.frequency_penalty
    return not sampling.stop and not any(penalties)


def _seed(seed: int | None, index: int, num_kept: int) -> int | None:
    """The first seed again for a completion without tokens, else one whose noise is new."""
    if seed is None:
        return None
    if num_kept == 0:
        return (seed + index) % MAX_SEED
    digest = hashlib.sha256(f"{seed}/{index}/{num_kept}".encode()).digest()
    return int.from_bytes(digest[:7]) % MAX_SEED

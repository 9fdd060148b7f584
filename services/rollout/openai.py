"""OpenAI's API on the path of /generate: request -> GenerateRequest -> StreamRecords -> answer.

Clients of OpenAI's API cannot continue an interrupted completion, so the replica does: a completion
that a sync with in_flight=continue stops is continued from its tokens, under the version that is
then newest or that the request pins. Where this would not be exact (stop strings, penalties), it is
sampled again from the start; in a stream, whose text has been sent, that is an error. A draining
replica answers an error as well: half a completion is never answered as a whole one.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fastapi.responses import JSONResponse

from services.generation import Draft, Part, Partial
from services.http import error_headers
from services.rollout.openai_types import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Delta,
    ErrorAnswer,
    ErrorBody,
    Model,
    Models,
    TokenLogprob,
    Usage,
)
from services.rollout.replica import Replica
from services.rollout.sampler import Sampler
from services.rollout.streams import merged
from services.tokens import PromptEncoder
from shared.errors import (
    DeadlineExceeded,
    NotReady,
    ServiceError,
    Unavailable,
    UnknownPolicy,
    from_problem,
)
from shared.schemas import (
    BASE_POLICY,
    GenerateRequest,
    PolicyId,
    SamplingParams,
    Segment,
    StreamAlive,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTokens,
    Wire,
)

_VERSION = re.compile(r"policy@(\d{1,18})", re.ASCII)
_HIDDEN_CHARACTER = "\ufffd"  # Decoded when the last tokens are part of a character.
_LAST_RECORD_S = 2.0
_PINNED_PAUSE_S = 0.1  # A sync that interrupts a version watches for late requests a moment longer.

Body = CompletionRequest | ChatRequest
Records = list[tuple[Part, StreamStart | StreamTokens]]  # An empty list is a sign of life.


class OpenAiEndpoint:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._created = int(time.time())

    # --- models ---------------------------------------------------------------------------------

    def models(self) -> Models:
        """`policy`, every resident version of the current run, and `base`."""
        serving = self._replica.serving
        try:
            newest = serving.sampler.resolve(None)
        except NotReady:
            newest = None
        versions = [item.policy for item in serving.policies.resident() if item.accepts_requests]
        named = [("policy", newest), *((_model_name(policy), policy) for policy in versions)]
        return Models(
            data=tuple(
                Model(
                    id=name,
                    created=self._created,
                    root=self._replica.settings.model,
                    policy=policy,
                    max_model_len=serving.limits.max_model_len,
                )
                for name, policy in [*named, ("base", BASE_POLICY)]
            )
        )

    def model(self, name: str) -> Model:
        for model in self.models().data:
            if model.id == name:
                return model
        raise _unknown_model(name)

    def _pinned(self, name: str) -> PolicyId | None:
        """The version that a model name pins, None for the newest. Raises UnknownPolicy."""
        if name == "policy":
            return None
        if name == "base":
            return BASE_POLICY
        if match := _VERSION.fullmatch(name):
            newest = self._replica.serving.policies.newest
            return newest.model_copy(update={"version": int(match[1])})
        raise _unknown_model(name)

    # --- completions ----------------------------------------------------------------------------

    async def complete(self, body: Body) -> CompletionAnswer | ChatAnswer:
        draft, writer = self._drafted(body)
        async with aclosing(self._records(body, draft, may_begin_again=True)) as batches:
            async for records in batches:
                for part, record in records:
                    writer.begin(part)
                    draft.add(part, record)
        return writer.answer(draft)

    async def stream(self, body: Body) -> AsyncGenerator[Sequence[Wire]]:
        """Batches of chunks. What is refused is raised before the first one; later errors are
        records, and the last ones."""
        draft, writer = self._drafted(body)
        errors, has_begun = self._replica.metrics.errors, False
        try:
            async with aclosing(self._records(body, draft, may_begin_again=False)) as batches:
                async for records in batches:
                    chunks: list[Wire] = []
                    for part, record in records:
                        writer.begin(part)
                        draft.add(part, record)
                        if isinstance(record, StreamStart):
                            chunks += writer.opening_chunks(part, record)
                        else:
                            partial = draft.partial(part, record)
                            chunks.append(writer.chunk(part, record, partial))
                    yield chunks or [StreamAlive()]
                    has_begun = True
        except (asyncio.CancelledError, GeneratorExit):
            errors.labels("ClientClosed").inc()
            raise
        except ServiceError as error:
            if not has_begun:
                raise
            errors.labels(type(error).__name__).inc()
            yield [error_answer(error)]
            return
        last: list[Wire] = [writer.usage_chunk(draft)] if body.stream_options.include_usage else []
        yield [*last, StreamEnd(boot_id=self._replica.boot_id)]

    def _drafted(self, body: Body) -> tuple[Draft, _Writer]:
        request = GenerateRequest(
            prompts=body.prompts(), sampling=body.sampling(), purpose=body.purpose
        )
        # A draft takes room for every completion of the request.
        self._replica.serving.sampler.check_room(len(request.prompts) * request.sampling.n)
        return Draft(request), _Writer(body, self._replica.serving.encoder, self._replica.boot_id)

    @property
    def stream_timeout_s(self) -> float:
        """No attempt begins later than one request timeout, and none takes longer."""
        return 2 * self._replica.settings.request_timeout_s + _LAST_RECORD_S

    async def _records(
        self, body: Body, draft: Draft, *, may_begin_again: bool
    ) -> AsyncGenerator[Records]:
        """What the engine says, until `draft`, to which it is to be added, is complete."""
        timeout_s = self._replica.settings.request_timeout_s
        deadline = time.monotonic() + timeout_s
        pinned = self._pinned(body.model)
        while not draft.is_complete:
            if draft.begins_again and not may_begin_again:
                raise Unavailable(
                    "new weights interrupted this stream, and with stop strings or penalties it "
                    "cannot be continued exactly: send the request again",
                    retry_after_s=1.0,
                )
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"new weights interrupted the request until it took longer than {timeout_s:g} "
                    "s: ask for fewer tokens, or raise ROLLOUT_REQUEST_TIMEOUT_S"
                )
            sampler = self._replica.serving.sampler
            attempts = [_attempt(sampler, part) for part in draft.parts(sampler.resolve(pinned))]
            limit_s = timeout_s + _LAST_RECORD_S  # The sampler's own limit comes first.
            async with aclosing(merged(attempts, pause_s=limit_s, timeout_s=limit_s)) as batches:
                async for batch in batches:
                    yield list(chain.from_iterable(batch))
            if pinned and not draft.is_complete:
                await asyncio.sleep(_PINNED_PAUSE_S)


async def _attempt(sampler: Sampler, part: Part) -> AsyncGenerator[Records]:
    async with aclosing(sampler.stream(part.request, counts_errors=False)) as batches:
        async for batch in batches:
            records: Records = []
            for record in batch:
                if isinstance(record, StreamError):
                    raise from_problem(record.problem, 500)
                if isinstance(record, StreamStart | StreamTokens):
                    records.append((part, record))
            yield records


# --- answers ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Said:
    """Of one choice, so far."""

    text: str = ""
    num_characters: int = 0  # Characters of its tokens.


class _Writer:
    """Turns what was sampled into OpenAI's answers to one request."""

    def __init__(self, body: Body, encoder: PromptEncoder, boot_id: str) -> None:
        self._body = body
        self._encoder = encoder
        self._num_per_prompt = body.n
        self._said = [_Said() for _ in range(len(body.prompts()) * body.n)]
        self._num_prompt_tokens: dict[int, int] = {}  # Prompt tokens by prompt index.
        kind = "cmpl" if isinstance(body, CompletionRequest) else "chatcmpl"
        self._head: dict[str, Any] = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "boot_id": boot_id,
        }

    def begin(self, part: Part) -> None:
        """The answer carries the name of the version that it begins with."""
        assert part.request.policy
        self._head.setdefault("model", _model_name(part.request.policy))

    def answer(self, draft: Draft) -> CompletionAnswer | ChatAnswer:
        """Of a draft that is complete."""
        choices: list[Any] = []
        groups = draft.groups()
        for group in groups:
            for completion in group.completions:
                text = completion.text
                if text is None:  # The completion was continued elsewhere.
                    text = self._encoder.decode(completion.token_ids)
                choices.append(
                    self._choice(
                        len(choices),
                        text=text,
                        token_ids=completion.token_ids,
                        logprobs=completion.logprobs,
                        segments=completion.segments,
                        finish_reason=completion.finish_reason,
                        prompt=(group.prompt_token_ids, group.sampling),
                    )
                )
        self._num_prompt_tokens = {i: len(g.prompt_token_ids) for i, g in enumerate(groups)}
        kind = CompletionAnswer if isinstance(self._body, CompletionRequest) else ChatAnswer
        return kind(choices=tuple(choices), usage=self._usage(draft), **self._head)

    def opening_chunks(self, part: Part, start: StreamStart) -> Iterator[Wire]:
        """One empty part per completion of a prompt; none when it is a continuation."""
        group = part.group + start.group
        if group in self._num_prompt_tokens:
            return
        self._num_prompt_tokens[group] = len(start.prompt_token_ids)
        for k in range(self._num_per_prompt):
            yield self._chunk(
                self._choice(
                    group * self._num_per_prompt + k,
                    text="",
                    token_ids=(),
                    logprobs=(),
                    segments=(),
                    finish_reason=None,
                    prompt=(start.prompt_token_ids, start.sampling),
                    is_chunk=True,
                )
            )

    def chunk(self, part: Part, record: StreamTokens, partial: Partial) -> Wire:
        """`partial` has the tokens of `record`, and those before them."""
        index = (part.group + record.group) * self._num_per_prompt
        index += part.completion + record.completion
        assert part.request.policy
        segment = Segment.model_construct(
            policy=part.request.policy, num_tokens=len(record.token_ids)
        )
        return self._chunk(
            self._choice(
                index,
                text=self._new_text(index, record, partial),
                token_ids=record.token_ids,
                logprobs=record.logprobs,
                segments=(segment,) if record.token_ids else (),
                finish_reason=partial.finish_reason,
                is_chunk=True,
            )
        )

    def usage_chunk(self, draft: Draft) -> Wire:
        return self._chunk(None, usage=self._usage(draft))

    def _new_text(self, index: int, record: StreamTokens, partial: Partial) -> str:
        said, new = self._said[index], record.text
        if partial.was_continued or new is None:
            # Two streams may split a character, so decode all tokens and drop what was sent.
            whole = self._encoder.decode(tuple(partial.token_ids))
            if partial.finish_reason is None:
                whole = whole.rstrip(_HIDDEN_CHARACTER)
            new = whole[len(said.text) :]
        said.text += new
        return new

    def _usage(self, draft: Draft) -> Usage:
        num_prompt = sum(self._num_prompt_tokens.values())
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=draft.num_tokens,
            total_tokens=num_prompt + draft.num_tokens,
        )

    def _chunk(self, choice: Any, usage: Usage | None = None) -> Wire:
        kind = CompletionAnswer if isinstance(self._body, CompletionRequest) else ChatChunk
        return kind(choices=(choice,) if choice else (), usage=usage, **self._head)

    def _choice(
        self,
        index: int,
        *,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        segments: tuple[Segment, ...],
        finish_reason: str | None,
        prompt: tuple[tuple[int, ...], SamplingParams] | None = None,
        is_chunk: bool = False,
    ) -> Any:
        body = self._body
        asked = prompt if body.return_token_ids else None
        fields: dict[str, Any] = {
            "index": index,
            "finish_reason": finish_reason,
            "segments": segments,
            "token_ids": token_ids if body.return_token_ids else None,
            "prompt_token_ids": asked[0] if asked else None,
            "sampling": asked[1] if asked else None,
            "logprobs": None,
        }
        if body.wants_logprobs:
            fields["logprobs"] = self._logprobs(index, token_ids, logprobs)
        if isinstance(body, CompletionRequest):
            return CompletionChoice(text=text, **fields)
        if is_chunk:
            role = "assistant" if prompt else None
            return ChatChunkChoice(delta=Delta(role=role, content=text), **fields)
        return ChatChoice(message=AssistantMessage(content=text), **fields)

    def _logprobs(
        self, index: int, token_ids: tuple[int, ...], logprobs: tuple[float, ...]
    ) -> CompletionLogprobs | ChatLogprobs:
        texts = [self._encoder.token_text(token) for token in token_ids]
        if isinstance(self._body, ChatRequest):
            return ChatLogprobs(
                content=tuple(
                    TokenLogprob(token=text, logprob=logprob, bytes=_bytes(text))
                    for text, logprob in zip(texts, logprobs, strict=True)
                )
            )
        offsets, said = [], self._said[index]
        for text in texts:
            offsets.append(said.num_characters)
            said.num_characters += len(text)
        return CompletionLogprobs(
            tokens=tuple(texts), token_logprobs=logprobs, text_offset=tuple(offsets)
        )


def _bytes(text: str) -> tuple[int, ...] | None:
    return None if _HIDDEN_CHARACTER in text else tuple(text.encode())


def _model_name(policy: PolicyId) -> str:
    return "base" if policy.is_base else f"policy@{policy.version}"


def _unknown_model(name: str) -> UnknownPolicy:
    return UnknownPolicy(
        f"there is no model {name!r} here: ask for 'policy' (the newest version), 'policy@17' (a "
        "resident one) or 'base', GET /v1/models lists them"
    )


# --- errors -------------------------------------------------------------------------------------


def error_response(error: ServiceError) -> JSONResponse:
    """OpenAI's error object, under the status for which its clients raise their own class."""
    status = 400 if error.status == 422 else error.status
    content = error_answer(error).model_dump()
    return JSONResponse(content, status, headers=error_headers(error))


def error_answer(error: ServiceError) -> ErrorAnswer:
    code, param = None, None
    if isinstance(error, UnknownPolicy):
        code, param = "model_not_found", "model"
    elif error.status == 401:
        code = "invalid_api_key"
    elif error.status == 429:
        code = "rate_limit_exceeded"
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return ErrorAnswer(error=ErrorBody(message=error.detail, type=kind, param=param, code=code))

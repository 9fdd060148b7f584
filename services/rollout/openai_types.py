"""What OpenAI's clients send and get on /v1, and what Tandem adds to it.

A request is SamplingParams under OpenAI's names. Fields that the API has and that change what is
sampled are served or refused, never passed over; null stands for the default. An answer has these
fields of Tandem's own, null where they were not asked for:

    segments          which policy versions sampled the tokens, always
    token_ids         \\
    prompt_token_ids   with `return_token_ids: true`, as vLLM names them
    sampling          /  as applied: with `logprobs` all that a ScoredGroup for POST /train needs
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from shared.schemas import (
    MAX_INT32,
    MAX_ITEMS,
    MAX_MESSAGES,
    MAX_TOOL_CALLS,
    ChatMessage,
    Name,
    PolicyId,
    PromptInput,
    SamplingParams,
    Segment,
    Text,
    TokenId,
    ToolCall,
    Wire,
)

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat may fill the context.

_Count = Annotated[int, Field(ge=0, le=MAX_INT32)]
_NO_OTHERS = "only the sampled token's logprob is kept: send 0 for it"
_NO_TOOLS = (
    "the chat template gets no tool definitions and no call is parsed from the answer: write the "
    "tools into a message and read the calls from the text"
)


def _only(*values: object, why: str = "not supported here: remove it") -> AfterValidator:
    """Refuse every value that would change the answer in a way that is not served."""

    def check(value: object) -> object:
        if value not in values:
            raise PydanticCustomError("unsupported", "{why}", {"why": why})
        return value

    return AfterValidator(check)


class _Nullable(Wire):
    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


# --- requests -----------------------------------------------------------------------------------


class StreamOptions(_Nullable):
    include_usage: bool = False
    include_obfuscation: bool = False  # Padding of chunks, which is not implemented.


def _several_stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SampledRequest(_Nullable, SamplingParams):
    """What both routes take. Sampling settings that OpenAI lacks have vLLM's names."""

    model: Name
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        Field(max_length=16),
        BeforeValidator(_several_stops, json_schema_input_type=str | tuple[str, ...] | None),
    ] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    # `train` refuses sampling that a gradient cannot use.
    purpose: Literal["train", "eval"] = "eval"

    detokenize: Annotated[bool, _only(True)] = True
    logit_bias: Annotated[object, _only({})] = None
    # These fields do not change what is sampled.
    user: Name = ""
    metadata: object = None
    store: bool = False
    service_tier: Name = ""
    safety_identifier: Name = ""
    prompt_cache_key: Name = ""

    def sampling(self) -> SamplingParams:
        fields = {name: getattr(self, name) for name in SamplingParams.model_fields}
        return SamplingParams(**fields)


def _prompts(value: object) -> object:
    """One prompt or several, as several."""

    def is_ids(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(item, int) for item in value)

    prompts = value if isinstance(value, list) and not is_ids(value) else [value]
    if not all(isinstance(prompt, str) or is_ids(prompt) for prompt in prompts):
        raise PydanticCustomError(
            "prompt", "write a text, a list of token ids, or a list of texts or of such lists"
        )
    return prompts


class CompletionRequest(SampledRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        tuple[PromptInput, ...],
        Field(max_length=MAX_ITEMS),
        BeforeValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    max_tokens: int | None = Field(ge=1, le=MAX_INT32, default=_COMPLETION_TOKENS)
    logprobs: Annotated[_Count | None, _only(None, 0, why=_NO_OTHERS)] = None
    echo: Annotated[bool, _only(False)] = False
    suffix: Annotated[Name, _only("")] = ""
    best_of: Annotated[_Count, _only(1)] = 1

    def prompts(self) -> tuple[PromptInput, ...]:
        return self.prompt

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class Message(_Nullable):
    role: str = Field(min_length=1, max_length=64)
    content: Text | Annotated[tuple[TextPart, ...], Field(max_length=MAX_MESSAGES)] = ""
    name: Name | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Field(max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: Name | None = None

    def to_chat(self) -> ChatMessage:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return ChatMessage(
            role=self.role,
            content=content,
            name=self.name,
            tool_calls=self.tool_calls,
            tool_call_id=self.tool_call_id,
        )


class ChatRequest(SampledRequest):
    """`POST /v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(ge=1, le=MAX_INT32, default=None)
    logprobs: bool = False
    top_logprobs: Annotated[_Count, _only(0, why=_NO_OTHERS)] = 0
    tools: Annotated[object, _only([], why=_NO_TOOLS)] = None
    tool_choice: Annotated[object, _only("none", "auto", why=_NO_TOOLS)] = None
    parallel_tool_calls: bool = True
    response_format: Annotated[object, _only({"type": "text"})] = None
    modalities: Annotated[object, _only(["text"])] = None

    def prompts(self) -> tuple[PromptInput, ...]:
        return (tuple(message.to_chat() for message in self.messages),)

    def sampling(self) -> SamplingParams:
        limit = self.max_completion_tokens or self.max_tokens
        return super().sampling().model_copy(update={"max_tokens": limit})

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs


# --- answers ------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length"]


class Usage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Choice(Wire):
    index: int
    finish_reason: FinishReason | None  # None in a chunk that is not the last.
    segments: tuple[Segment, ...]
    token_ids: tuple[TokenId, ...] | None
    prompt_token_ids: tuple[TokenId, ...] | None  # In a stream, with the first chunk.
    sampling: SamplingParams | None  # In a stream, with the first chunk.


class CompletionLogprobs(Wire):
    tokens: tuple[str, ...]
    token_logprobs: tuple[float, ...]
    top_logprobs: None = None
    text_offset: tuple[int, ...]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class TokenLogprob(Wire):
    token: str
    logprob: float
    bytes: tuple[int, ...] | None  # None for a part of a character.
    top_logprobs: tuple[()] = ()


class ChatLogprobs(Wire):
    content: tuple[TokenLogprob, ...]


class AssistantMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str


class Delta(Wire):
    role: Literal["assistant"] | None
    content: str


class ChatChoice(_Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(_Choice):
    delta: Delta
    logprobs: ChatLogprobs | None


class _Answer(Wire):
    id: str
    created: int  # Unix time in seconds.
    model: str  # The version that began the answer.
    usage: Usage | None  # In a stream, with the last chunk, on request.
    boot_id: str


class CompletionAnswer(_Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: tuple[CompletionChoice, ...]


class ChatAnswer(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: tuple[ChatChoice, ...]


class ChatChunk(_Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: tuple[ChatChunkChoice, ...]


class Model(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tandem"] = "tandem"
    root: str  # The checkpoint.
    policy: PolicyId | None  # None before a run has published one here.
    max_model_len: int


class Models(Wire):
    object: Literal["list"] = "list"
    data: tuple[Model, ...]


class ErrorBody(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Wire):
    error: ErrorBody

"""Every type that travels over HTTP.

                      GenerateRequest  ──▶            ──▶ GenerateResponse, or StreamRecords
    trainer           adapter file     ──▶  rollout   ──▶ SyncReceipt
                      ScoreRequest     ──▶            ──▶ ScoreResponse

    replica           ReplicaRegistration ▶ trainer   ──▶ ReplicaStatus
    client            TrainRequest     ──▶  trainer   ──▶ TrainResponse
                      run config       ──▶            ──▶ RunStatus, RunEvent (server-sent)

All models are frozen, hold tuples, and refuse unknown fields and non-finite floats, so a record
cannot change once it is accepted. `logprobs` are natural logarithms; `_s` means seconds, `_bytes`
means bytes.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "tuple":
            schema["fail_fast"] = True
        schema = schema.values()
    elif not isinstance(schema, list):
        return
    for part in schema:
        _fail_fast(part)


class Wire(BaseModel):
    """Base class of every wire type. A list is read up to its first mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """By default pydantic notes every mistake, which costs seconds in a list of a million."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


MAX_INT32 = 2**31 - 1  # Engines count and number tokens in 32 bits.
MAX_TOKENS = 1 << 22  # Tokens of one sequence.
MAX_ITEMS = 1 << 16  # Prompts, sequences, groups or pairs of one request.
MAX_MESSAGES = 4096  # Messages of a chat: a template may look at each of them for each of them.
MAX_TOOL_CALLS = 256  # Tool calls of one message.
MAX_JSON_VALUES = 10_000  # Values in a free-form JSON object.
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32, strict=True)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=MAX_TOKENS)]
SomeTokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_TOKENS)]
Text = Annotated[str, Field(max_length=1 << 26)]
Name = Annotated[str, Field(max_length=256)]
Logprob = Annotated[float, Field(ge=-1e6, le=1e-3)]  # Rounding can push it slightly above 0.
MAX_SEED = 2**62
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 in hex.
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


# --- identity -----------------------------------------------------------------------------------


class PolicyId(Wire):
    """One policy version of one life of a run.

    A run that resumes keeps its `run_id` and increments its `incarnation`; a higher incarnation
    supersedes every version of a lower one.
    """

    run_id: RunId  # Name of the run.
    # Life of the run; each resume adds 1.
    incarnation: int = Field(ge=1, le=MAX_INT32, default=1)
    # Policy updates since the base; 0 is the base without an adapter.
    version: int = Field(ge=0, le=MAX_INT32)

    @property
    def is_base(self) -> bool:
        return self.version == 0

    @property
    def age_key(self) -> tuple[int, int]:
        """Sort key of the versions of one run."""
        return self.incarnation, self.version

    @property
    def life(self) -> tuple[str, int]:
        return self.run_id, self.incarnation

    def next(self) -> PolicyId:
        return self.model_copy(update={"version": self.version + 1})

    def __str__(self) -> str:
        return f"{self.run_id}.{self.incarnation}@{self.version}"


BASE_POLICY = PolicyId(run_id="base", version=0)  # A replica without a run serves this one.


class QuantizationRecipe(Wire):
    """How linear weights are quantized to 4 bits: the bitsandbytes arguments that affect them."""

    quant_type: Literal["nf4", "fp4"] = "nf4"  # 4-bit data type.
    double_quant: bool = True  # Whether the scales of the blocks are quantized too.
    block_size: int = 64  # Weights that share one scale.
    source_dtype: Literal["bfloat16"] = "bfloat16"  # Data type of the weights before quantization.
    skipped_modules: tuple[str, ...] = ("lm_head",)  # Modules that keep their 16-bit weights.


class BaseIdentity(Wire):
    """Digests that identify a base: two processes with equal digests hold the same base."""

    weights: Digest  # Tensors and architecture of the source checkpoint.
    recipe: Digest | None  # Quantization recipe; None for the original 16-bit weights.
    tokenizer: Digest  # Tokenizer files.
    chat_template: Digest | None  # Chat template; None if the checkpoint has none.


# --- generation ---------------------------------------------------------------------------------


class SamplingParams(Wire):
    """How completions are sampled and when they end, with vLLM's names and meanings."""

    n: int = Field(ge=1, le=MAX_INT32, default=1)  # Completions per prompt.
    # Softmax temperature: 0 samples greedily; any other value must be at least 0.01.
    temperature: float = Field(ge=0, le=2, default=1.0)
    # Maximum tokens of a completion; None allows as many as fit into the context.
    max_tokens: int | None = Field(ge=1, le=MAX_INT32, default=None)
    # Tokens before a completion may stop.
    min_tokens: int = Field(ge=0, le=MAX_INT32, default=0)
    # Samples from the smallest set of tokens whose probabilities reach this sum; 1 turns it off.
    top_p: float = Field(gt=0, le=1, default=1.0)
    # Samples from this many top tokens; 0 turns it off.
    top_k: int = Field(ge=0, le=MAX_INT32, default=0)
    # Drops tokens below this fraction of the top token's probability; 0 turns it off.
    min_p: float = Field(ge=0, le=1, default=0.0)
    # Subtracted from the logit of a token that the completion already has; 0 turns it off.
    presence_penalty: float = Field(ge=-2, le=2, default=0.0)
    # Subtracted from a token's logit for each time the completion has it; 0 turns it off.
    frequency_penalty: float = Field(ge=-2, le=2, default=0.0)
    # Scales down the logits of tokens in the prompt or completion; 1 turns it off.
    repetition_penalty: float = Field(ge=0.01, le=10, default=1.0)
    # Completion k of the request uses seed + k; None leaves it to the replica's ROLLOUT_SEED.
    seed: Seed | None = None
    # Texts that end a completion.
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        max_length=16, default=()
    )
    # Tokens that end a completion, in addition to EOS.
    stop_token_ids: tuple[TokenId, ...] = Field(max_length=64, default=())
    ignore_eos: bool = False  # Whether sampling continues after EOS.
    detokenize: bool = True  # False skips detokenization: `Completion.text` is then None.

    @field_validator("temperature")
    @classmethod
    def _is_sampled_at_as_asked(cls, temperature: float) -> float:
        if 0 < temperature < 0.01:
            raise ValueError("vLLM raises it to 0.01: use 0 (greedy) or at least 0.01")
        return temperature

    def gradient_obstacles(self) -> tuple[str, ...]:
        """The settings that make sampler logprobs differ from the policy's at this temperature.

        A policy gradient needs the full softmax, so a training request may change the temperature
        and none of these. Empty when the completions can be trained on.
        """
        neutral = SamplingParams()
        names = (
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "min_tokens",
        )
        found = [
            f"{name}={getattr(self, name)}"
            for name in names
            if getattr(self, name) != getattr(neutral, name)
        ]
        return ("temperature=0", *found) if self.temperature == 0 else tuple(found)


class ToolFunction(Wire):
    """The function that a tool call names."""

    name: Name  # Name of the function.
    # An object, or JSON text of one as OpenAI's clients send it; 10,000 values at most.
    arguments: dict[str, Any] = Field(max_length=MAX_JSON_VALUES)

    @field_validator("arguments", mode="before")
    @classmethod
    def _from_json(cls, arguments: object) -> object:
        """OpenAI's clients send JSON text, but chat templates take an object."""
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except RecursionError:
                raise ValueError("its JSON is nested too deeply: flatten it") from None
        _check_json_size(arguments)
        return arguments


def _check_json_size(value: object) -> None:
    """Raise ValueError for a JSON value of more than MAX_JSON_VALUES values."""
    waiting, num_values = [value], 0
    while waiting:
        item = waiting.pop()
        parts = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        num_values += 1 + len(parts)
        if num_values > MAX_JSON_VALUES:
            raise ValueError(f"it holds more than {MAX_JSON_VALUES} values: shorten it")
        waiting += parts


class ToolCall(Wire):
    """A tool call in an assistant's message."""

    id: Name | None = None  # Name by which a tool's message refers to this call.
    type: Literal["function"] = "function"
    function: ToolFunction  # What the assistant calls, and with which arguments.


class ChatMessage(Wire):
    """One message of a chat. A field that the chat template ignores does not reach the prompt."""

    role: str = Field(min_length=1, max_length=64)  # A role that the chat template knows.
    content: Text  # Text of the message.
    name: Name | None = None  # Name of the author.
    # Tool calls that an assistant makes.
    tool_calls: Annotated[tuple[ToolCall, ...], Field(max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: Name | None = None  # The call that a tool's message answers.


def _prompt_kind(value: object) -> str:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list | tuple) and value else None
    return "chat" if isinstance(first, dict | ChatMessage) else "token_ids"


PromptInput = Annotated[
    Annotated[SomeTokenIds, Tag("token_ids")]
    | Annotated[Text, Field(min_length=1), Tag("text")]
    | Annotated[tuple[ChatMessage, ...], Field(max_length=MAX_MESSAGES), Tag("chat")],
    Discriminator(_prompt_kind),
]


class GenerateRequest(Wire):
    """Body of `POST /generate`, which samples `sampling.n` completions of every prompt."""

    # Each prompt is a list of token ids, a text, or a list of chat messages.
    prompts: tuple[PromptInput, ...] = Field(min_length=1, max_length=MAX_ITEMS)
    sampling: SamplingParams = SamplingParams()  # Applies to every prompt.
    policy: PolicyId | None = None  # Version to sample from; None picks the newest resident one.
    # `train` refuses sampling settings that a policy gradient cannot use.
    purpose: Literal["train", "eval"] = "eval"
    # Tokens of a completion to continue; they are context, not output. Needs one prompt and n = 1.
    completion_prefix: TokenIds = ()
    stream: bool = False  # Whether to answer in NDJSON, a StreamRecord per line as tokens arrive.

    @model_validator(mode="after")
    def _prefix_belongs_to_one_completion(self) -> GenerateRequest:
        if self.completion_prefix and (len(self.prompts) > 1 or self.sampling.n > 1):
            raise ValueError("completion_prefix needs exactly one prompt and n = 1")
        return self


class Segment(Wire):
    """Consecutive tokens of a completion that one policy version sampled."""

    policy: PolicyId  # The version that sampled them.
    num_tokens: int = Field(ge=1, le=MAX_INT32)  # How many tokens the segment has.


class Completion(Wire):
    """One sampled sequence of tokens."""

    token_ids: TokenIds  # Sampled tokens, including the stop token.
    # One per token, under the distribution it was sampled from.
    logprobs: tuple[Logprob, ...] = Field(max_length=MAX_TOKENS)
    # Which version sampled which tokens, in order.
    segments: tuple[Segment, ...] = Field(max_length=MAX_ITEMS)
    # `stop`: a stop token or text; `length`: the token limit; `interrupted`: a sync or drain.
    finish_reason: Literal["stop", "length", "interrupted"]
    text: Text | None = None  # Detokenized completion; None if it was not requested.

    @model_validator(mode="after")
    def _every_token_has_a_logprob_and_a_version(self) -> Completion:
        num_segment_tokens = sum(segment.num_tokens for segment in self.segments)
        if not len(self.token_ids) == len(self.logprobs) == num_segment_tokens:
            raise ValueError(
                f"there are {len(self.token_ids)} token_ids, {len(self.logprobs)} logprobs and "
                f"{num_segment_tokens} tokens in segments: the three counts must be equal"
            )
        return self


class CompletionGroup(Wire):
    """The completions of one prompt and the sampling settings that produced them."""

    prompt_token_ids: SomeTokenIds  # Token ids of the prompt.
    completions: tuple[Completion, ...] = Field(min_length=1)  # The `sampling.n` completions.
    sampling: SamplingParams  # Settings of this prompt: its own seed, max_tokens as a number.


class GenerateResponse(Wire):
    """Answer of `POST /generate` to a request that does not stream."""

    groups: tuple[CompletionGroup, ...]  # One group per prompt, in the order of the prompts.
    boot_id: str  # Random id of the replica's process; it changes with every restart.


class StreamStart(Wire):
    """Announces one group of a stream, before its first token and in the order of the prompts."""

    kind: Literal["start"] = "start"
    group: int = Field(ge=0)  # Index of the prompt, from 0.
    prompt_token_ids: SomeTokenIds  # Token ids of the prompt.
    sampling: SamplingParams  # Settings of this prompt: its own seed, max_tokens as a number.
    policy: PolicyId  # The version that samples every token of the group.
    boot_id: str  # Random id of the replica's process; it changes with every restart.


class StreamTokens(Wire):
    """The next tokens of one completion.

    Exactly one record of every completion has a finish reason: the one with its last tokens.
    """

    kind: Literal["tokens"] = "tokens"
    group: int = Field(ge=0)  # Index of the prompt, from 0.
    completion: int = Field(ge=0)  # Index of the completion in its group, from 0.
    token_ids: tuple[TokenId, ...]  # Tokens sampled since the last record.
    logprobs: tuple[Logprob, ...]  # One per token, under the distribution it was sampled from.
    # Why the completion ended; None until its last record.
    finish_reason: Literal["stop", "length", "interrupted"] | None = None
    text: str | None = None  # Text of these tokens; None if it was not requested.

    @model_validator(mode="after")
    def _every_token_has_a_logprob(self) -> StreamTokens:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"there are {len(self.token_ids)} token_ids and {len(self.logprobs)} logprobs: the "
                "two counts must be equal"
            )
        return self


class StreamAlive(Wire):
    """Heartbeat of a stream without new tokens: a silent stream means that the replica hangs."""

    kind: Literal["alive"] = "alive"


class StreamError(Wire):
    """The last record of a stream that failed."""

    kind: Literal["error"] = "error"
    problem: dict[str, Any]  # RFC 9457 problem object.


class StreamEnd(Wire):
    """The last record of a successful stream: a stream that ends without it was cut off."""

    kind: Literal["end"] = "end"
    boot_id: str  # Random id of the replica's process; it changes with every restart.


StreamRecord = Annotated[
    StreamStart | StreamTokens | StreamAlive | StreamError | StreamEnd, Field(discriminator="kind")
]


class ScoreRequest(Wire):
    """Body of `POST /score`, which computes the logprobs of given tokens at temperature 1."""

    # Token ids of each sequence to score.
    sequences: tuple[Annotated[TokenIds, Field(min_length=2)], ...] = Field(
        min_length=1, max_length=MAX_ITEMS
    )
    policy: PolicyId | None = None  # Version to score under; None picks the newest resident one.


class ScoreResponse(Wire):
    """Answer of `POST /score`."""

    # `logprobs[i][t]` is log p(sequences[i][t + 1] | sequences[i][: t + 1]).
    logprobs: tuple[tuple[Logprob, ...], ...]
    policy: PolicyId  # The version that scored them.
    boot_id: str  # Random id of the replica's process; it changes with every restart.


# --- weights ------------------------------------------------------------------------------------


class AdapterManifest(Wire):
    """Self-description of an adapter file, stored in its safetensors metadata.

    All target modules share one rank and one scaling. Per-module patterns, DoRA and biases are not
    supported; a manifest that has a field for one is refused.
    """

    format: Literal["tandem-adapter-1"] = "tandem-adapter-1"  # Version of this format.
    policy: PolicyId  # The version that the adapter makes of the base; at least version 1.
    base: BaseIdentity  # The base that the adapter was trained on.
    rank: int = Field(ge=1, le=MAX_INT32)  # LoRA rank of every target module.
    scaling: float = Field(gt=0, le=1e4)  # Factor on B·A; lora_alpha / rank in PEFT's terms.
    # Adapted linear layers, such as q_proj.
    target_modules: tuple[Name, ...] = Field(min_length=1, max_length=1024)

    @field_validator("policy")
    @classmethod
    def _is_an_update(cls, policy: PolicyId) -> PolicyId:
        if policy.is_base:
            raise ValueError("version 0 is the base and has no adapter")
        return policy


class SyncReceipt(Wire):
    """Answer of `POST /sync_weights`, sent once the version is resident."""

    policy: PolicyId  # The version that was uploaded.
    digest: Digest  # Digest of the adapter file.
    outcome: Literal["loaded", "already_resident"]  # Whether the engine loaded it or had it.
    newest: PolicyId  # The version that serves requests without a pinned one.
    retired: tuple[PolicyId, ...] = ()  # Versions removed to free adapter slots.
    num_bytes: int  # Size of the adapter file.
    receive_s: float = 0.0  # Time to receive the body and compute its digest.
    verify_s: float = 0.0  # Time to check the header, the tensor table and the values.
    wait_s: float = 0.0  # Time spent waiting for a free adapter slot.
    load_s: float = 0.0  # Time the engine took to load it.
    boot_id: str  # Random id of the replica's process; it changes with every restart.


class ResidentPolicy(Wire):
    """One policy version whose adapter a replica holds."""

    policy: PolicyId  # The version.
    digest: Digest  # Digest of its adapter file.
    num_bytes: int  # Size of its adapter file.
    num_leases: int  # Requests that run under it.
    # False for a probe, and for a superseded version, which is retired when its leases end.
    accepts_requests: bool


class PoliciesResponse(Wire):
    """Answer of `GET /policies`."""

    newest: PolicyId  # The version that serves requests without a pinned one.
    resident: tuple[ResidentPolicy, ...]  # Versions with an adapter: the base is not listed.
    boot_id: str  # Random id of the replica's process; it changes with every restart.


class RolloutLimits(Wire):
    """What one replica accepts."""

    max_model_len: int  # Maximum tokens of a prompt and its completion together.
    max_lora_rank: int  # Largest LoRA rank of an adapter.
    max_live_policies: int  # Resident adapters; one more slot receives the next version.
    max_num_seqs: int  # Sequences that the engine runs at once.
    # Completions of one request, and queued or running completions of all requests together.
    max_completions: int
    max_adapter_bytes: int  # Maximum size of an adapter file.
    max_body_bytes: int  # Maximum size of a JSON request body.


ServingMode = Literal["lora", "merged"]


class RolloutStatus(Wire):
    """State, limits and load of one replica."""

    # `draining`: it finishes its requests, then exits; `dead`: it is about to exit.
    state: Literal["starting", "ready", "draining", "dead"]
    detail: str  # What it is doing, or why it is dead; empty while it is ready.
    boot_id: str  # Random id of the replica's process; it changes with every restart.
    model: str  # Checkpoint folder or hub id, as configured.
    vllm_version: str  # Version of vLLM that it runs.
    kv_cache_dtype: str  # Data type of the KV cache, in vLLM's terms.
    # `lora`: several adapters next to the base; `merged`: one, added to the weights of the base.
    serving_mode: ServingMode = "lora"
    base: BaseIdentity | None  # Identity of its base; None while it starts.
    limits: RolloutLimits  # What it accepts.
    newest: PolicyId  # The version that serves requests without a pinned one.
    resident: tuple[ResidentPolicy, ...]  # Versions with an adapter: the base is not listed.
    num_outstanding_completions: int  # Completions that are queued or running.


# --- training -----------------------------------------------------------------------------------


class ScoredCompletion(Wire):
    """A completion and its reward."""

    completion: Completion  # The completion that was scored.
    reward: float  # How good the completion is: the sum of `rewards` if there are any.
    # Weighted rewards, in the same order for all completions; may be empty.
    rewards: tuple[float, ...] = Field(max_length=1024, default=())

    @model_validator(mode="after")
    def _rewards_add_up(self) -> ScoredCompletion:
        error = abs(sum(self.rewards) - self.reward)
        if self.rewards and error > 1e-6 * sum(map(abs, self.rewards)):
            raise ValueError(
                f"rewards add up to {sum(self.rewards)} but reward is {self.reward}: weight each "
                "of rewards, and set reward to their sum"
            )
        return self


class ScoredGroup(Wire):
    """The completions of one prompt with their rewards. A policy update learns from such groups."""

    prompt_token_ids: SomeTokenIds  # Token ids of the prompt.
    sampling: SamplingParams  # Settings that produced the completions.
    # Each with its reward.
    completions: tuple[ScoredCompletion, ...] = Field(min_length=1, max_length=MAX_ITEMS)


class PreferencePair(Wire):
    """A better and a worse answer to one prompt. DPO learns from such pairs."""

    prompt_token_ids: SomeTokenIds  # Token ids of the prompt.
    chosen_token_ids: SomeTokenIds  # Token ids of the better answer.
    rejected_token_ids: SomeTokenIds  # Token ids of the worse answer.

    @property
    def num_positions(self) -> int:
        """Tokens of the prompt and the longer answer."""
        longest = max(len(self.chosen_token_ids), len(self.rejected_token_ids))
        return len(self.prompt_token_ids) + longest


class TrainRequest(Wire):
    """Body of `POST /train`, which makes one policy update from the caller's groups or pairs."""

    # Scored groups, for every algorithm but `dpo`.
    groups: tuple[ScoredGroup, ...] = Field(max_length=MAX_ITEMS, default=())
    # Preference pairs, for the algorithm `dpo`.
    pairs: tuple[PreferencePair, ...] = Field(max_length=MAX_ITEMS, default=())
    expected_policy: PolicyId  # The current version; the request is refused if it has changed.
    # Names this update: a repeated request with the same key gets the first answer again.
    idempotency_key: str = Field(min_length=1, max_length=128)

    @model_validator(mode="after")
    def _has_groups_or_pairs(self) -> TrainRequest:
        if bool(self.groups) == bool(self.pairs):
            raise ValueError("send either groups or pairs, not both")
        return self


class LagKl(Wire):
    """KL(sampler ‖ policy) over the tokens of one staleness."""

    lag: int  # Versions between the sampler and the policy.
    kl: float  # Nats per token, k3 estimate.
    num_tokens: int


def statistic(unit: str, meaning: str, default: Any = None) -> Any:
    """A number of a record: declared here once, it is in the log, the curves, the metrics and
    docs/metrics.md. One that does not apply is None in Python and absent everywhere else;
    `meaning` says when. `default` is ... for a number that every record has."""
    return Field(
        default=default,
        description=meaning,
        json_schema_extra={"unit": unit},
        exclude_if=lambda value: value is None or value == (),
    )


_POLICY_GRADIENT = "Policy-gradient algorithms only."
_FRESH = "Absent without a fresh token."
_SAMPLED = "Absent when this service sampled no groups."


class UpdateStats(Wire):
    """The numbers of one policy update, NaN in the loss of one that is refused.

    From `entropy` to `fresh_masked_fraction` they cover the completion tokens that the update
    computed, which are those of samples with a gradient, and are absent when there is none. A token
    is fresh when the version that is updated sampled it.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    loss: float = statistic("–", "Mean over the optimizer steps of the update.", ...)
    grad_norm: float = statistic(
        "–", "Norm of the policy's gradient before clipping, mean over the optimizer steps.", ...
    )
    learning_rate: float = statistic("–", "Learning rate of the policy, with warm-up applied.", ...)
    entropy: float | None = statistic("nats", "Mean entropy of the policy at the sampled tokens.")
    clip_fraction: float | None = statistic(
        "fraction",
        f"Tokens whose ratio left the clip range against their advantage. {_POLICY_GRADIENT}",
    )
    importance_weight_mean: float | None = statistic(
        "–", f"Mean weight old policy / sampler, as applied. {_POLICY_GRADIENT}"
    )
    importance_truncated_fraction: float | None = statistic(
        "fraction", f"Tokens whose importance weight was truncated. {_POLICY_GRADIENT}"
    )
    importance_masked_fraction: float | None = statistic(
        "fraction", f"Tokens whose importance weight was set to 0. {_POLICY_GRADIENT}"
    )
    logprob_gap: float | None = statistic(
        "nats", f"Mean |Δlogprob| between trainer and replica over fresh tokens. {_FRESH}"
    )
    logprob_gap_p99: float | None = statistic("nats", f"Its 99th percentile. {_FRESH}")
    logprob_gap_max: float | None = statistic("nats", f"Its maximum. {_FRESH}")
    probability_factor: float | None = statistic(
        "–", f"Mean exp |Δlogprob| over fresh tokens. {_FRESH}"
    )
    sampler_kl: float | None = statistic(
        "nats per token", f"KL(sampler ‖ policy) over fresh tokens, k3 estimate. {_FRESH}"
    )
    kl_by_lag: tuple[LagKl, ...] = statistic(
        "nats per token", "The same for the tokens of each staleness, with their number.", ()
    )
    token_ess: float | None = statistic(
        "ESS",
        "Effective sample size of the token weights policy / sampler, before truncation. Absent "
        "when no replica sampled the tokens.",
    )
    sequence_ess: float | None = statistic(
        "ESS", "The same for the product of the weights over each completion."
    )
    num_fresh_tokens: int = statistic(
        "tokens", "Fresh tokens that were computed, once per epoch.", 0
    )
    fresh_sequence_ess: float | None = statistic(
        "ESS", "`sequence_ess` of the completions that consist of fresh tokens. Absent without one."
    )
    fresh_masked_fraction: float | None = statistic(
        "fraction", f"Fresh tokens whose weight was set to 0. {_FRESH} {_POLICY_GRADIENT}"
    )
    reference_kl: float | None = statistic(
        "nats per token",
        "KL of the policy from the same policy with its adapter off, k3 estimate. Absent when the "
        "algorithm needs no reference.",
    )
    value_loss: float | None = statistic("–", "Mean over tokens. PPO only.")
    value_clip_fraction: float | None = statistic(
        "fraction", "Tokens whose value moved too far in one update. PPO only."
    )
    explained_variance: float | None = statistic(
        "–",
        "1 - squared error of the critic / variance of the returns: 1 is perfect, 0 a constant. "
        "PPO only; absent when the returns do not vary.",
    )
    preference_accuracy: float | None = statistic(
        "fraction", "Pairs whose chosen answer has the larger implicit reward. DPO only."
    )
    preference_margin: float | None = statistic(
        "nats", "Mean difference β·h of the implicit rewards in a pair. DPO only."
    )
    num_forward_tokens: int = statistic(
        "tokens", "Prompt and completion tokens that the update computed.", 0
    )
    update_tokens_per_s: float = statistic(
        "tokens/s", "`num_forward_tokens` per second of the update.", 0.0
    )
    peak_memory_bytes: int = statistic(
        "bytes", "Peak memory of the process so far: GPU memory, or else host memory.", 0
    )


class StepRecord(UpdateStats):
    """One policy update: what it learned from, what it did, and how long it took.

    Fractions and effective sample sizes (ESS) are in [0, 1]. What does not apply is absent.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    kind: Literal["step"] = "step"
    step: int = statistic("–", "Number of the update, from 1.", ...)
    policy: PolicyId = statistic("–", "The version that this step made.", ...)
    num_groups: int = statistic("groups", "Groups that the step learned from; pairs, for DPO.", ...)
    num_constant_groups: int | None = statistic(
        "groups",
        "Groups of several completions whose rewards are all equal: comparing them teaches "
        "nothing. Absent for pairs.",
    )
    num_constant_groups_set_aside: int | None = statistic(
        "groups", "Groups that dynamic sampling replaced. Absent when it is off."
    )
    num_samples: int = statistic("completions", "Completions in those groups.", ...)
    num_tokens: int = statistic("tokens", "Tokens of those completions.", ...)
    reward_mean: float | None = statistic(
        "reward", "Mean over completions of the weighted sum of all rewards. Absent for pairs."
    )
    reward_std: float | None = statistic(
        "reward", "Standard deviation of the same. Absent for pairs."
    )
    completion_tokens_mean: float = statistic("tokens", "Mean length of a completion.", ...)
    truncated_fraction: float | None = statistic(
        "fraction", "Completions that ran into `sampling.max_tokens`. Absent for pairs."
    )
    staleness_mean: float | None = statistic(
        "versions",
        "Mean over completions of the staleness of their oldest token. Absent for pairs.",
    )
    staleness_max: int | None = statistic("versions", "Maximum of the same. Absent for pairs.")
    staleness_histogram: dict[int, int] | None = statistic(
        "completions", "Completions by their staleness. Absent for pairs."
    )
    num_continued: int | None = statistic(
        "completions", f"Completions that another replica or a newer version continued. {_SAMPLED}"
    )
    num_ready_groups: int | None = statistic(
        "groups",
        f"Groups scored and waiting when the step took its own: the queue depth. {_SAMPLED}",
    )
    num_in_flight_groups: int | None = statistic(
        "groups", f"Groups being sampled or scored at that moment. {_SAMPLED}"
    )
    wait_s: float | None = statistic(
        "s", "Time the trainer waited for the groups of this step. Absent for POST /train."
    )
    generate_s: float | None = statistic(
        "s", f"Mean over groups, from the request to the last token. {_SAMPLED}"
    )
    reward_s: float | None = statistic(
        "s", f"Mean over groups, from the last token to the rewards. {_SAMPLED}"
    )
    update_s: float = statistic(
        "s", "Duration of the update, scores before its first optimizer step included.", 0.0
    )
    publish_s: float = statistic("s", "Time to make the adapter file.", 0.0)
    sync_s: float = statistic("s", "Time until the replicas held and had proven the version.", 0.0)
    step_s: float = statistic("s", "Wall time of the step: wait, update, publish and sync.", 0.0)
    tokens_per_s: float = statistic("tokens/s", "`num_tokens` per second of `step_s`.", 0.0)
    trainer_idle_fraction: float | None = statistic(
        "fraction", "Share of `step_s` that the trainer waited. Absent for POST /train."
    )
    rollout_idle_fraction: float | None = statistic(
        "fraction",
        "Share of `step_s` that a replica had no request, mean of the fleet. Absent when no "
        "replica served.",
    )
    num_serving_replicas: int = statistic(
        "replicas", "Replicas that hold the version this step made.", 0
    )
    adapter_bytes: int = statistic("bytes", "Size of the adapter file.", 0)


class EvalRecord(Wire):
    """Rewards on held-out prompts, one completion each."""

    kind: Literal["eval"] = "eval"
    step: int = statistic("–", "The step after which it was made; 0 is before the first.", ...)
    policy: PolicyId = statistic("–", "The version that was evaluated.", ...)
    num_prompts: int = statistic("prompts", "Prompts evaluated.", ...)
    sampled_reward: float = statistic("reward", "Mean reward at the run's temperature.", ...)
    greedy_reward: float = statistic("reward", "Mean reward at temperature 0.", ...)
    eval_s: float = statistic("s", "Duration of the evaluation.", ...)


RunState = Literal["running", "stopping", "stopped", "completed", "failed", "external", "suspended"]


class StateRecord(Wire):
    """The run changed its state."""

    kind: Literal["state"] = "state"
    state: RunState  # The new state.
    detail: str = ""  # Why it changed, in words.


RunEvent = Annotated[StepRecord | EvalRecord | StateRecord, Field(discriminator="kind")]


# --- fleet --------------------------------------------------------------------------------------


_REPLICA_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w-]+(\.[\w-]+)*):(\d{1,5})/?", re.ASCII)


class ReplicaRegistration(Wire):
    """Body of `POST /replicas`, which adds a replica to the fleet or renews its lease."""

    url: str = Field(max_length=300)  # Where the trainer reaches it, as http://host:port.
    # How long the registration lasts unless it is renewed; None: until the replica is removed.
    lease_s: float | None = Field(gt=0, le=86400, default=None)
    # Id of the replica's process; a new one ends an earlier removal or quarantine.
    boot_id: Name | None = None

    @field_validator("url")
    @classmethod
    def _names_one_address(cls, url: str) -> str:
        match = _REPLICA_URL.fullmatch(url)
        if match is None or not 0 < int(match[3]) < 65536:
            raise ValueError("write it as http://host:port, without a path")
        return url


ReplicaState = Literal["discovered", "admitting", "serving", "draining", "quarantined", "gone"]


class ReplicaStatus(Wire):
    """One replica as the trainer sees it.

    A replica is `discovered` when it is known but not proven, and the trainer tries it again with
    growing pauses; `admitting` while the trainer checks it and gives it the policy; `serving` when
    it is proven and takes requests; `draining` while it finishes its requests and takes no new
    ones; `quarantined` when it failed a check, until it restarts or is registered again; and `gone`
    when it has left the fleet.
    """

    id: str  # Its host:port.
    url: str  # Where the trainer reaches it.
    source: Literal["configured", "registered"]  # How the trainer learned of it.
    state: ReplicaState  # See above.
    detail: str  # Why it is in this state, in words.
    boot_id: str | None  # Id of its process, which changes with every restart; None until known.
    policy: PolicyId | None  # The newest version that it is proven to serve; None without one.
    num_outstanding_completions: int  # Completions of the trainer's requests that it works on.
    num_outstanding_tokens: int  # The most tokens that those completions may still have.
    # Mean |replica - trainer| logprob on the probe of the last check, in nats.
    logprob_gap: float | None
    last_sync_s: float | None  # Time that the last upload, load and proof of a version took.
    num_failures: int  # Failures in a row; a success resets it to 0.


class TrainResponse(Wire):
    """Answer of `POST /train`."""

    policy: PolicyId  # The version that the update made.
    step: StepRecord  # The numbers of the update.
    receipts: tuple[SyncReceipt, ...]  # One per replica that loaded the new version.
    replicas: tuple[ReplicaStatus, ...]  # The fleet after the sync.


class RunStatus(Wire):
    """State and progress of a run."""

    run_id: RunId  # Name of the run.
    # `external`: the caller runs the loop; `suspended`: it resumes when the trainer restarts.
    state: RunState
    detail: str  # Why it is in this state, in words.
    stalls: tuple[str, ...] = ()  # What currently keeps it from learning, one sentence each.
    step: int  # Number of the last step.
    num_steps: int | None  # Step at which the run ends; None if the caller's own loop decides.
    policy: PolicyId  # The newest version.
    last_step: StepRecord | None  # The numbers of the last step; None before the first.
    last_eval: EvalRecord | None  # The last evaluation; None before the first.
    run_dir: str  # Folder of the run on the trainer's machine.


class RecentCompletion(Wire):
    """A scored completion as text."""

    text: str  # The completion without special tokens.
    reward: float  # How good the completion is: the sum of `rewards` if there are any.
    rewards: tuple[float, ...]  # Weighted rewards, in the order of `reward_names`.
    segments: tuple[Segment, ...]  # Which version sampled which tokens, in order.
    # `stop`: a stop token or text; `length`: the token limit; `interrupted`: a sync or drain.
    finish_reason: Literal["stop", "length", "interrupted"]
    num_tokens: int  # Tokens of the completion.


class RecentGroup(Wire):
    """The completions of one prompt in the batch of a step."""

    step: int  # The step that learns from it.
    group: int  # Index of the group in the batch of the step, from 0.
    prompt: str  # The prompt without special tokens.
    num_prompt_tokens: int  # Tokens of the prompt.
    completions: tuple[RecentCompletion, ...]  # Each with its reward.


class CompletionsResponse(Wire):
    """Answer of `GET /runs/current/completions`."""

    run_id: RunId  # Name of the run.
    reward_names: tuple[str, ...]  # Names of the `rewards`; empty if the caller scored them.
    groups: tuple[RecentGroup, ...]  # The newest group is first.


class PolicyStatus(Wire):
    """The policy that the trainer holds."""

    policy: PolicyId  # The newest version.
    base: BaseIdentity  # Identity of its base.
    rank: int  # LoRA rank of every target module.
    scaling: float  # Factor on B·A; lora_alpha / rank in PEFT's terms.
    target_modules: tuple[str, ...]  # Adapted linear layers, such as q_proj.
    kept_adapters: tuple[int, ...]  # Versions that GET /policy/adapters/{version} serves.


class ReplicasResponse(Wire):
    """Answer of `GET /replicas`."""

    replicas: tuple[ReplicaStatus, ...]  # Every replica that the trainer knows.


class TrainerStatus(Wire):
    """State of the trainer and its run."""

    state: Literal["starting", "ready", "dead"]  # Only a ready trainer starts runs.
    detail: str  # What it is doing, or why it is dead.
    model: str  # Checkpoint folder or hub id, as configured.
    base: BaseIdentity | None  # Identity of its base; None while it starts.
    run: RunStatus | None  # The current run, or the last one; None before the first.

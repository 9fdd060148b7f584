"""Every type that crosses HTTP.

                      GenerateRequest  ──▶            ──▶ GenerateResponse, or StreamRecords
    trainer           adapter file     ──▶  rollout   ──▶ SyncReceipt
                      ScoreRequest     ──▶            ──▶ ScoreResponse

    replica           ReplicaRegistration ▶ trainer   ──▶ ReplicaStatus
    client            TrainRequest     ──▶  trainer   ──▶ TrainResponse
                      run config       ──▶            ──▶ RunStatus, RunEvent (server-sent)

All models are frozen, refuse unknown fields and non-finite floats, and hold tuples: a record that
was accepted cannot change. `logprobs` are natural logarithms; `_s` is seconds, `_bytes` is bytes.
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
    Tag,
    field_validator,
    model_validator,
)


class Wire(BaseModel):
    """Base of every type on the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


TokenId = Annotated[int, Field(ge=0, strict=True)]
Logprob = Annotated[float, Field(ge=-1e6, le=1e-3)]  # rounding may leave it a hair above 0
MAX_SEED = 2**62
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 in hex
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


# --- identity -----------------------------------------------------------------------------------


class PolicyId(Wire):
    """One policy version: `version` updates after the base, in one life (`incarnation`) of a run.

    Version 0 is the base without an adapter. A run that resumes keeps its `run_id` and increments
    `incarnation`; a higher incarnation supersedes every version of a lower one.
    """

    run_id: RunId
    incarnation: int = Field(ge=1, default=1)
    version: int = Field(ge=0)

    @property
    def is_base(self) -> bool:
        return self.version == 0

    @property
    def age_key(self) -> tuple[int, int]:
        """Orders the versions of one run."""
        return self.incarnation, self.version

    @property
    def life(self) -> tuple[str, int]:
        return self.run_id, self.incarnation

    def next(self) -> PolicyId:
        return self.model_copy(update={"version": self.version + 1})

    def __str__(self) -> str:
        return f"{self.run_id}.{self.incarnation}@{self.version}"


BASE_POLICY = PolicyId(run_id="base", version=0)  # what a replica without a run serves


class QuantizationRecipe(Wire):
    """How linears become 4-bit: the arguments of bitsandbytes that change a weight."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    block_size: int = 64
    source_dtype: Literal["bfloat16"] = "bfloat16"
    skipped_modules: tuple[str, ...] = ("lm_head",)


class BaseIdentity(Wire):
    """What must be equal for two processes to hold the same base.

    `weights`: digest of the source checkpoint (tensors and architecture). `recipe`: digest of the
    quantization recipe whose result is computed with, None for the original 16-bit weights.
    """

    weights: Digest
    recipe: Digest | None
    tokenizer: Digest
    chat_template: Digest | None


# --- generation ---------------------------------------------------------------------------------


class SamplingParams(Wire):
    """What shapes the distribution and its length, under vLLM's names and meanings."""

    n: int = Field(ge=1, default=1)  # completions per prompt
    temperature: float = Field(ge=0, le=100, default=1.0)  # 0 is greedy, else at least 0.01
    max_tokens: int | None = Field(ge=1, default=None)  # None: up to the context
    min_tokens: int = Field(ge=0, default=0)  # no stop before
    top_p: float = Field(gt=0, le=1, default=1.0)  # 1 is off
    top_k: int = Field(ge=0, default=0)  # 0 is off
    min_p: float = Field(ge=0, le=1, default=0.0)  # 0 is off
    presence_penalty: float = Field(ge=-2, le=2, default=0.0)  # 0 is off
    frequency_penalty: float = Field(ge=-2, le=2, default=0.0)  # 0 is off
    repetition_penalty: float = Field(gt=0, le=10, default=1.0)  # 1 is off
    seed: Seed | None = None  # completion k of the request uses seed + k
    # texts that end a completion
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        max_length=16, default=()
    )
    # tokens that end one, beside EOS
    stop_token_ids: tuple[TokenId, ...] = Field(max_length=64, default=())
    ignore_eos: bool = False  # go on to max_tokens
    detokenize: bool = True  # False leaves `Completion.text` None and saves the work

    @field_validator("temperature")
    @classmethod
    def _is_sampled_at_as_asked(cls, temperature: float) -> float:
        if 0 < temperature < 0.01:
            raise ValueError("vLLM would sample at 0.01 instead: use 0 (greedy) or at least 0.01")
        return temperature

    def gradient_obstacles(self) -> tuple[str, ...]:
        """The settings under which sampler logprobs are not those of the tempered policy.

        A policy gradient needs the support of the full softmax, so a training request may change
        the temperature and nothing else. Empty when the completions can be trained on.
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
    name: str
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _from_json(cls, arguments: object) -> object:
        """OpenAI's clients send JSON in a string; chat templates take the object."""
        return json.loads(arguments) if isinstance(arguments, str) else arguments


class ToolCall(Wire):
    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolFunction


class ChatMessage(Wire):
    """What a chat template renders: what it does not ask for is not in the prompt."""

    role: str = Field(min_length=1, max_length=64)
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None  # of an assistant
    tool_call_id: str | None = None  # that a tool's message answers


def _prompt_kind(value: object) -> str:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list | tuple) and value else None
    return "chat" if isinstance(first, dict | ChatMessage) else "token_ids"


PromptInput = Annotated[
    Annotated[tuple[TokenId, ...], Field(min_length=1), Tag("token_ids")]
    | Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[tuple[ChatMessage, ...], Tag("chat")],
    Discriminator(_prompt_kind),
]


class GenerateRequest(Wire):
    """`POST /generate`: prompts × `sampling.n` completions.

    A prompt is a list of token ids, a text, or a list of chat messages. `policy` pins a version;
    without it the newest resident one answers. `completion_prefix` continues one completion: its
    ids are context, not output, and the prompt then stands alone with n = 1.
    """

    prompts: tuple[PromptInput, ...] = Field(min_length=1)
    sampling: SamplingParams = SamplingParams()
    policy: PolicyId | None = None
    purpose: Literal["train", "eval"] = "eval"
    completion_prefix: tuple[TokenId, ...] = ()
    stream: bool = False  # NDJSON, one StreamRecord per line, as tokens come

    @model_validator(mode="after")
    def _prefix_belongs_to_one_completion(self) -> GenerateRequest:
        if self.completion_prefix and (len(self.prompts) > 1 or self.sampling.n > 1):
            raise ValueError("completion_prefix needs exactly one prompt and n = 1")
        return self


class Segment(Wire):
    """The next `num_tokens` tokens of a completion were sampled by `policy`."""

    policy: PolicyId
    num_tokens: int = Field(ge=1)


class Completion(Wire):
    """One sampled sequence. `token_ids` include the stop token; `logprobs` are those of the
    distribution actually sampled, one per token."""

    token_ids: tuple[TokenId, ...]
    logprobs: tuple[Logprob, ...]
    segments: tuple[Segment, ...]
    finish_reason: Literal["stop", "length", "interrupted"]
    text: str | None = None

    @model_validator(mode="after")
    def _every_token_has_a_logprob_and_a_version(self) -> Completion:
        num_segment_tokens = sum(segment.num_tokens for segment in self.segments)
        if not len(self.token_ids) == len(self.logprobs) == num_segment_tokens:
            raise ValueError(
                f"{len(self.token_ids)} token_ids, {len(self.logprobs)} logprobs and segments for "
                f"{num_segment_tokens} tokens must be equally many"
            )
        return self


class CompletionGroup(Wire):
    """The completions of one prompt, and the sampling that was applied to them."""

    prompt_token_ids: tuple[TokenId, ...] = Field(min_length=1)
    completions: tuple[Completion, ...] = Field(min_length=1)
    sampling: SamplingParams


class GenerateResponse(Wire):
    groups: tuple[CompletionGroup, ...]
    boot_id: str


class StreamStart(Wire):
    """Group `group` of a stream begins: before any of its tokens, and in the order of prompts."""

    kind: Literal["start"] = "start"
    group: int = Field(ge=0)
    prompt_token_ids: tuple[TokenId, ...] = Field(min_length=1)
    sampling: SamplingParams  # as applied
    policy: PolicyId  # samples every token of the group
    boot_id: str


class StreamTokens(Wire):
    """The next tokens of one completion. The record of its last tokens, and no other, has a finish
    reason: a completion is never complete without its end being said."""

    kind: Literal["tokens"] = "tokens"
    group: int = Field(ge=0)
    completion: int = Field(ge=0)
    token_ids: tuple[TokenId, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: Literal["stop", "length", "interrupted"] | None = None
    text: str | None = None  # of these tokens, when the request asks for it

    @model_validator(mode="after")
    def _every_token_has_a_logprob(self) -> StreamTokens:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids, {len(self.logprobs)} logprobs")
        return self


class StreamAlive(Wire):
    """Sent while there is nothing else to send: silence means that the replica hangs."""

    kind: Literal["alive"] = "alive"


class StreamError(Wire):
    """The last record of a stream that failed; `problem` is the RFC 9457 object."""

    kind: Literal["error"] = "error"
    problem: dict[str, Any]


class StreamEnd(Wire):
    """The last record of every other stream. One that ends without it was cut."""

    kind: Literal["end"] = "end"
    boot_id: str


StreamRecord = Annotated[
    StreamStart | StreamTokens | StreamAlive | StreamError | StreamEnd, Field(discriminator="kind")
]


class ScoreRequest(Wire):
    """`POST /score`: the logprobs of given tokens under one version, at temperature 1."""

    sequences: tuple[Annotated[tuple[TokenId, ...], Field(min_length=2)], ...] = Field(min_length=1)
    policy: PolicyId | None = None


class ScoreResponse(Wire):
    """`logprobs[i][t]` is log p(sequences[i][t + 1] | sequences[i][: t + 1])."""

    logprobs: tuple[tuple[Logprob, ...], ...]
    policy: PolicyId
    boot_id: str


# --- weights ------------------------------------------------------------------------------------


class AdapterManifest(Wire):
    """What an adapter file says of itself; travels in the safetensors metadata.

    One rank and one `scaling` (the factor on B·A) hold for every target module: per-module
    patterns, DoRA and biases do not exist here, and naming one is an unknown field.
    """

    format: Literal["tandem-adapter-1"] = "tandem-adapter-1"
    policy: PolicyId
    base: BaseIdentity
    rank: int = Field(ge=1)
    scaling: float = Field(gt=0, le=1e4)
    target_modules: tuple[str, ...] = Field(min_length=1)

    @field_validator("policy")
    @classmethod
    def _is_an_update(cls, policy: PolicyId) -> PolicyId:
        if policy.is_base:
            raise ValueError("version 0 is the base and has no adapter")
        return policy


class SyncReceipt(Wire):
    """What `POST /sync_weights` answers once the version is resident."""

    policy: PolicyId
    digest: Digest
    outcome: Literal["loaded", "already_resident"]
    newest: PolicyId
    retired: tuple[PolicyId, ...] = ()
    num_bytes: int
    receive_s: float = 0.0  # body and digest
    verify_s: float = 0.0  # header, tensor table, finite values
    wait_s: float = 0.0  # for a free slot
    load_s: float = 0.0  # in the engine
    boot_id: str


class ResidentPolicy(Wire):
    policy: PolicyId
    digest: Digest
    num_bytes: int
    num_leases: int  # requests that run under it
    accepts_requests: bool  # False: superseded, leaves when its leases end


class PoliciesResponse(Wire):
    newest: PolicyId
    resident: tuple[ResidentPolicy, ...]  # version 0 is always resident and not listed
    boot_id: str


class RolloutLimits(Wire):
    max_model_len: int  # prompt + completion tokens
    max_lora_rank: int
    max_live_policies: int
    max_num_seqs: int  # sequences that run at once
    max_completions: int  # per request; queued and running ones of all requests together
    max_adapter_bytes: int
    max_body_bytes: int  # of a JSON request


ServingMode = Literal["lora", "merged"]


class RolloutStatus(Wire):
    state: Literal["starting", "ready", "draining", "dead"]
    detail: str
    boot_id: str
    model: str
    vllm_version: str
    kv_cache_dtype: str
    serving_mode: ServingMode = "lora"
    base: BaseIdentity | None  # None while starting
    limits: RolloutLimits
    newest: PolicyId
    resident: tuple[ResidentPolicy, ...]
    num_outstanding_completions: int


# --- training -----------------------------------------------------------------------------------


class ScoredCompletion(Wire):
    """A completion and how good it is. `rewards` are the parts that `reward` is the sum of, one per
    reward of the run in the same order for all completions; without them it is the only part."""

    completion: Completion
    reward: float
    rewards: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _rewards_add_up(self) -> ScoredCompletion:
        error = abs(sum(self.rewards) - self.reward)
        if self.rewards and error > 1e-6 * sum(map(abs, self.rewards)):
            raise ValueError(
                f"rewards add up to {sum(self.rewards)}, reward is {self.reward}: weigh each, and "
                "let reward be their sum"
            )
        return self


class ScoredGroup(Wire):
    """A group whose completions have a reward: what one policy update learns from."""

    prompt_token_ids: tuple[TokenId, ...] = Field(min_length=1)
    sampling: SamplingParams
    completions: tuple[ScoredCompletion, ...] = Field(min_length=1)


class PreferencePair(Wire):
    """Two answers to a prompt, of which one is the better: what DPO learns from."""

    prompt_token_ids: tuple[TokenId, ...] = Field(min_length=1)
    chosen_token_ids: tuple[TokenId, ...] = Field(min_length=1)
    rejected_token_ids: tuple[TokenId, ...] = Field(min_length=1)

    @property
    def num_positions(self) -> int:
        """Tokens of the prompt and its longer answer."""
        longest = max(len(self.chosen_token_ids), len(self.rejected_token_ids))
        return len(self.prompt_token_ids) + longest


class TrainRequest(Wire):
    """`POST /train`: one policy update, from groups that somebody else sampled and scored, or, for
    the algorithm `dpo`, from pairs."""

    groups: tuple[ScoredGroup, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()
    expected_policy: PolicyId
    idempotency_key: str = Field(min_length=1, max_length=128)

    @model_validator(mode="after")
    def _has_groups_or_pairs(self) -> TrainRequest:
        if bool(self.groups) == bool(self.pairs):
            raise ValueError("send groups or pairs, one of them and not both")
        return self


class LagKl(Wire):
    """KL(sampler ‖ policy) over the tokens of one staleness."""

    lag: int  # Versions between the sampler and the policy.
    kl: float  # Nats per token, k3 estimate.
    num_tokens: int


def statistic(unit: str, meaning: str, default: Any = None) -> Any:
    """A number of a record: declared here once, it is in the log, the curves, the metrics, the page
    and docs/metrics.md. One that does not apply is None in Python and absent everywhere else;
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


RunState = Literal[
    "running", "stopping", "stopped", "completed", "failed", "external", "suspended"
]  # suspended: the trainer went away and takes the run up again when it returns


class StateRecord(Wire):
    kind: Literal["state"] = "state"
    state: RunState
    detail: str = ""


RunEvent = Annotated[StepRecord | EvalRecord | StateRecord, Field(discriminator="kind")]


# --- fleet --------------------------------------------------------------------------------------


_REPLICA_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w-]+(\.[\w-]+)*):(\d{1,5})/?", re.ASCII)


class ReplicaRegistration(Wire):
    """`POST /replicas`: a replica at `url` may serve; with a lease it says so again in time."""

    url: str = Field(max_length=300)
    lease_s: float | None = Field(gt=0, le=86400, default=None)  # None: until it is removed
    boot_id: str | None = None  # of the process; a new one ends an earlier removal

    @field_validator("url")
    @classmethod
    def _names_one_address(cls, url: str) -> str:
        match = _REPLICA_URL.fullmatch(url)
        if match is None or not 0 < int(match[3]) < 65536:
            raise ValueError("write http://host:port, without a path")
        return url


ReplicaState = Literal["discovered", "admitting", "serving", "draining", "quarantined", "gone"]


class ReplicaStatus(Wire):
    """One replica as the trainer sees it.

    discovered: known, not proven, asked again with growing pauses · admitting: being checked and
    given the policy · serving: proven, takes requests · draining: finishes what it has, takes
    nothing new · quarantined: failed a check, takes nothing until it restarts or is registered
    again · gone.
    """

    id: str  # host:port
    url: str
    source: Literal["configured", "registered"]
    state: ReplicaState
    detail: str
    boot_id: str | None
    policy: PolicyId | None  # the newest it was proven to serve
    num_outstanding_completions: int
    num_outstanding_tokens: int  # at most to come, of the requests it has
    logprob_gap: float | None  # mean |replica - trainer| on the probe, at the last check
    last_sync_s: float | None  # upload, load and proof of `policy`
    num_failures: int  # in a row; 0 once it has served


class TrainResponse(Wire):
    policy: PolicyId
    step: StepRecord
    receipts: tuple[SyncReceipt, ...]  # of the replicas that took the new version
    replicas: tuple[ReplicaStatus, ...]


class RunStatus(Wire):
    run_id: RunId
    state: RunState
    detail: str
    stalls: tuple[str, ...] = ()  # what keeps it from learning now, a sentence each
    step: int
    num_steps: int | None  # None: the loop is somebody else's
    policy: PolicyId
    last_step: StepRecord | None
    last_eval: EvalRecord | None
    run_dir: str


class RecentCompletion(Wire):
    """A scored completion in words. `rewards` are the parts of `reward`, weighted."""

    text: str  # special tokens left out
    reward: float
    rewards: tuple[float, ...]
    segments: tuple[Segment, ...]
    finish_reason: Literal["stop", "length", "interrupted"]
    num_tokens: int


class RecentGroup(Wire):
    """The completions of one prompt that step `step` was given to learn from."""

    step: int
    group: int  # its place in the batch of the step
    prompt: str
    num_prompt_tokens: int
    completions: tuple[RecentCompletion, ...]


class CompletionsResponse(Wire):
    """`GET /runs/current/completions`: the newest groups, newest first."""

    run_id: RunId
    reward_names: tuple[str, ...]  # of `rewards`; () when somebody else scored
    groups: tuple[RecentGroup, ...]


class PolicyStatus(Wire):
    policy: PolicyId
    base: BaseIdentity
    rank: int
    scaling: float
    target_modules: tuple[str, ...]
    kept_adapters: tuple[int, ...]  # versions that GET /policy/adapters/{version} still has


class ReplicasResponse(Wire):
    replicas: tuple[ReplicaStatus, ...]


class TrainerStatus(Wire):
    state: Literal["starting", "ready", "dead"]
    detail: str
    model: str
    base: BaseIdentity | None
    run: RunStatus | None

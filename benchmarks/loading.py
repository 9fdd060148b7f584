"""Standard loading against RL loading of the same policy: time, memory, speed of generation.

`python -m benchmarks.loading [--shape mid] [--device cuda] [--report]`. Standard loading is
`PolicyModel.from_pretrained(fast_inference=False)` with Transformers' generate; RL loading is
`fast_inference=True` with the engine's. Each loads in a separate process; RL loads twice, because
the first time builds the 16-bit checkpoint that the engine serves. All generation uses LoRA.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import FIRST_ORDINARY_TOKEN, SHAPES, work_folder, write_checkpoint
from benchmarks.child import Child, loop_in_a_thread
from benchmarks.engines import say
from benchmarks.report import Report

NUM_PROMPTS = (1, 32)
_CPU_KV_CACHE_BYTES = 1 << 30  # fits 32 sequences of one block of 128 tokens, with room to spare
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Loaded:
    model: Any  # PolicyModel
    load_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per process: host memory as proportional set size (PSS), and GPU memory."""

    trainer: int
    engine: int
    gpu_trainer: int
    gpu_engine: int


@contextlib.contextmanager
def loaded(
    folder: Path, cache: Path, arguments: argparse.Namespace, fast_inference: bool
) -> Iterator[tuple[Loaded, asyncio.AbstractEventLoop]]:
    started = time.perf_counter()
    from tandem import PolicyModel

    model, _ = PolicyModel.from_pretrained(
        str(folder),
        max_seq_length=arguments.max_seq_length,
        load_in_4bit=True,
        fast_inference=fast_inference,
        max_lora_rank=16,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        float8_kv_cache=arguments.device == "cuda",
        kv_cache_memory_bytes=_CPU_KV_CACHE_BYTES if arguments.device == "cpu" else None,
        device=arguments.device,
        cache_dir=cache,
    )
    load_s = time.perf_counter() - started
    change_weights(model)
    try:
        with loop_in_a_thread() as loop:
            yield Loaded(model, load_s), loop
    finally:
        model.close()


def change_weights(model: Any) -> None:
    """Change the LoRA as an optimizer step does, so that the engine has an adapter to apply."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 1e-3)


async def load_seconds(subject: Loaded) -> float:
    return subject.load_s


async def memory(subject: Loaded) -> Memory:
    import torch

    model, own, device = subject.model, 0, 0
    if torch.cuda.is_available() and model.policy.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        own, device = torch.cuda.memory_reserved(), total - free
    engine = getattr(model, "vllm_engine", None)
    replica = engine.replica_pid if engine else None
    return Memory(
        trainer=pss("self"),
        engine=sum(map(pss, family(replica))) if replica else 0,
        gpu_trainer=own,
        gpu_engine=device - own if engine else 0,
    )


def family(pid: int) -> list[int]:
    """The process ids of a process and all its descendants."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    return [pid, *(member for child in children for member in family(child))]


def pss(pid: int | str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


async def tokens_per_s(subject: Loaded, num_prompts: int, arguments: argparse.Namespace) -> float:
    """Tokens/s of one call that generates for all prompts, after a warm-up call with others."""
    generate = by_engine if hasattr(subject.model, "vllm_engine") else by_transformers
    rates = []
    for seed in range(2):
        prompts = random_prompts(num_prompts, arguments, seed=seed)
        started = time.perf_counter()
        num_tokens = generate(subject.model, prompts, arguments.completion)
        rates.append(num_tokens / (time.perf_counter() - started))
    return rates[-1]


def random_prompts(
    num_prompts: int, arguments: argparse.Namespace, *, seed: int
) -> list[list[int]]:
    rng = random.Random(f"{num_prompts}/{seed}")
    ids = range(FIRST_ORDINARY_TOKEN, SHAPES[arguments.shape].vocabulary)
    return [rng.choices(ids, k=arguments.prompt) for _ in range(num_prompts)]


def by_engine(model: Any, prompts: list[list[int]], num_tokens: int) -> int:
    outputs = model.fast_generate(prompts, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def by_transformers(model: Any, prompts: list[list[int]], num_tokens: int) -> int:
    import torch

    ids = torch.tensor(prompts, device=model.policy.device)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return int(made[:, ids.shape[1] :].numel())


@dataclass(frozen=True, slots=True)
class Measured:
    load_s: float
    memory: Memory
    rates: list[float]  # tokens/s, one per entry of NUM_PROMPTS


def measure(
    name: str, folder: Path, arguments: argparse.Namespace, *, fast_inference: bool
) -> Measured:
    log, cache = folder.with_name(f"{name}.log"), folder.with_name("cache")
    # The engine gets the same number; it would otherwise use one thread.
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    with Child(name, log, threads, loaded, folder, cache, arguments, fast_inference) as child:
        child.wait_until_ready()
        load_s = child.run(load_seconds)
        say(f"{name}: loaded in {load_s:.1f} s")
        rates = []
        for num_prompts in NUM_PROMPTS:
            rates.append(child.run(tokens_per_s, num_prompts, arguments))
            say(f"{name}: {num_prompts} prompts, {rates[-1]:,.1f} tokens/s")
        return Measured(load_s, child.run(memory), rates)


def report(standard: Measured, first: Measured, rl: Measured, arguments: Any) -> Report:
    def mib(of: Callable[[Memory], int]) -> list[str]:
        return [f"{of(m.memory) / _MIB:,.0f} MiB" if of(m.memory) else "–" for m in (standard, rl)]

    rows = [
        ["engine attached", "no", "yes: `model.vllm_engine`"],
        ["load, the first time", f"{standard.load_s:.1f} s", f"{first.load_s:.1f} s"],
        ["load, later", f"{standard.load_s:.1f} s", f"{rl.load_s:.1f} s"],
        ["memory of the program", *mib(lambda memory: memory.trainer)],
        ["memory of the engine", *mib(lambda memory: memory.engine)],
    ]
    if standard.memory.gpu_trainer:
        rows += [
            ["GPU memory of the program", *mib(lambda memory: memory.gpu_trainer)],
            ["GPU memory of the engine", *mib(lambda memory: memory.gpu_engine)],
        ]
    for index, num_prompts in enumerate(NUM_PROMPTS):
        name = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
        slow, fast = standard.rates[index], rl.rates[index]
        rows.append([f"generation, {name}", f"{slow:,.1f} tokens/s", f"{fast:,.1f} tokens/s"])
    ratios = [fast / slow for slow, fast in zip(standard.rates, rl.rates, strict=True)]
    return Report(
        name="loading",
        title="Standard loading and RL loading",
        setting=(
            f"A Qwen3 with random weights, shape `{arguments.shape}`, NF4 with LoRA of rank 16 on "
            f"{arguments.device}; {arguments.prompt} + {arguments.completion} tokens per prompt. "
            "Standard: `fast_inference=False`, Transformers' generate. RL: `fast_inference=True`, "
            f"the engine; both with {os.cpu_count()} threads. Imports are part of loading; memory "
            "is after generation."
        ),
        header=["", "standard", "RL"],
        rows=rows,
        conclusion=(
            f"The engine generates {ratios[0]:.1f} times as fast for one prompt and "
            f"{ratios[-1]:.1f} times for {NUM_PROMPTS[-1]}."
        ),
        variant=f"{arguments.device}-{arguments.shape}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="mid")
    parser.add_argument("--prompt", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--completion", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()
    with work_folder() as root:
        folder = root / "model"
        write_checkpoint(arguments.shape, folder, device=arguments.device)
        standard = measure("standard", folder, arguments, fast_inference=False)
        first = measure("rl-first", folder, arguments, fast_inference=True)
        rl = measure("rl", folder, arguments, fast_inference=True)
    report(standard, first, rl, arguments).publish(keep=arguments.report)


if __name__ == "__main__":
    main()

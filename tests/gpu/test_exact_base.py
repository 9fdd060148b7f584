"""How far replica and trainer are apart, by the base that is served and by the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.trainer.data.sort_digits import held_out_problems
from services.trainer.policy.policy import Policy
from tests.gpu.conftest import LORA, Report
from tests.gpu.replicas import TRAINED, Replicas, Run, gap, lora_tensors, run_on

pytestmark = pytest.mark.anyio

SERVED = ("exact-bf16", "exact-fp8", "original-bf16", "original-fp8")
NUM_PROMPTS, NUM_TOKENS = 64, 32


async def test_the_exact_base_is_the_one_the_trainer_computes_with(
    replicas: Replicas,
    policy: Policy,
    report: Report,
) -> None:
    """Mean |Δlogprob| over what a replica of the exact base has sampled."""
    gaps: dict[tuple[str, str], float] = {}
    for adapter in ("base", "adapter"):
        version = int(adapter == "adapter")
        async with run_on(replicas["exact-bf16"]) as run:
            sequences = await sample(run, policy, version)
        trainer = trainer_logprobs(policy, sequences, version)
        for name in SERVED:
            async with run_on(replicas[name]) as run:
                await push(run, version)
                served = last(await run.scores(sequences, run.policy(version)))
            gaps[adapter, name] = gap(served, trainer)
    for adapter in ("base", "adapter"):
        table = {name: round(gaps[adapter, name], 4) for name in SERVED}
        report(f"mean |Δlogprob| of trainer and replica, {adapter}", table)
    for adapter in ("base", "adapter"):
        exact, exact_fp8, original, original_fp8 = (gaps[adapter, name] for name in SERVED)
        assert exact < 0.03
        assert exact < exact_fp8 < 0.1
        assert min(original, original_fp8) > 3 * exact


async def push(run: Run, version: int) -> None:
    """Publish the adapter of `version`; 0 is the base, and has none."""
    if version:
        content = run.adapter(run.policy(version), strength=TRAINED)
        await run.client.sync_weights(content, replace_run=True, in_flight="continue")


async def sample(run: Run, policy: Policy, version: int) -> list[tuple[int, ...]]:
    """Prompts of the task, each with a completion of `version`."""
    await push(run, version)
    prompts = [policy.encoder.encode(prompt) for prompt, _ in held_out_problems()[:NUM_PROMPTS]]
    answer = await run.generate(
        *prompts, policy=run.policy(version), max_tokens=NUM_TOKENS, seed=3, ignore_eos=True
    )
    return [
        (*prompt, *group.completions[0].token_ids)
        for prompt, group in zip(prompts, answer.groups, strict=True)
    ]


def trainer_logprobs(policy: Policy, sequences: list[tuple[int, ...]], version: int) -> list[float]:
    """Of the completions."""
    shapes = {name: tuple(shape) for name, shape in policy.lora_shapes().items()}
    strength = TRAINED * (version > 0)
    tensors = lora_tensors(shapes, LORA.scaling, seed=version, strength=strength)
    with policy.replaced_lora(tensors):
        flat = iter(policy.score(sequences))
    return last([[next(flat) for _ in sequence[1:]] for sequence in sequences])


def last(rows: Sequence[Sequence[float]]) -> list[float]:
    """The logprobs of the completions, whose prompts come first."""
    return [logprob for row in rows for logprob in row[-NUM_TOKENS:]]

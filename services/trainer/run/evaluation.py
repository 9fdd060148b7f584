"""Mean reward on held-out prompts, sampled and greedy: run ─▶ fleet ─▶ rewards ─▶ EvalRecord."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence

from services.trainer.data.rows import Prompt
from services.trainer.run.run import Run
from services.trainer.run_config import RunConfig
from shared.schemas import EvalRecord, GenerateRequest, SamplingParams

_EVAL_PROMPTS_PER_REQUEST = 32


def needs_eval(config: RunConfig, step: int, last: EvalRecord | None) -> bool:
    """True when an evaluation after `step` is due and has not been made."""
    if config.eval is None or (last and last.step == step):
        return False
    return step % config.eval.every_steps == 0 or step == config.num_steps


async def evaluate(run: Run, step: int) -> None:
    """Mean reward on held-out prompts, sampled and greedy, one completion each."""
    if not run.config.eval:
        return
    started = time.perf_counter()
    sampling = run.config.sampling.model_copy(update={"n": 1, "detokenize": False})
    seed = derived_seed(run.config.seed, "eval")
    sampled = await _mean_reward(run, sampling.model_copy(update={"seed": seed}))
    greedy = await _mean_reward(run, sampling.model_copy(update={"temperature": 0.0}))
    await run.log.emit(
        EvalRecord(
            step=step,
            policy=run.policy.id,
            num_prompts=len(run.held_out),
            sampled_reward=sampled,
            greedy_reward=greedy,
            eval_s=time.perf_counter() - started,
        )
    )


async def _mean_reward(run: Run, sampling: SamplingParams) -> float:
    requests = [
        GenerateRequest(
            prompts=tuple(prompt.token_ids for prompt in chunk),
            sampling=sampling.model_copy(
                update={"seed": None if sampling.seed is None else sampling.seed + start}
            ),
            policy=run.policy.id,
            purpose="eval",
        )
        for start, chunk in _chunks(run.held_out, _EVAL_PROMPTS_PER_REQUEST)
    ]
    groups = await run.fleet.generate(requests, timeout_s=run.config.generate_timeout_s)
    scored = await run.scorer.score(run.held_out, groups)
    return statistics.fmean(c.reward for group in scored for c in group.completions)


def derived_seed(seed: int, name: str) -> int:
    """A sampling seed for one named draw of a run; seeds of different draws are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])


def _chunks(items: Sequence[Prompt], size: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]

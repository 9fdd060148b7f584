"""What a run does about the guards of its updates (stats.py has the numbers and their bounds).

first batch ─check_handshake─▶ update ─watch─▶ a line when a number gets bad, and when it is good
                                 └refused─▶ <run_dir>/refused/step-000012.json, and an error
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from pydantic_core import to_json

from services.trainer.durable import write_file
from services.trainer.learner.stats import (
    MIN_FRESH_TOKENS,
    UpdateRefused,
    mean_kl,
    num_telling_tokens,
)
from services.trainer.policy.samples import Sample
from services.trainer.run_config import GuardsConfig
from shared.errors import ConformanceFailed, UnsuitableForTraining
from shared.schemas import UpdateStats

log = logging.getLogger(__name__)


class ScoresSamples(Protocol):
    def sample_logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Logprobs of each sample's completion tokens at its temperature, without a gradient."""
        ...


def check_handshake(policy: ScoresSamples, samples: Sequence[Sample], guards: GuardsConfig) -> None:
    """Score some fresh completions as an update does, before the first update.

    Raises ConformanceFailed when their sampler logprobs come from another model.
    """
    bound = guards.max_handshake_kl
    fresh = [s for s in samples if s.sampler_logprobs and not any(s.staleness)]
    if bound is None or not fresh:
        return
    num_needed = num_telling_tokens(bound)
    ends = list(accumulate(sample.num_tokens for sample in fresh))
    # Completions whose tokens are too few to judge.
    num_short = sum(end < num_needed for end in ends)
    fresh = fresh[: max(guards.num_handshake_completions, num_short + 1)]
    policy_logprobs = [value for row in policy.sample_logprobs(fresh) for value in row]
    sampler_logprobs = [value for sample in fresh for value in sample.sampler_logprobs]
    gaps = torch.tensor(policy_logprobs) - torch.tensor(sampler_logprobs)
    num_tokens, kl = len(gaps), mean_kl(gaps) or 0.0
    found = (
        f"KL(sampler || trainer) of {len(fresh)} completions ({num_tokens} tokens) before the "
        f"first update is {kl:.2g}"
    )
    if num_tokens < num_needed:
        log.warning("%s, of too few tokens to be judged: that takes %d", found, num_needed)
        return
    log.info("%s", found)
    if kl > bound:
        raise ConformanceFailed(
            f"{found}, above guards.max_handshake_kl {bound:g}: the replicas compute another model "
            "than the trainer, as with ROLLOUT_BASE=original and a 4-bit trainer, with another "
            "ROLLOUT_MODEL or an FP8 ROLLOUT_KV_CACHE_DTYPE; mend that, or raise "
            "guards.max_handshake_kl"
        )


def refused(
    run_dir: Path,
    step: int,
    samples: Sequence[Sample],
    refusal: UpdateRefused | FloatingPointError,
) -> UnsuitableForTraining:
    """Save the refused batch; returns the error that says why and where it is."""
    folder = run_dir / "refused"
    number = len(list(folder.glob(f"step-{step:06d}*")))
    path = folder / f"step-{step:06d}{f'-{number}' if number else ''}.json"
    stats = dict(refusal.stats) if isinstance(refusal, UpdateRefused) else None
    batch = {"step": step, "reason": str(refusal), "stats": stats, "samples": samples}
    where = f"its batch is in {path}"
    try:
        folder.mkdir(exist_ok=True)
        write_file(path, to_json(batch, inf_nan_mode="strings"))
    except OSError as error:  # The reason matters more than the batch.
        where = f"its batch could not be saved in {path}: {error.strerror or error}"
    return UnsuitableForTraining(f"step {step} was not applied ({where}): {refusal}")


class GuardWatch:
    """Warns when a statistic crosses its bound, once until it is back, and once when no token is
    fresh."""

    def __init__(self) -> None:
        self.beyond: dict[str, str] = {}  # Statistic -> the sentence of its last step.
        self._is_blind = False

    def see(self, step: int, stats: UpdateStats, guards: GuardsConfig) -> None:
        if not stats.num_fresh_tokens and stats.kl_by_lag and not self._is_blind:
            self._is_blind = True
            log.warning(
                "step %d: no token was sampled by the very version that is updated, as with "
                "max_staleness above 0: the guards of sampler and trainer see nothing; logprob_gap "
                "per replica in GET /replicas compares them at every sync",
                step,
            )
        if stats.num_fresh_tokens < MIN_FRESH_TOKENS:
            return
        for name, value, bound in (
            ("sampler_kl", stats.sampler_kl, guards.warn_sampler_kl),
            ("probability_factor", stats.probability_factor, guards.warn_probability_factor),
        ):
            was_beyond = name in self.beyond
            if value is None:
                continue
            limit = math.inf if bound is None else bound
            # Back only well below the bound: a number near it must not be logged at every step.
            is_beyond = value > (_back_at(limit, name) if was_beyond else limit)
            if is_beyond:
                self.beyond[name] = (
                    f"step {step}: {name} is {value:.4g}, above guards.warn_{name} {bound:g}: "
                    "trainer and replicas drift apart; compare logprob_gap per replica in GET "
                    "/replicas"
                )
                if not was_beyond:
                    log.warning("%s", self.beyond[name])
            elif was_beyond:
                del self.beyond[name]
                log.info("step %d: %s is back at %.4g", step, name, value)


def _back_at(limit: float, name: str) -> float:
    """Halfway to no difference, which is 1 for a factor and 0 otherwise."""
    none = 1.0 if name == "probability_factor" else 0.0
    return none + (limit - none) / 2

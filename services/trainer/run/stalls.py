"""What keeps a run from learning, in sentences: RunStatus.stalls, from the run as it is now.

deploy/prometheus/alerts.yml watches for the same over minutes; here somebody looks at it now.
"""

from __future__ import annotations

import time

from services.trainer.run.evaluation import needs_eval
from services.trainer.run.run import Run

_MIN_WAIT_S = 60.0  # Time without an event after which a run counts as stalled.
_MIN_FIRST_WAIT_S = 600.0  # The same before the first step or evaluation, which may take long.
_MAX_STEPS = 5  # And this many times the last step and evaluation, beyond any honest variation.


def stalls(run: Run) -> tuple[str, ...]:
    """One sentence per stall; empty for a run that makes progress or has ended."""
    if run.log.state not in ("running", "external"):
        return ()
    found = [*_too_few_replicas(run), *_nothing_to_learn(run), *run.watch.beyond.values()]
    if not found:
        found = _standing_still(run)
    return tuple(found)


def _too_few_replicas(run: Run) -> list[str]:
    obstacle = run.fleet.obstacle()
    return [obstacle] if obstacle else []


def _nothing_to_learn(run: Run) -> list[str]:
    step = run.log.last_step
    if step is None or step.grad_norm > 0:
        return []
    cause = "nothing in its batch has a gradient"
    if step.num_constant_groups == step.num_groups:
        cause = f"all {step.num_groups} groups have equal rewards (mean {step.reward_mean:.3g})"
    return [
        f"step {step.step} taught nothing: {cause}; unless the task is learned, check the reward, "
        "take prompts that are neither too easy nor too hard, a larger sampling.n or a higher "
        "temperature"
    ]


def _standing_still(run: Run) -> list[str]:
    """A user's own loop may take its time."""
    if not run.config.managed:
        return []
    step, evaluation = run.log.last_step, run.log.last_eval
    last_s = (step.step_s if step else 0.0) + (evaluation.eval_s if evaluation else 0.0)
    is_first = step is None or (evaluation is None and needs_eval(run.config, step.step, None))
    first_s = max(_MIN_FIRST_WAIT_S, run.config.generate_timeout_s) if is_first else 0.0
    silent_s = time.monotonic() - run.log.changed_at
    if silent_s < max(_MIN_WAIT_S, _MAX_STEPS * last_s, first_s):
        return []
    before = f"the last step took {step.step_s:.3g} s" if step else "there was no step yet"
    return [
        f"no update for {silent_s:.0f} s, {before}: look for slow rewards, long completions, and "
        "requests that wait on the replicas"
    ]

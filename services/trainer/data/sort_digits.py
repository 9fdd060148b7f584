"""The demo task: `s53812=` -> `12358`. Small enough to learn on two CPU cores."""

from __future__ import annotations

import random
from collections.abc import Iterator

NUM_DIGITS = 5
_HELD_OUT_SEED = 999
_NUM_HELD_OUT = 256


def problem(rng: random.Random) -> tuple[str, str]:
    """One problem as (prompt, answer)."""
    digits = [str(rng.randrange(10)) for _ in range(NUM_DIGITS)]
    return f"s{''.join(digits)}=", "".join(sorted(digits))


def held_out_problems() -> list[tuple[str, str]]:
    """The fixed evaluation set; `training_problems` never yields one of its prompts."""
    rng = random.Random(_HELD_OUT_SEED)
    return [problem(rng) for _ in range(_NUM_HELD_OUT)]


def training_problems(rng: random.Random) -> Iterator[tuple[str, str]]:
    """An endless stream of problems drawn from `rng`."""
    held_out = {prompt for prompt, _ in held_out_problems()}
    while True:
        drawn = problem(rng)
        if drawn[0] not in held_out:
            yield drawn

"""The task: add three numbers, with a calculator that adds two.

user   s47+38+25=          the policy writes a call, which ends with "=", or the answer
policy 47+38=
tool   085s
policy 085+25=
tool   110s
policy 110<eos>            reward 1
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

MAX_TURNS = 4
MAX_TURN_TOKENS = 8  # the longest call, "085+25=", has seven
_CALL = re.compile(r"(\d{1,3})\+(\d{1,3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Problem:
    numbers: tuple[int, int, int]  # two digits each

    @property
    def question(self) -> str:
        """The user's message; the chat template appends "="."""
        return "s" + "+".join(map(str, self.numbers))

    @property
    def answer(self) -> str:
        return f"{sum(self.numbers):03}"


def problem(rng: random.Random) -> Problem:
    a, b, c = (rng.randrange(10, 100) for _ in range(3))
    return Problem((a, b, c))


def calculator(expression: str) -> str | None:
    """The tool's result for a call such as `47+38`, or None if it is not a sum of two numbers."""
    match = _CALL.fullmatch(expression)
    return f"{int(match[1]) + int(match[2]):03}s" if match else None


def reward(problem: Problem, last_text: str) -> float:
    """1 for the right answer, else 0; an episode that ends in a call has no answer and gets 0."""
    return float(last_text == problem.answer)

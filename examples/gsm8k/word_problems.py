"""Generates small word problems in the format of GSM8K: a question, and a worked answer whose last
line is `#### number`.

`python -m examples.gsm8k.word_problems > examples/gsm8k/sample.jsonl` writes the shipped sample.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NUM_SAMPLE = 64
_SAMPLE_SEED = 2025
Operator = Literal["+", "-", "*"]

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "eggs", "kites", "pens", "shells", "stamps")
# Text with {n}ame, {t}hing and the numbers {a}, {b}, {c}, then the operators: a op b, then op c.
TEMPLATES: tuple[tuple[str, tuple[Operator, ...]], ...] = (
    ("{n} has {a} {t} and buys {b} more . How many {t} does {n} have ?", ("+",)),
    ("{n} had {a} {t} and gave {b} away . How many {t} are left ?", ("-",)),
    ("{n} fills {a} boxes with {b} {t} each . How many {t} are there ?", ("*",)),
    (
        "{n} has {a} {t} , finds {b} and loses {c} . How many {t} does {n} have ?",
        ("+", "-"),
    ),
    (
        "{n} buys {a} bags of {b} {t} and has {c} at home . How many {t} are there ?",
        ("*", "+"),
    ),
    ("{n} packs {a} bags of {b} {t} , then drops {c} . How many {t} are left ?", ("*", "-")),
)


@dataclass(frozen=True, slots=True)
class WordProblem:
    question: str
    numbers: tuple[int, ...]
    operators: tuple[Operator, ...]

    def worked(self, *, operators: tuple[Operator, ...] | None = None) -> tuple[list[str], int]:
        """The lines of the computation and its result; other `operators` give a wrong result."""
        result, lines = self.numbers[0], []
        for operator, number in zip(operators or self.operators, self.numbers[1:], strict=True):
            before, result = result, compute(result, operator, number)
            lines.append(f"{before} {operator} {number} = {result}")
        return lines, result

    @property
    def answer(self) -> str:
        lines, result = self.worked()
        return "\n".join((*lines, f"#### {result}"))


def compute(left: int, operator: Operator, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def draw(rng: random.Random) -> WordProblem:
    """Draw a problem whose numbers and correct results all lie between 0 and 99."""
    text, operators = rng.choice(TEMPLATES)
    a, b = (rng.randint(2, 5), rng.randint(2, 5)) if "*" in operators else _in_order(rng)
    c = rng.randint(1, 3)
    question = text.format(n=rng.choice(NAMES), t=rng.choice(THINGS), a=a, b=b, c=c)
    return WordProblem(question, (a, b, c)[: len(operators) + 1], operators)


def _in_order(rng: random.Random) -> tuple[int, int]:
    small, large = sorted((rng.randint(2, 9), rng.randint(2, 9)))
    return large, small


def sample() -> list[WordProblem]:
    """The shipped problems, whose questions `training_problems` never yields."""
    rng = random.Random(_SAMPLE_SEED)
    found: dict[str, WordProblem] = {}
    while len(found) < NUM_SAMPLE:
        problem = draw(rng)
        found[problem.question] = problem
    return list(found.values())


def training_problems(rng: random.Random) -> Iterator[WordProblem]:
    """An endless stream of problems, in an order determined by `rng`."""
    held_out = {problem.question for problem in sample()}
    while True:
        problem = draw(rng)
        if problem.question not in held_out:
            yield problem


if __name__ == "__main__":
    for problem in sample():
        print(json.dumps({"question": problem.question, "answer": problem.answer}))

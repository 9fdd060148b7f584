"""Preferences become rewards: the share of the others that a completion beats.

    group of one prompt ─▶ every pair to `prefers` ─▶ win rate of each ─▶ best and worst: a DPO pair

Put your judge, as a call of a larger model, in the place of `prefers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, groupby


def win_rate(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: object
) -> list[float]:
    """The reward function: wins count 1, ties 1/2, over the completions of the same prompt.

    A completion that is alone, as in an evaluation, is compared with the dataset's answer: 1 when
    it is as good, else 0.
    """
    rewards = [0.0] * len(completions)
    for _prompt, places in groupby(range(len(prompts)), key=lambda place: prompts[place]):
        group = list(places)
        for first, second in combinations(group, 2):
            preference = prefers(prompts[first], completions[first], completions[second])
            rewards[first] += (1 + preference) / 2 / (len(group) - 1)
            rewards[second] += (1 - preference) / 2 / (len(group) - 1)
        if len(group) == 1:
            (place,) = group
            loses = prefers(prompts[place], completions[place], answer[place]) < 0
            rewards[place] = float(not loses)
    return rewards


def prefers(prompt: str, first: str, second: str) -> int:
    """1 when the judge prefers the first answer to `s53812=`, -1 when the second, 0 for a tie."""
    a, b = disorder(prompt, first), disorder(prompt, second)
    return (a < b) - (a > b)


def disorder(prompt: str, completion: str) -> int:
    """How far a completion is from the sorted digits of its prompt: the pairs of digits in the
    wrong order, and more than all of them when they are not the digits of the prompt."""
    digits = prompt.removeprefix("s").removesuffix("=")
    pairs = list(combinations(digits, 2))
    if sorted(completion) != sorted(digits):
        return len(pairs) + 1
    return sum(left > right for left, right in combinations(completion, 2))

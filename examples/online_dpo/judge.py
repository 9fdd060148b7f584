"""Turns preferences into rewards: the share of the other completions that a completion beats.

    group of one prompt ─▶ every pair to `prefers` ─▶ win rate of each ─▶ best and worst: a DPO pair

Replace `prefers` with your judge, for example a call to a larger model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, groupby


def win_rate(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: object
) -> list[float]:
    """The reward function: the mean over the prompt's other completions of 1 per win, 1/2 per tie.

    A prompt's only completion, as in an evaluation, is compared with the dataset's answer: 1 if it
    is at least as good, else 0.
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
    """1 if the first answer to a prompt like `s53812=` is better, -1 if the second, 0 for a tie."""
    a, b = disorder(prompt, first), disorder(prompt, second)
    return (a < b) - (a > b)


def disorder(prompt: str, completion: str) -> int:
    """How far a completion is from the sorted digits of its prompt: the number of digit pairs in
    the wrong order, or one more than all pairs if it has other digits than the prompt."""
    digits = prompt.removeprefix("s").removesuffix("=")
    pairs = list(combinations(digits, 2))
    if sorted(completion) != sorted(digits):
        return len(pairs) + 1
    return sum(left > right for left, right in combinations(completion, 2))

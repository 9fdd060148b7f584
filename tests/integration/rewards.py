"""Reward functions of the runs of these tests, in a file that a process imports fast."""

from __future__ import annotations

import time


def share_of_small_digits(completions: list[str], **_: object) -> list[float]:
    return [sum(c in "01234" for c in text) / max(len(text), 1) for text in completions]


class _BreaksLater:
    """Scores the 2 × 16 completions of two steps, then fails."""

    def __init__(self) -> None:
        self.num_completions = 0

    def __call__(self, completions: list[str], **_: object) -> list[float]:
        self.num_completions += len(completions)
        if self.num_completions > 32:
            raise RuntimeError("the judge left")
        return share_of_small_digits(completions)


breaks_later = _BreaksLater()


def broken(**_: object) -> list[float]:
    raise RuntimeError("the judge is away")


def not_a_number(completions: list[str], **_: object) -> list[float]:
    return [float("nan")] * len(completions)


def endless(completions: list[str], **_: object) -> list[float]:
    return [float("inf")] * len(completions)


def nothing(completions: list[str], **_: object) -> list[None]:
    return [None] * len(completions)


def none_at_all(**_: object) -> list[float]:
    return []


def hangs(**_: object) -> list[float]:
    time.sleep(600)
    return []

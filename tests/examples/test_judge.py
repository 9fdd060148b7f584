"""Preferences of the judge in examples/online_dpo, and the rewards computed from them."""

from __future__ import annotations

import pytest

from examples.online_dpo.judge import disorder, prefers, win_rate

PROMPT = "s53812="


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("12358", 0), ("13258", 1), ("85321", 10), ("1235", 11), ("12357", 11), ("", 11)],
)
def test_disorder_counts_pairs_in_the_wrong_order(completion: str, expected: int) -> None:
    assert disorder(PROMPT, completion) == expected


def test_equal_digits_are_in_no_wrong_order() -> None:
    assert disorder("s11111=", "11111") == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("12358", "13258", 1), ("13258", "12358", -1), ("21358", "13258", 0), ("85321", "1", 1)],
)
def test_the_judge_prefers_what_is_sorted_better(first: str, second: str, expected: int) -> None:
    assert prefers(PROMPT, first, second) == expected


def test_a_reward_is_the_share_of_the_others_that_a_completion_beats() -> None:
    prompts = [PROMPT] * 3
    assert win_rate(prompts, ["12358", "13258", "13258"], ["12358"] * 3) == [1.0, 0.25, 0.25]


def test_only_completions_of_one_prompt_are_compared() -> None:
    prompts, completions = ["s21=", "s21=", "s43="], ["12", "21", "34"]
    assert win_rate(prompts, completions, ["12", "12", "34"]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("completion", "expected"), [("12358", 1.0), ("13258", 0.0)])
def test_a_completion_that_is_alone_is_compared_with_the_answer(
    completion: str, expected: float
) -> None:
    assert win_rate([PROMPT], [completion], ["12358"]) == [expected]

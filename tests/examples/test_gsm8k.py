r"""The maths reward: which answers are equal, which are not, and what is no answer at all."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from examples.gsm8k.data import convert
from examples.gsm8k.reward import correct_answer, final_answer, is_correct
from examples.gsm8k.word_problems import sample, training_problems

SAMPLE = Path(__file__).parents[2] / "examples/gsm8k/sample.jsonl"


@pytest.mark.parametrize(
    ("right", "given"),
    [
        ("1/2", "0.5"),
        ("0.5", r"\boxed{\frac{1}{2}}"),
        ("1/2", r"\boxed{\dfrac{2}{4}}"),
        ("1,000", "1000"),
        ("1000", r"\boxed{1{,}000}"),
        ("1234567", "1,234,567"),
        ("18", "$18"),
        ("18", r"\boxed{\$18.00}"),
        ("18", "18 dollars"),
        ("12", r"\boxed{12\text{ km}}"),
        ("5", "5.0"),
        ("-3", "-3"),
        ("-3", "−3"),  # a minus sign, not a hyphen
        ("50", "50%"),
        ("7", "7."),
        ("7", "  7  \nsome more words"),
        ("7", r"first \boxed{3}, no: \boxed{7}"),
        ("7", "#### 3\nI was wrong.\n#### 7"),
        ("7", r"\boxed{3} but #### 7"),
        ("7", r"#### 3 but \boxed{7}"),
        ("7", "x = 7"),
    ],
)
def test_answers_that_are_equal(right: str, given: str) -> None:
    completion = given if "####" in given or "boxed" in given else f"So it is.\n#### {given}"
    assert is_correct(completion, f"A worked answer with a 12 in it.\n#### {right}")


@pytest.mark.parametrize(
    ("right", "given"),
    [
        ("3", "-3"),
        ("1/2", "0.05"),
        ("1000", "1,00"),
        ("1,000", "1"),
        ("12", "13"),
        ("5", "5.01"),
        ("7", "7 or 8, who knows, it may also be 9 or 10 or 11 or any other number there is"),
        ("7", "seven"),
        ("7", ""),
    ],
)
def test_answers_that_are_not_equal(right: str, given: str) -> None:
    assert not is_correct(f"#### {given}", f"#### {right}")


def test_a_number_without_a_mark_is_no_answer() -> None:
    """Otherwise a completion that never ends could be right through numbers of the question."""
    assert final_answer("There are 7 of them, so 7.") is None


@pytest.mark.parametrize(
    "given",
    [
        "9^9^9^9",  # a power that no alarm interrupts
        "10**10**10",
        "99999999!",
        r"\sum_{i=1}^{999999999} i",
        r"\int_0^1 x dx 7",
        r"\input{7}",
        "7" * 19,
        "(" * 5000 + "7" + ")" * 5000,
        r"\frac{" * 5000 + "7",
        "__import__('os').system('echo 7')",
        "7\x00\x07" + chr(0xFFFF) * 100,
        "{7",
        "}7{",
    ],
)
@pytest.mark.parametrize("form", ["#### {}", "\\boxed{{{}}}"])
def test_garbage_and_hostile_expressions_are_wrong_at_once(form: str, given: str) -> None:
    assert not is_correct(form.format(given), "#### 8")


@pytest.mark.timeout(20)
def test_random_characters_never_raise_nor_hang() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("0123456789.,/-+*=(){}\\frac$%x ") for _ in range(40))
        assert is_correct(f"#### {text}", "#### 1234567") in (False, True)


def test_a_boxed_answer_may_have_braces() -> None:
    assert final_answer(r"\boxed{\frac{1}{2}} is it") == r"\frac{1}{2}"


def test_a_box_that_is_never_closed_is_no_answer() -> None:
    assert final_answer(r"\boxed{7") is None


def test_a_worked_answer_without_a_number_is_an_error_and_no_reward() -> None:
    with pytest.raises(ValueError, match="'I do not know' has no number after ####"):
        correct_answer(["p"], ["#### 7"], answer=["I do not know"])


# --- data ---------------------------------------------------------------------------------------


def test_the_shipped_sample_is_what_its_script_writes() -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert rows == [{"question": p.question, "answer": p.answer} for p in sample()]
    assert len({row["question"] for row in rows}) == 64


def test_every_worked_answer_is_correct_and_its_result_is_that_of_its_last_line() -> None:
    for problem in sample():
        assert is_correct(problem.answer, problem.answer)
        *lines, last = problem.answer.split("\n")
        for line in lines:
            left, operator, right, _, result = line.split()
            computed = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
            }[operator]
            assert computed == int(result)
        assert last == f"#### {lines[-1].split()[-1]}"


def test_no_training_problem_is_in_the_sample() -> None:
    held_out = {problem.question for problem in sample()}
    drawn = islice(training_problems(random.Random(1)), 2000)
    assert not held_out & {problem.question for problem in drawn}


def test_gsm8k_becomes_chat_prompts_or_plain_ones(tmp_path: Path) -> None:
    target = tmp_path / "new" / "prompts.jsonl"
    assert convert(SAMPLE, target) == 64
    first = json.loads(target.read_text().splitlines()[0])
    assert first["prompt"][0]["role"] == "user"
    assert first["prompt"][0]["content"].startswith(f"{sample()[0].question}\n")
    assert first["answer"] == sample()[0].answer
    convert(SAMPLE, target, plain=True)
    assert json.loads(target.read_text().splitlines()[0])["prompt"] == sample()[0].question


def test_parquet_is_read_as_jsonl_is(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"question": "How many ?", "answer": "1 + 1 = 2\n#### 2"}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert convert(tmp_path / "rows.parquet", tmp_path / "out.jsonl") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"problem": "How many ?", "answer": "#### 1"}',
            "row 0 of .* no text in a column 'question'; its columns are problem, answer",
        ),
        ("a.jsonl", '{"question": "q", "answer": "1"}', "row 0 .* no number after ####"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.csv", "question,answer", r"is neither .jsonl nor .parquet"),
        ("", "", "there is no file"),
    ],
)
def test_a_file_of_another_format_says_what_it_has(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / (name or "nowhere.jsonl"), tmp_path / "out.jsonl")

r"""The reward: 1 for a completion whose final answer equals that of the worked answer, else 0.

completion ─▶ content of its last \boxed{}, or text after its last #### ─▶ math-verify ─▶ 0 or 1

`math-verify` reads numbers, fractions, LaTeX, units and thousands separators. It stops itself with
an alarm after a few seconds and so needs the main thread, on which reward functions run. An alarm
cannot interrupt the computation of one huge power, so only plain numbers count as answers here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MAX_CHARACTERS = 64  # longest final answer
# Powers, factorials, LaTeX commands except fractions and text, and numbers of more than 18 digits.
_NO_NUMBER = re.compile(r"[\^!]|\*\*|\\(?!d?frac|text|mathrm)|\d{19}")
_SPELLINGS = {"−": "-", "{,}": ",", r"\$": "", r"\,": "", r"\!": "", r"\ ": " ", r"\%": "%"}
_TIMEOUT_S = 2


def correct_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: object
) -> list[float]:
    """The reward function; `answer` holds the dataset's worked answer for each completion."""
    return [
        float(is_correct(completion, worked))
        for completion, worked in zip(completions, answer, strict=True)
    ]


def is_correct(completion: str, worked: str) -> bool:
    """Whether the final answers are equal. Raises ValueError if `worked` has no final answer."""
    from math_verify import parse, verify

    right = final_answer(worked)
    if right is None:
        raise ValueError(
            f"the dataset's answer {worked!r:.200} has no number after ####: add it to the dataset"
        )
    given = final_answer(completion)
    if given is None:
        return False
    if given == right:
        return True
    parsed = (parse(_marked(text), parsing_timeout=_TIMEOUT_S) for text in (right, given))
    return bool(verify(*parsed, timeout_seconds=_TIMEOUT_S))


def _marked(text: str) -> str:
    """Put an answer with LaTeX back into a box, so that math-verify parses it as LaTeX."""
    return rf"\boxed{{{text}}}" if "\\" in text else text


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{}, or the rest of the line after the last ####, whichever is
    later in the text; None unless it can be a number."""
    boxed, hashes = text.rfind(r"\boxed{"), text.rfind("####")
    if max(boxed, hashes) < 0:
        return None
    if boxed > hashes:
        found = _braced(text[boxed + len(r"\boxed{") :])
    else:
        found = text[hashes + len("####") :].strip().partition("\n")[0]
    if found is None or len(found) > _MAX_CHARACTERS:
        return None
    for written, meant in _SPELLINGS.items():
        found = found.replace(written, meant)
    found = found.strip().rstrip(".")
    has_digit = any(c.isdigit() for c in found)
    return None if _NO_NUMBER.search(found) or not has_digit else found


def _braced(text: str) -> str | None:
    """The text up to the brace that closes one opened before it; None if it is too far away."""
    depth = 1
    for place, character in enumerate(text[: _MAX_CHARACTERS + 1]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return None

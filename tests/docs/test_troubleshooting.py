"""Every sentence that troubleshooting.md quotes is one that the code can say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
QUOTES = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(), re.MULTILINE)


@cache
def sentences() -> list[str]:
    """All strings of the code, with … for what is filled in."""
    found = []
    for folder in ("services", "shared", "tandem", "deploy/scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            found += [text(node) for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return found


def text(node: ast.expr) -> str:
    """What is known of a string before it is made; … for any other expression."""
    match node:
        case ast.Constant(value=str(value)):
            return re.sub(r"%(?:\.\d+)?[sdg]", "…", value)
        case ast.JoinedStr(values=parts):
            return "".join(map(text, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text(left) + text(right)
        case _:
            return "…"


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_sentence_is_in_the_code(quote: str) -> None:
    """… may stand for more than one value."""
    pattern = re.compile(".*?".join(map(re.escape, quote.split("…"))), re.DOTALL)
    assert any(pattern.search(sentence) for sentence in sentences())


def test_the_page_has_rows() -> None:
    assert len(QUOTES) == len(re.findall(r"^\| `", PAGE.read_text(), re.MULTILINE)) > 60

"""The function of the built-in reward `regex`, run in a process of its own (process.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence


def matches(completions: Sequence[str], pattern: str, full: bool) -> list[float]:
    """1 where `pattern` matches the whole completion (`full`), or occurs in it; else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    found = compiled.fullmatch if full else compiled.search
    return [float(found(completion) is not None) for completion in completions]

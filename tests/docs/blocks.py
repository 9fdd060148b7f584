"""The fenced blocks of the pages, and what the comment right above one says of it.

`<!-- not run: REASON -->`            a test cannot run it; REASON says why, or what runs it instead
`<!-- runs until it is stopped -->`   a service: it is started, and is up once it prints `ready`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVICE = "runs until it is stopped"
_FENCED = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<language>[^\n]*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    page: Path
    number: int  # in its page, from 1
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.number}"

    @property
    def is_shell(self) -> bool:
        return self.language in ("bash", "sh", "shell", "console")

    @property
    def is_service(self) -> bool:
        return self.mark == SERVICE

    @property
    def reason(self) -> str:
        """Why a test cannot run it; empty where one does."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else ""


def blocks(page: Path) -> Sequence[Block]:
    return [
        Block(page, number, found["language"], found["text"], found["mark"] or "")
        for number, found in enumerate(_FENCED.finditer(page.read_text()), start=1)
    ]


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]

"""The page in a real Chromium: what it shows, asks for and complains of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, Response, sync_playwright

from tests.page.scripted_trainer import ScriptedTrainer, Served

SCREENSHOTS = Path(__file__).parents[2] / ".screenshots"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
_MISSING = "there is no Chromium: apt-get install chromium, or set CHROMIUM to its path"
WAIT_MS = 15_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.browser)


@dataclass
class Visit:
    """One page, and what the browser said of it."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)  # console errors and uncaught exceptions
    hosts: set[str] = field(default_factory=set)  # that anything was asked of
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._on_request)

    def open(self) -> Page:
        answer = self.page.goto(self.url)
        assert isinstance(answer, Response)
        assert answer.ok
        return self.page

    def shoot(self, name: str) -> None:
        """Keep what is seen, for people."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def wait_for_text(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for()

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _on_request(self, request: Request) -> None:
        self.requests.append(request)
        self.hosts.add(urlsplit(request.url).netloc)


@pytest.fixture(scope="module")  # for a session it would keep other tests from their event loops
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail(_MISSING)
        pytest.skip(_MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def trainer() -> ScriptedTrainer:
    return ScriptedTrainer()


@pytest.fixture
def served(trainer: ScriptedTrainer) -> Iterator[Served]:
    served = Served(trainer)
    yield served
    served.stop()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """`visit(url, **context options)`, each with storage of its own."""
    contexts = []

    def begin(url: str, **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        return Visit(context.new_page(), url)

    yield begin
    for context in contexts:
        context.close()
